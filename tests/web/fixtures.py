"""A real server with the demo models, and a real browser before its page."""

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from shared.config import PROJECT_ROOT
from tests.web.pages import WebServer

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_MS = 60_000
"""Generous: what is waited for comes in a moment, but not when other programs have the machine."""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    started = WebServer(tmp_path_factory.mktemp("web"))
    yield started
    started.process.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as playwright:
        # Chromium's own sandbox does not work for root, as whom containers often run.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        launched = playwright.chromium.launch(executable_path=found, args=arguments)
        expect.set_options(timeout=TIMEOUT_MS)
        yield launched
        launched.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    with browser.new_context(permissions=["clipboard-write"]) as made:
        made.set_default_timeout(TIMEOUT_MS)
        yield made


@pytest.fixture
def open_page(context: BrowserContext, server: WebServer) -> Iterator[Callable[[str], Page]]:
    """Open the page at a hash. No script may fail in it, nor break the Content-Security-Policy."""
    complaints: list[str] = []

    def hear(text: str) -> None:
        # The browser's own note of a request that was refused, or that nobody answered.
        if "Failed to load resource" not in text:
            complaints.append(text)

    def at(place: str = "#/") -> Page:
        page = context.new_page()
        page.on("pageerror", lambda error: hear(str(error)))
        page.on("console", lambda said: hear(said.text) if said.type == "error" else None)
        page.goto(f"{server.url}/{place}")
        return page

    yield at
    assert complaints == []


@pytest.fixture(scope="session")
def api(server: WebServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
def new_session(api: httpx.Client) -> Callable[..., str]:
    """Make a session of a kind with sampling parameters; the hash of its page."""

    def make(kind: str, **params: Any) -> str:
        answer = api.post("/api/sessions", json={"kind": kind, "params": params})
        assert answer.status_code == 201, answer.text
        return f"#/{kind}/{answer.json()['session']['id']}"

    return make


@pytest.fixture
def import_answer(api: httpx.Client) -> Callable[[str], str]:
    """Make a chat whose one answer is a text; the hash of its page."""

    def make(text: str) -> str:
        question = {
            "parent": None,
            "role": "user",
            "content": "Say it",
            "created": 1.0,
            "selected": 1,
        }
        answer = {"parent": 0, "role": "assistant", "content": text, "created": 2.0}
        made = api.post(
            "/api/sessions/import",
            json={
                "format": "tpserve session 1",
                "kind": "chat",
                "title": "Imported",
                "model": None,
                "system": None,
                "params": {},
                "created": 1.0,
                "updated": 2.0,
                "root": 0,
                "leaf": 1,
                "messages": [question, answer],
            },
        )
        assert made.status_code == 201, made.text
        return f"#/chat/{made.json()['session']['id']}"

    return make


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core."""
    script = PROJECT_ROOT / "gateway" / "webui" / "node_modules" / "axe-core" / "axe.min.js"
    if not script.is_file():
        pytest.skip("axe-core is not installed: npm ci in gateway/webui")
    return script.read_text(encoding="utf-8")
