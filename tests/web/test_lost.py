"""Connections that are lost in the middle of an answer: the page goes on with it by itself."""

from collections.abc import Callable
from threading import Thread

import httpx
import pytest

pytest.importorskip("playwright", reason="the Python package playwright is not installed")

from playwright.sync_api import BrowserContext, Page, Route, expect

from tests.e2e.server import wait_until
from tests.web.pages import WebServer, session_of, wait_idle

OpenPage = Callable[..., Page]
NewSession = Callable[..., str]
TOKENS = 600
"""Of an answer: enough to take seconds, few enough for the context."""
LONG = {"temperature": 0, "ignore_eos": True, "max_tokens": TOKENS}
BACK_TIMEOUT_MS = 120_000
"""Until a server that was started again has answered, on a busy machine too."""
STORE_TIMEOUT_S = 60.0
ANSWER = "[aria-label=Answer] .markdown"
QUESTION = "Tell me something about cats."


def ask(page: Page) -> None:
    page.get_by_label("Message", exact=True).fill(QUESTION)
    page.keyboard.press("Enter")


def expect_whole_answer(page: Page, api: httpx.Client) -> None:
    """One question, one answer with all its tokens, shown as it is stored."""
    answer = page.get_by_label("Answer", exact=True)
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible(timeout=BACK_TIMEOUT_MS)
    wait_idle(page)
    expect(page.get_by_role("alert")).to_have_count(0)
    asked, answered = api.get(f"/api/sessions/{session_of(page)}").json()["messages"]
    assert (asked["role"], asked["content"]) == ("user", QUESTION)
    assert not answered["partial"]
    assert answered["completion_tokens"] == TOKENS
    expect(page.get_by_label("You")).to_have_count(1)
    expect(answer).to_have_count(1)
    expect(answer.locator(".markdown")).to_have_text(answered["content"].strip())


@pytest.mark.parametrize("end", ["stopped, which stores the part", "killed, which loses it"])
def test_a_server_that_ends_in_mid_answer_completes_it_after_its_restart(
    open_page: OpenPage, new_session: NewSession, server: WebServer, api: httpx.Client, end: str
) -> None:
    page = open_page(new_session("chat", **LONG))
    try:
        with server.in_mid_answer(page, ANSWER, lambda: ask(page)):
            if end.startswith("stopped"):
                server.process.stop()
            else:
                server.kill()
        expect(page.get_by_text("Connection lost, trying again")).to_be_visible()
        expect(page.get_by_text("The server cannot be reached")).to_be_visible()
    finally:
        server.start()
    expect_whole_answer(page, api)


def test_a_gateway_that_dies_in_mid_answer_completes_it(
    open_page: OpenPage, new_session: NewSession, server: WebServer, api: httpx.Client
) -> None:
    page = open_page(new_session("chat", **LONG))
    with server.in_mid_answer(page, ANSWER, lambda: ask(page)):
        server.gateway().kill()
    expect(page.get_by_text("Connection lost, trying again")).to_be_visible()
    expect_whole_answer(page, api)


def test_a_story_is_picked_up_too(
    open_page: OpenPage, new_session: NewSession, server: WebServer, api: httpx.Client
) -> None:
    page = open_page(new_session("story", **LONG))
    editor = page.get_by_label("Story", exact=True)
    editor.fill("Once upon a time there was a little bird.")
    go_on = page.get_by_role("button", name="Continue", exact=True)
    with server.in_mid_answer(page, ".mirror .generated", go_on.click):
        server.gateway().kill()
    expect(page.get_by_text("Connection lost, trying again")).to_be_visible()
    expect(go_on).to_be_enabled(timeout=BACK_TIMEOUT_MS)
    messages = api.get(f"/api/sessions/{session_of(page)}").json()["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert not messages[1]["partial"]
    assert messages[1]["completion_tokens"] == TOKENS
    expect(editor).to_have_value("".join(message["content"] for message in messages))


def test_what_never_arrived_is_put_back_into_the_field(
    open_page: OpenPage, new_session: NewSession, context: BrowserContext
) -> None:
    page = open_page(new_session("chat", temperature=0, max_tokens=20))
    message = page.get_by_label("Message", exact=True)
    expect(message).to_be_visible()
    context.route("**/send", lambda route: route.abort("connectionreset"), times=1)
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("Your message did not arrive")
    expect(message).to_have_value(QUESTION)
    page.get_by_role("button", name="Try again").click()
    wait_idle(page)
    expect(page.get_by_label("You")).to_have_count(1)
    expect(page.get_by_label("Answer", exact=True)).to_have_count(1)
    expect(message).to_have_value("")


def test_stop_ends_the_trying(
    open_page: OpenPage, new_session: NewSession, context: BrowserContext
) -> None:
    page = open_page(new_session("chat", temperature=0, max_tokens=20))
    message = page.get_by_label("Message", exact=True)
    expect(message).to_be_visible()
    context.route("**/api/**", lambda route: route.abort("connectionrefused"))
    ask(page)
    expect(page.get_by_text("Connection lost, trying again")).to_be_visible()
    page.keyboard.press("Escape")
    wait_idle(page)
    expect(message).to_have_value(QUESTION)
    context.unroute("**/api/**")
    expect(page.get_by_text("Ready", exact=True)).to_be_visible()
    expect(page.get_by_label("You")).to_have_count(0)


def test_a_turn_that_another_page_has_picked_up_is_waited_for(
    open_page: OpenPage,
    new_session: NewSession,
    context: BrowserContext,
    server: WebServer,
    api: httpx.Client,
) -> None:
    page = open_page(new_session("chat", temperature=0, max_tokens=20))
    place = f"/api/sessions/{session_of(page)}"
    expect(page.get_by_label("Message", exact=True)).to_be_visible()
    for_another = Thread(target=lambda: api.post(f"{place}/send", json={"text": QUESTION}))

    def lose(route: Route) -> None:
        for_another.start()
        assert wait_until(lambda: api.get(place).json()["messages"] != [], STORE_TIMEOUT_S)
        route.abort("connectionreset")

    context.route("**/send", lose, times=1)
    with server.standing_still():
        ask(page)
        expect(page.get_by_text("Being written for another page", exact=True)).to_be_visible()
    for_another.join()
    wait_idle(page)
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.get_by_label("You")).to_have_count(1)
    (_, answer) = api.get(place).json()["messages"]
    assert len(answer["siblings"]) == 1
    expect(page.get_by_label("Answer", exact=True).locator(".markdown")).to_have_text(
        answer["content"].strip()
    )
