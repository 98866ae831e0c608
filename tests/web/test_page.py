"""The page as a whole: first visit, models, timings, keys, restarts, accessibility."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytest.importorskip("playwright", reason="the Python package playwright is not installed")

from playwright.sync_api import Browser, Page, Request, expect

from shared.config import PROJECT_ROOT
from tests.gateway.process import GatewayProcess
from tests.web.pages import WebServer, say, wait_idle, wait_written

OpenPage = Callable[..., Page]
NewSession = Callable[..., str]
FIRST_PAINT_LIMIT_MS = 5000
"""Generous: other programs may run. The test prints what it was."""
RESTART_TIMEOUT_MS = 90_000
"""Until workers that were killed are there again, on a busy machine too."""
KEY = "open-sesame-open"


def serious(page: Page) -> list[str]:
    """What axe-core holds to be serious or critical, colours' contrast included."""
    found: list[dict[str, Any]] = page.evaluate(
        "axe.run({ runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa'] })"
        ".then(({ violations }) => violations)"
    )
    return [
        f"{violation['id']}: {node['html'][:120]} {node['failureSummary'][:160]}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def test_the_first_visit_says_what_to_do(open_page: OpenPage, api: httpx.Client) -> None:
    for session in api.get("/api/sessions?limit=1000").json()["sessions"]:
        api.delete(f"/api/sessions/{session['id']}")
    page = open_page()
    expect(page.get_by_role("heading", name="Welcome")).to_be_visible()
    expect(page.get_by_role("navigation")).to_contain_text("Start a chat or a story")
    paint = page.evaluate(
        "performance.getEntriesByName('first-contentful-paint').map(entry => entry.startTime)[0]"
    )
    print(f"first contentful paint after {paint:.0f} ms")
    assert paint < FIRST_PAINT_LIMIT_MS
    page.get_by_role("main").get_by_role("button", name="Chat").click()
    expect(page.get_by_label("Message", exact=True)).to_be_focused()


def test_models_are_shown_loaded_with_progress_and_unloaded(open_page: OpenPage) -> None:
    page = open_page("#/models")
    chat = page.get_by_role("region", name="chat", exact=True)
    expect(chat).to_contain_text("ready")
    expect(chat).to_contain_text("bf16")
    expect(chat.get_by_role("row")).to_have_count(3)
    page.get_by_label("Name", exact=True).fill("again")
    page.get_by_label("Folder on the server").fill(str(PROJECT_ROOT / "models" / "demo-chat"))
    page.get_by_label("Weights").select_option("fp32")
    page.get_by_role("button", name="Load", exact=True).click()
    loaded = page.get_by_role("region", name="again", exact=True)
    expect(loaded).to_contain_text("ready")
    expect(loaded).to_contain_text("fp32")
    expect(page.get_by_text("again is loaded.")).to_be_visible()
    loaded.get_by_role("button", name="Unload").click()
    page.get_by_role("dialog").get_by_role("button", name="Unload").click()
    expect(loaded).to_have_count(0)

    page.get_by_label("Name", exact=True).fill("nothing")
    page.get_by_label("Folder on the server").fill("/nowhere/at/all")
    page.get_by_role("button", name="Load", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("/nowhere/at/all")


def test_timings_of_answers_are_noted_with_the_servers_settings(
    open_page: OpenPage, new_session: NewSession
) -> None:
    page = open_page(new_session("chat", temperature=0, max_tokens=20))
    say(page, "Hello!")
    say(page, "Hello, my name is Ada.")
    page.get_by_role("link", name="Timings").click()
    rows = page.get_by_role("region", name="The last answers").get_by_role("row")
    expect(rows).to_have_count(3)
    expect(rows.nth(1)).to_contain_text("2 × shm")
    expect(rows.nth(1)).to_contain_text("bf16")
    expect(page.get_by_role("img", name="Tokens per second")).to_be_visible()
    expect(page.get_by_text("chat · bf16 · 2 × shm").first).to_be_visible()
    page.reload()
    expect(rows).to_have_count(3)


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_nothing_serious_stands_in_the_way_of_anyone(
    browser: Browser,
    server: WebServer,
    axe: str,
    import_answer: Callable[[str], str],
    colours: Any,
) -> None:
    text = "# Heading\n\n`code` and [link](https://example.org)\n\n```python\nx = 'y'  # z\n```\n\n| a | b |\n|-|-|\n| 1 | 2 |"
    chat = import_answer(text)
    with browser.new_context(color_scheme=colours, bypass_csp=True) as context:
        page = context.new_page()
        page.goto(f"{server.url}/#/")
        page.add_script_tag(content=axe)
        found = {}
        for place, sign in (
            ("#/", "What shall it be?"),
            (chat, "Heading"),
            ("#/models", "Load a model"),
            ("#/timings", "The server now"),
        ):
            page.evaluate("place => { location.hash = place }", place)
            expect(page.get_by_role("heading", name=sign)).to_be_visible()
            found[place] = serious(page)
        page.get_by_role("button", name="New story", exact=True).click()
        page.get_by_label("Story", exact=True).fill("Once upon a time there was a bird.")
        page.get_by_role("button", name="Settings of this story").click()
        found["story"] = serious(page)
        page.keyboard.press("Control+k")
        found["search"] = serious(page)
    assert found == {place: [] for place in found}


def test_a_phone_shows_all_of_it_in_its_width(
    browser: Browser, server: WebServer, import_answer: Callable[[str], str]
) -> None:
    chat = import_answer(
        "long" * 60 + "\n\n```\n" + "wide " * 60 + "\n```\n\n| " + "column | " * 12
    )
    with browser.new_context(viewport={"width": 380, "height": 700}, has_touch=True) as context:
        page = context.new_page()
        for place in (chat, "#/", "#/models", "#/timings"):
            page.goto(f"{server.url}/{place}")
            expect(page.get_by_title("What the server does")).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") == 380, place
        navigation = page.get_by_role("navigation", name="Sessions")
        expect(navigation).not_to_be_visible()
        page.get_by_role("button", name="Sessions").click()
        navigation.get_by_role("link", name="Imported").first.click()
        expect(navigation).not_to_be_visible()
        expect(page.get_by_label("You")).to_be_visible()


def test_a_key_is_asked_for_and_stays_out_of_urls(browser: Browser, server: WebServer) -> None:
    with (
        GatewayProcess(server.address, "--api-key", KEY) as locked,
        browser.new_context() as context,
    ):
        page = context.new_page()
        asked: list[Request] = []
        page.on("request", lambda request: asked.append(request))
        page.goto(locked.url)
        dialog = page.get_by_role("dialog", name="This server wants an API key")
        dialog.get_by_label("API key").fill("wrong-wrong-wrong")
        dialog.get_by_role("button", name="Continue").click()
        expect(dialog).to_contain_text("is wrong")
        dialog.get_by_label("API key").fill(KEY)
        dialog.get_by_role("button", name="Continue").click()
        expect(page.get_by_text("Ready", exact=True)).to_be_visible()
        page.get_by_role("button", name="New chat", exact=True).click()
        say(page, "Hello!")
        page.reload()
        expect(page.get_by_label("You")).to_contain_text("Hello!")
        assert not any(KEY in request.url for request in asked)
        assert any(request.headers.get("authorization") == f"Bearer {KEY}" for request in asked)
        assert KEY not in page.evaluate("JSON.stringify(localStorage)")


def test_a_worker_that_dies_costs_no_more_than_a_pause(
    open_page: OpenPage, new_session: NewSession, server: WebServer
) -> None:
    page = open_page(new_session("chat", temperature=0, ignore_eos=True))
    page.get_by_label("Message", exact=True).fill("Tell me something about cats.")
    page.keyboard.press("Enter")
    wait_written(page, "[aria-label=Answer] .markdown")
    with server.without_new_workers():
        server.process.workers()[-1].kill()
        expect(page.get_by_text("The server is replacing its workers")).to_be_visible()
        answer = page.get_by_label("Answer", exact=True)
        part = answer.locator(".markdown").inner_text()
        assert part
    expect(answer.locator(".markdown")).not_to_have_text(part, timeout=RESTART_TIMEOUT_MS)
    wait_idle(page)
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(answer).to_have_count(1)
