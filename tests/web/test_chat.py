"""Chats in the page: what is said is answered, kept, and can go another way."""

import re
from collections.abc import Callable

import httpx
import pytest

pytest.importorskip("playwright", reason="the Python package playwright is not installed")

from playwright.sync_api import BrowserContext, Page, expect

from tests.web.pages import WebServer, say, session_of, wait_idle, wait_written

OpenPage = Callable[..., Page]
NewSession = Callable[..., str]
LONG = {"temperature": 0, "ignore_eos": True}
"""Sampling of an answer that goes on until the context is full, which takes seconds."""


def test_a_chat_of_three_turns_remembers_and_is_there_after_a_reload(open_page: OpenPage) -> None:
    page = open_page()
    page.get_by_role("button", name="New chat", exact=True).click()
    page.get_by_role("button", name="Settings of this chat").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Longest answer").fill("60")
    page.get_by_label("Close the settings").click()

    say(page, "Hello, my name is Ada.")
    say(page, "My favourite colour is green.")
    both = say(page, "What is my name and my favourite colour?")
    assert "Ada" in both
    assert "green" in both
    last = page.get_by_label("Answer", exact=True).last
    for what in ("First token", "tokens/s", "Cached", "Prefilled", "Written", "Queued"):
        expect(last.get_by_label("Timings of this answer")).to_contain_text(what)

    shown = page.get_by_role("log").inner_text()
    page.reload()
    expect(page.get_by_label("Answer", exact=True)).to_have_count(3)
    assert page.get_by_role("log").inner_text() == shown
    page.get_by_role("button", name="Settings of this chat").click()
    expect(page.get_by_label("Temperature")).to_have_value("0")


def test_stopping_keeps_the_part_and_it_can_be_continued(
    open_page: OpenPage, new_session: NewSession
) -> None:
    page = open_page(new_session("chat", **LONG))
    page.get_by_label("Message", exact=True).fill("Tell me something about cats.")
    page.keyboard.press("Enter")
    answer = page.get_by_label("Answer", exact=True)
    wait_written(page, "[aria-label=Answer] .markdown")
    page.keyboard.press("Escape")
    wait_idle(page)
    expect(answer).to_contain_text("Stopped before its end")
    part = answer.locator(".markdown").inner_text()
    assert part
    page.reload()
    expect(answer.locator(".markdown")).to_have_text(part)

    page.get_by_role("button", name="Continue the answer").click()
    expect(answer.locator(".markdown")).not_to_have_text(part)
    page.keyboard.press("Escape")
    wait_idle(page)
    assert answer.locator(".markdown").inner_text().startswith(part[:20])
    expect(answer).to_have_count(1)


def test_regenerate_edit_and_back_to_the_other_branches(
    open_page: OpenPage, new_session: NewSession
) -> None:
    page = open_page(new_session("chat", temperature=0, max_tokens=40))
    first = say(page, "Hello, my name is Ada.")
    answer = page.get_by_label("Answer", exact=True)
    page.get_by_role("button", name="Regenerate").click()
    expect(page.get_by_label("answer 2 of 2")).to_be_visible()
    wait_idle(page)
    page.get_by_role("button", name="Previous answer").click()
    expect(page.get_by_label("answer 1 of 2")).to_be_visible()
    expect(answer.locator(".markdown")).to_have_text(first)

    page.get_by_label("You").hover()
    page.get_by_role("button", name="Edit", exact=True).click()
    page.get_by_label("Edit your message").fill("Hello, my name is Bob.")
    page.keyboard.press("Enter")
    expect(page.get_by_label("version 2 of 2")).to_be_visible()
    wait_idle(page)
    expect(page.get_by_label("You")).to_contain_text("Bob")
    assert "Bob" in answer.locator(".markdown").inner_text()
    page.get_by_role("button", name="Previous version").click()
    expect(page.get_by_label("You")).to_contain_text("Ada")
    expect(answer.locator(".markdown")).to_have_text(first)
    page.get_by_role("button", name="Undo", exact=True).click()
    expect(page.get_by_label("You")).to_contain_text("Bob")


