"""The server of the page's tests, and what they do with the page again and again."""

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from playwright.sync_api import Page, expect

from tests.e2e.server import Server
from tests.processes import suspended


class WebServer:
    """`tpserve serve` whose sessions and address outlive it."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._arguments = (
            *("--workers", "2", "--threads-per-worker", "1"),
            *("--http", f"127.0.0.1:{port}", "--database", f"sqlite:///{folder / 'tpserve.db'}"),
        )
        self.url = f"http://127.0.0.1:{port}"
        self.start()

    def start(self) -> None:
        """Return when it answers."""
        # The slowest kernels: the demo models are done with 900 tokens before a test can look.
        self.process = Server(*self._arguments, env={"TPSERVE_ISA": "scalar"})
        self.address = self.process.wait_ready()
        assert self.process.http_url() == self.url

    def kill(self) -> None:
        """End it without giving it the time to store anything."""
        self.process.process.kill()
        self.process.stop()

    def gateway(self) -> psutil.Process:
        """The process that serves the page."""
        children = psutil.Process(self.process.process.pid).children()
        (found,) = (child for child in children if "gateway" in child.cmdline())
        return found

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Nothing is computed meanwhile: an answer that is asked for does not end."""
        with suspended(self.process.workers()):
            yield

    @contextmanager
    def not_answering(self) -> Iterator[None]:
        """Requests of the page arrive, and are answered afterwards only."""
        with suspended([self.gateway()]):
            yield

    @contextmanager
    def in_mid_answer(self, page: Page, selector: str, begin: Callable[[], None]) -> Iterator[None]:
        """What `begin` asks for has its first words in the page, and gets no more meanwhile."""
        workers = self.process.workers()
        with suspended(workers):
            begin()
            words = page.locator(selector)
            while not words.count() or len(words.first.inner_text().strip()) <= 8:
                for worker in workers:
                    worker.resume()
                page.wait_for_timeout(50)
                for worker in workers:
                    worker.suspend()
                page.wait_for_timeout(200)
            yield

    @contextmanager
    def without_new_workers(self) -> Iterator[None]:
        """Those that are lost meanwhile are replaced at the end only."""
        children = psutil.Process(self.process.process.pid).children()
        with suspended([c for c in children if "worker.fork_server" in c.cmdline()]):
            yield


def say(page: Page, text: str) -> str:
    """Send a message and wait for its whole answer; its text."""
    before = page.get_by_label("Answer", exact=True).count()
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    answers = page.get_by_label("Answer", exact=True)
    expect(answers).to_have_count(before + 1)
    wait_idle(page)
    return answers.last.locator(".markdown").inner_text()


def wait_idle(page: Page) -> None:
    """Until no turn runs."""
    expect(page.locator("[aria-busy=true]")).to_have_count(0)
    expect(page.get_by_role("button", name="Stop", exact=True)).to_have_count(0)


def wait_written(page: Page, selector: str) -> None:
    """Until some words are there; looks at every frame, for the demo models are done in seconds."""
    # Not wait_for_function: it would need eval, which the page's Content-Security-Policy forbids.
    page.evaluate(
        """selector => new Promise(written => {
            const look = () => document.querySelector(selector)?.textContent.trim().length > 8
                ? written() : requestAnimationFrame(look);
            look();
        })""",
        selector,
    )


def session_of(page: Page) -> int:
    """The id in the page's address."""
    found = re.search(r"#/(?:chat|story)/(\d+)", page.url)
    assert found, page.url
    return int(found[1])
