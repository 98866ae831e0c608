"""The files of the web page as the gateway gives them."""

import gzip
import re
from collections.abc import Iterator

import httpx
import pytest

from gateway.web_page import FOLDER
from tests.gateway.process import GatewayProcess

LARGEST_BUNDLE_BYTES = 200_000
"""Of all files of the page, as they are sent."""


@pytest.fixture(scope="module")
def locked(address: str) -> Iterator[httpx.Client]:
    """A gateway that wants a key, asked without one."""
    with (
        GatewayProcess(address, "--api-key", "open-sesame-open") as gateway,
        gateway.http() as http,
    ):
        yield http


def assets(http: httpx.Client) -> list[str]:
    return re.findall(r'(?:src|href)="(/assets/[^"]+)"', http.get("/").text)


def test_the_page_needs_no_key_and_nothing_else_comes_with_it(locked: httpx.Client) -> None:
    for path in ("/", "/index.html", "/icon.svg", *assets(locked)):
        assert locked.get(path).status_code == 200, path
    for path in ("/api/sessions", "/api/status", "/v1/models", "/assets/other.js", "/assets/"):
        assert locked.get(path).status_code == 401, path
    assert locked.post("/").status_code == 405


def test_nothing_of_it_may_run_that_the_server_did_not_send(http: httpx.Client) -> None:
    for path in ("/", *assets(http)):
        headers = http.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    text = http.get("/").text
    assert "<style" not in text
    assert re.findall(r"<script[^>]*>[^<]", text) == []
    # And nothing is asked of anyone else.
    assert re.findall(r'(?:src|href)="(?!/)', text) == []


def test_browsers_keep_what_cannot_change_and_ask_for_the_rest(http: httpx.Client) -> None:
    page = http.get("/")
    assert page.headers["cache-control"] == "no-cache"
    again = http.get("/", headers={"If-None-Match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    for path in assets(http):
        assert "immutable" in http.get(path).headers["cache-control"]


def test_it_is_sent_compressed_to_those_who_can_read_that(http: httpx.Client) -> None:
    for path in ("/", *assets(http)):
        plain = http.get(path, headers={"Accept-Encoding": "identity"})
        small = http.get(path, headers={"Accept-Encoding": "gzip"})
        assert "content-encoding" not in plain.headers
        assert small.headers["content-encoding"] == "gzip"
        assert small.headers["vary"] == "Accept-Encoding"
        assert small.content == plain.content
        head = http.head(path, headers={"Accept-Encoding": "identity"})
        assert head.content == b""
        assert int(head.headers["content-length"]) == len(plain.content)


def test_an_unknown_file_is_an_ordinary_error(http: httpx.Client) -> None:
    for path in ("/assets/nothing.js", "/assets/..%2findex.html", "/src/main.ts"):
        assert http.get(path).json()["error"]["code"] == "unknown_url", path


def test_all_of_it_is_small() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(len(gzip.compress(path.read_bytes())) for path in files) < LARGEST_BUNDLE_BYTES