def test_starting_again_from_an_earlier_point(open_page: OpenPage, new_session: NewSession) -> None:
    page = open_page(new_session("chat", temperature=0, max_tokens=40))
    say(page, "Hello, my name is Ada.")
    say(page, "My favourite colour is green.")
    page.get_by_label("You").last.hover()
    page.get_by_role("button", name="Start again from here").last.click()
    expect(page.get_by_label("Answer", exact=True)).to_have_count(1)
    message = page.get_by_label("Message", exact=True)
    expect(message).to_have_value("My favourite colour is green.")
    message.fill("")
    say(page, "What is my name?")
    page.get_by_role("button", name="Go on from here").click()
    expect(page.get_by_label("You")).to_have_count(1)
    page.get_by_role("region", name="Notices").get_by_role("button", name="Undo").click()
    expect(page.get_by_label("You").last).to_contain_text("What is my name?")


def test_renaming_searching_exporting_and_deleting(
    open_page: OpenPage, new_session: NewSession
) -> None:
    page = open_page(new_session("chat", temperature=0, max_tokens=20))
    say(page, "The word is zebrafish.")
    entry = page.get_by_role("navigation").locator("li", has=page.locator("[aria-current]"))

    def choose(item: str) -> None:
        entry.hover()
        entry.get_by_role("button").click()
        page.get_by_role("menuitem", name=item).click()

    choose("Rename")
    page.get_by_role("navigation").get_by_label("Title").fill("About fish")
    page.keyboard.press("Enter")
    expect(entry).to_contain_text("About fish")
    expect(page.get_by_role("textbox", name="Title")).to_have_value("About fish")

    page.keyboard.press("Control+k")
    page.keyboard.type("zebrafish")
    found = page.get_by_role("listbox", name="Found").get_by_role("option")
    expect(found.first).to_contain_text("zebrafish")
    expect(found.first).to_contain_text("About fish")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Search")).to_have_count(0)

    with page.expect_download() as download:
        choose("Export")
    assert download.value.suggested_filename == "About-fish.json"

    choose("Delete")
    expect(page.get_by_role("link", name="About fish")).to_have_count(0)
    page.get_by_role("region", name="Notices").get_by_role("button", name="Undo").click()
    expect(page.get_by_label("You")).to_contain_text("zebrafish")
    choose("Delete")
    expect(page.get_by_role("link", name="About fish")).to_have_count(0)
    page.reload()
    expect(page.get_by_role("navigation")).not_to_contain_text("About fish")

    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Import a session").click()
    chooser.value.set_files(download.value.path())
    page.wait_for_url(re.compile("#/chat/"))
    expect(page.get_by_label("You")).to_contain_text("zebrafish")
    choose("Delete")


def test_deleting_what_cannot_be_brought_back_is_asked_before(
    open_page: OpenPage, new_session: NewSession, api: httpx.Client
) -> None:
    page = open_page(new_session("story"))
    session = f"/api/sessions/{session_of(page)}"
    # Both texts are kept, as branches: together they are longer than a request may be.
    for letter in "ab":
        assert api.put(f"{session}/text", json={"text": letter * 600_000}).status_code == 200
    assert api.patch(session, json={"title": "Far too long"}).status_code == 200
    page.reload()
    entry = page.get_by_role("navigation").locator("li", has=page.locator("[aria-current]"))

    def delete() -> None:
        entry.hover()
        entry.get_by_role("button").click()
        page.get_by_role("menuitem", name="Delete").click()

    delete()
    dialog = page.get_by_role("dialog", name="Delete “Far too long” for good?")
    expect(dialog).to_contain_text("1.2 MB")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    assert api.get(session).status_code == 200

    delete()
    with page.expect_download() as download:
        dialog.get_by_role("button", name="Export").click()
    assert download.value.suggested_filename == "Far-too-long.json"
    dialog.get_by_role("button", name="Delete for good").click()
    expect(page.get_by_text("“Far too long” is deleted.")).to_be_visible()
    notices = page.get_by_role("region", name="Notices")
    expect(notices.get_by_role("button", name="Undo")).to_have_count(0)
    assert api.get(session).status_code == 404


