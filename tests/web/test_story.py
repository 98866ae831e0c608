"""Stories in the page: one text, which the user and the model write together."""

from collections.abc import Callable

import httpx
import pytest

pytest.importorskip("playwright", reason="the Python package playwright is not installed")

from playwright.sync_api import Page, expect

from tests.web.pages import WebServer, session_of, wait_idle, wait_written

OpenPage = Callable[..., Page]
NewSession = Callable[..., str]
BEGINNING = "Once upon a time there was a little bird who lived in a tall tree."


def editor_text(page: Page) -> str:
    return page.get_by_label("Story", exact=True).input_value()


def tinted(page: Page) -> str:
    return "".join(page.locator(".mirror .generated").all_inner_texts())


def go_on(page: Page, button: str = "Continue") -> str:
    """Let the model write; the whole text."""
    before = editor_text(page)
    page.get_by_role("button", name=button, exact=True).click()
    expect(page.get_by_label("Story", exact=True)).not_to_have_value(before)
    wait_idle(page)
    expect(page.get_by_role("button", name="Continue", exact=True)).to_be_enabled()
    return editor_text(page)


def test_a_story_is_written_continued_and_kept(open_page: OpenPage, api: httpx.Client) -> None:
    page = open_page()
    page.get_by_role("button", name="New story", exact=True).click()
    page.get_by_role("button", name="Settings of this story").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Longest answer").fill("20")
    page.get_by_label("Close the settings").click()
    page.get_by_label("Story", exact=True).fill(BEGINNING)
    first = go_on(page)
    assert first.startswith(BEGINNING)
    assert tinted(page) == first.removeprefix(BEGINNING)
    second = go_on(page)
    assert second.startswith(first)
    assert len(second) > len(first)

    page.reload()
    expect(page.get_by_label("Story", exact=True)).to_have_value(second)
    assert tinted(page) == second.removeprefix(BEGINNING)
    stored = api.get(f"/api/sessions/{session_of(page)}").json()["messages"]
    assert "".join(message["content"] for message in stored) == second

    page.get_by_role("button", name="Undo", exact=True).click()
    expect(page.get_by_label("Story", exact=True)).to_have_value(first)
    page.get_by_role("button", name="Redo", exact=True).click()
    expect(page.get_by_label("Story", exact=True)).to_have_value(second)


def test_what_is_typed_over_is_no_longer_tinted_and_what_is_not_sent_is_not_lost(
    open_page: OpenPage, new_session: NewSession
) -> None:
    page = open_page(new_session("story", temperature=0, max_tokens=20))
    editor = page.get_by_label("Story", exact=True)
    editor.fill(BEGINNING)
    written = go_on(page)
    page.keyboard.press("Control+End")
    editor.press_sequentially(" The end!")
    assert tinted(page) == written.removeprefix(BEGINNING)
    page.reload()
    expect(editor).to_have_value(written + " The end!")
    expect(page.get_by_text("Saved", exact=True)).to_be_visible()
    editor.fill(BEGINNING.replace("bird", "fish") + written.removeprefix(BEGINNING) + " The end!")
    assert tinted(page) == written.removeprefix(BEGINNING)


def test_writing_at_the_cursor_keeps_what_stands_behind_it(
    open_page: OpenPage, new_session: NewSession
) -> None:
    page = open_page(new_session("story", temperature=0, max_tokens=12))
    editor = page.get_by_label("Story", exact=True)
    editor.fill(BEGINNING + " And so it was.")
    editor.evaluate("(field, at) => field.setSelectionRange(at, at)", len(BEGINNING))
    whole = go_on(page, "At cursor")
    assert whole.startswith(BEGINNING)
    assert whole.endswith(" And so it was.")
    assert len(whole) > len(BEGINNING + " And so it was.")
    page.reload()
    expect(editor).to_have_value(whole)


def test_choosing_among_continuations(open_page: OpenPage, new_session: NewSession) -> None:
    page = open_page(new_session("story", temperature=1, seed=1, max_tokens=12))
    page.get_by_label("Story", exact=True).fill(BEGINNING)
    page.get_by_label("Continuations", exact=True).select_option("3")
    first = go_on(page)
    cards = page.get_by_role("group", name="Choices").get_by_role("button")
    expect(cards).to_have_count(3)
    expect(
        page.get_by_label("continuation 3 of 3").or_(page.get_by_label("continuation 1 of 3"))
    ).to_be_visible()
    texts = cards.locator(".text").all_inner_texts()
    assert len(set(texts)) == 3
    for card, text in zip(cards.all(), texts, strict=True):
        card.click()
        expect(card).to_have_attribute("aria-pressed", "true")
        assert editor_text(page).startswith(BEGINNING)
        assert editor_text(page).removeprefix(BEGINNING).strip() == text
    assert first.removeprefix(BEGINNING).strip() in texts


def test_of_several_quick_choices_the_last_one_counts(
    open_page: OpenPage, new_session: NewSession, server: WebServer
) -> None:
    page = open_page(new_session("story", temperature=1, seed=1, max_tokens=12))
    page.get_by_label("Story", exact=True).fill(BEGINNING)
    page.get_by_label("Continuations", exact=True).select_option("3")
    go_on(page)
    cards = page.get_by_role("group", name="Choices").get_by_role("button")
    with server.not_answering():
        for card in cards.all():
            card.click()
    expect(cards.last).to_have_attribute("aria-pressed", "true")
    assert editor_text(page).endswith(cards.last.locator(".text").inner_text())


def test_another_word_can_be_chosen_after_a_reload(
    open_page: OpenPage, new_session: NewSession
) -> None:
    page = open_page(new_session("story", temperature=0, max_tokens=30))
    page.get_by_label("Story", exact=True).fill(BEGINNING)
    whole = go_on(page)
    page.reload()
    expect(page.get_by_label("Story", exact=True)).to_have_value(whole)
    word = page.locator(".mirror .generated").evaluate(
        """(element, at) => {
            const range = document.createRange();
            range.setStart(element.firstChild, at);
            range.setEnd(element.firstChild, at + 1);
            const { x, y, width, height } = range.getBoundingClientRect();
            return [x + width * 0.6, y + height / 2];
        }""",
        12,
    )
    page.mouse.click(*word)
    choices = page.get_by_role("dialog").get_by_role("button").filter(has_text="%")
    expect(choices).to_have_count(8)
    chances = [float(text.rstrip(" %")) for text in choices.locator(".numbers").all_inner_texts()]
    assert chances == sorted(chances, reverse=True)
    assert 0 < sum(chances) <= 101
    choices.nth(1).click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    other = editor_text(page)
    assert other != whole
    assert len(other) < len(whole)
    assert other.startswith(BEGINNING)
    expect(page.get_by_text("Saved", exact=True)).to_be_visible()
    go_on(page)
    assert editor_text(page).startswith(other)


def test_stopping_a_story_keeps_what_was_written(
    open_page: OpenPage, new_session: NewSession
) -> None:
    page = open_page(new_session("story", temperature=0, ignore_eos=True))
    page.get_by_label("Story", exact=True).fill(BEGINNING)
    page.get_by_role("button", name="Continue", exact=True).click()
    wait_written(page, ".mirror .generated")
    page.keyboard.press("Escape")
    wait_idle(page)
    part = editor_text(page)
    assert len(part) > len(BEGINNING)
    page.reload()
    expect(page.get_by_label("Story", exact=True)).to_have_value(part)