def test_two_tabs_on_one_session_show_the_same(
    open_page: OpenPage, new_session: NewSession, server: WebServer
) -> None:
    place = new_session("chat", temperature=0, max_tokens=40)
    one, other = open_page(place), open_page(place)
    with server.standing_still():
        one.get_by_label("Message", exact=True).fill("Hello, my name is Ada.")
        one.keyboard.press("Enter")
        expect(one.locator("[aria-busy=true]")).to_contain_text(re.compile("queue|Reading"))
        # While one tab is being answered, the other is told that it has to wait.
        other.get_by_label("Message", exact=True).fill("Me too")
        other.keyboard.press("Enter")
        expect(other.get_by_role("alert")).to_contain_text("an answer is being written")
        expect(other.get_by_label("Message", exact=True)).to_have_value("Me too")
    expect(one.get_by_label("Answer", exact=True).locator(".markdown")).to_be_visible()
    wait_idle(one)
    written = one.get_by_label("Answer", exact=True).locator(".markdown").inner_text()
    expect(other.get_by_label("Answer", exact=True).locator(".markdown")).to_have_text(written)


def test_a_full_queue_is_tried_again_by_itself(
    open_page: OpenPage, new_session: NewSession, context: BrowserContext
) -> None:
    page = open_page(new_session("chat", temperature=0, max_tokens=20))
    refusal = {
        "error": {"message": "the queue is full", "code": "queue_full", "type": "", "param": ""}
    }
    context.route(
        "**/send",
        lambda route: route.fulfill(status=429, headers={"Retry-After": "1"}, json=refusal),
        times=1,
    )
    page.get_by_label("Message", exact=True).fill("Hello!")
    page.keyboard.press("Enter")
    expect(page.get_by_text(re.compile("The queue is full: tried again in"))).to_be_visible()
    wait_idle(page)
    expect(page.get_by_label("Answer", exact=True).locator(".markdown")).not_to_be_empty()


def test_what_a_model_writes_stays_text(
    open_page: OpenPage, import_answer: Callable[[str], str]
) -> None:
    page = open_page(
        import_answer(
            "<img src=x onerror=\"document.title='broken'\"> "
            "[harmless](javascript:document.title='broken') <script>document.title='broken'</script>\n\n"
            "<a href='javascript:alert(1)'>tag</a> ![picture](https://example.org/spy.png)\n\n"
            "```html\n<iframe src='javascript:alert(1)'></iframe>\n```\n\n[good](https://example.org/)"
        )
    )
    answer = page.get_by_label("Answer", exact=True)
    expect(answer).to_contain_text("onerror")
    assert answer.locator("img, script, iframe, style, [onerror], [style]").count() == 0
    links = answer.locator("a[href]").evaluate_all("found => found.map(link => link.href)")
    assert links == ["https://example.org/"]
    answer.get_by_text("harmless").click()
    assert page.evaluate("document.title") == "Imported – tpserve"


def test_code_is_highlighted_and_can_be_copied(
    open_page: OpenPage, import_answer: Callable[[str], str]
) -> None:
    page = open_page(import_answer("```python\ndef f():\n    return 1\n```"))
    code = page.locator(".code")
    expect(code.locator(".hljs-keyword").first).to_have_text("def")
    code.get_by_role("button", name="Copy").click()
    expect(code.get_by_role("button", name="Copied")).to_be_visible()


def test_a_link_to_a_session_that_is_gone_says_so(open_page: OpenPage, api: httpx.Client) -> None:
    page = open_page("#/chat/999999")
    expect(page.get_by_text("This session is not there")).to_be_visible()
    assert session_of(page) == 999999
    assert api.get("/api/sessions/999999").status_code == 404
