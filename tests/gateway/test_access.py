"""Who may come in: keys, names, origins, sizes, times, numbers."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai as sdk
import pytest

from tests.conftest import PROJECT
from tests.e2e.server import wait_until
from tests.gateway.process import GatewayProcess

KEY, HASHED, PLAIN = "first-secret-key", "second-secret-key", "third-secret-key"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def locked(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with keys from all sources, and small limits."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    digest = hashlib.sha256(HASHED.encode()).hexdigest()
    file.write_text(f"# who: what\nann: {digest}\n\nbob:{PLAIN}\n")
    with GatewayProcess(
        address,
        *("--api-key-file", str(file), "--max-body", "2K", "--max-connections", "8"),
        *("--header-timeout", "1", "--body-timeout", "1", "--log-format", "json"),
        *("--allowed-host", "tp.example.org", "--cors-origin", "https://page.example.org"),
        env={"TPSERVE_API_KEYS": f"{KEY},another-secret"},
    ) as started:
        yield started


@pytest.fixture(scope="module")
def http(locked: GatewayProcess) -> Iterator[httpx.Client]:
    with locked.http(headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


def raw(locked: GatewayProcess, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", locked.port), timeout=30)
    connection.sendall(data)
    return connection


def test_every_source_of_keys_opens_the_door(locked: GatewayProcess) -> None:
    for key in (KEY, "another-secret", HASHED, PLAIN):
        with locked.openai(key) as client:
            assert [model.id for model in client.models.list()] == ["story", "chat"]


def test_without_a_key_or_with_a_wrong_one_nothing_but_health_answers(
    locked: GatewayProcess,
) -> None:
    digest = hashlib.sha256(HASHED.encode()).hexdigest()
    with locked.http() as http:
        for path in ("/v1/models", "/metrics", "/version", "/api/models", "/nowhere", "/health"):
            answer = http.get(path)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert "missing" in answer.json()["error"]["message"]
        assert http.post("/v1/chat/completions", json={}).status_code == 401
        for header in (
            f"Bearer {KEY}x",
            f"Bearer {digest}",
            f"Basic {KEY}",
            KEY,
            "Bearer",
            "Bearer é",
        ):
            sent = [(b"Authorization", header.encode())]
            assert http.get("/v1/models", headers=sent).status_code == 401
        assert http.get("/health/live").json() == {"status": "live"}
        assert http.get("/health/ready").json() == {"status": "ready"}
    with locked.openai("wrong-wrong-wrong") as client, pytest.raises(sdk.AuthenticationError):
        client.models.list()


def test_a_name_that_points_here_is_refused_unless_it_is_ours(http: httpx.Client) -> None:
    for host in ("evil.example.com", "localhost.evil.com", "127.0.0.1.evil.com", "", "[::1", "a b"):
        answer = http.get("/health/live", headers={"Host": host})
        assert answer.status_code in (400, 403), host
    refused = http.get("/health/live", headers={"Host": "evil.example.com:8000"})
    assert refused.status_code == 403
    assert "--allowed-host" in refused.json()["error"]["message"]
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000", "TP.example.org", "192.168.7.7:8000"):
        assert http.get("/health/live", headers={"Host": host}).status_code == 200, host


def test_pages_of_other_origins_are_refused(http: httpx.Client) -> None:
    for origin in ("https://evil.example.com", "null", "http://localhost:1"):
        answer = http.get("/v1/models", headers={"Origin": origin})
        assert answer.status_code == 403, origin
        assert "--cors-origin" in answer.json()["error"]["message"]
        assert "access-control-allow-origin" not in answer.headers
    own = str(http.base_url).rstrip("/")
    assert http.get("/v1/models", headers={"Origin": own}).status_code == 200


def test_an_allowed_origin_gets_its_cors_answers(locked: GatewayProcess) -> None:
    origin = "https://page.example.org"
    with locked.http() as http:  # a browser asks first, and without the key
        asked = http.options(
            "/v1/chat/completions",
            headers={
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization, content-type",
            },
        )
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == origin
        got = http.get("/v1/models", headers={"Origin": origin, "Authorization": f"Bearer {KEY}"})
        assert got.status_code == 200
        assert got.headers["access-control-allow-origin"] == origin


def test_without_cors_origins_no_answer_has_cors_headers(gateway: GatewayProcess) -> None:
    with gateway.http() as http:
        answer = http.get("/v1/models", headers={"Origin": gateway.url})
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert http.options("/v1/models", headers={"Origin": "https://a.b"}).status_code == 403


def test_a_body_over_the_limit_is_refused_declared_or_not(http: httpx.Client) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"model": "'
        for _ in range(3):
            yield b"x" * 1000

    for content in (b" " * 2049, pieces()):
        answer = http.post("/v1/completions", content=content, headers=JSON)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
        assert "2048" in answer.json()["error"]["message"]
    assert http.post("/v1/completions", content=b" " * 2048, headers=JSON).status_code == 400


def test_headers_that_are_too_long_or_too_slow_end_the_connection(locked: GatewayProcess) -> None:
    with raw(locked, b"GET / HTTP/1.1\r\nX: " + b"y" * 20_000) as long:
        assert long.recv(100).startswith(b"HTTP/1.1 400")
    started = time.monotonic()
    with raw(locked, b"GET / HTTP/1.1\r\n") as slow:
        while True:
            try:
                slow.sendall(b"X: y\r\n")  # a line at a time does not buy more time
            except OSError:
                break
            assert time.monotonic() - started < 10
            time.sleep(0.1)
    assert time.monotonic() - started > 0.8


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused_in_the_shape_of_all_errors(
    locked: GatewayProcess, request_bytes: bytes
) -> None:
    with raw(locked, request_bytes) as connection:
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request")
    assert json.loads(body)["error"]["code"] == "invalid_value"
    with locked.http() as http:  # so that what there is to log of the other has been logged
        assert http.get("/health/live").status_code == 200
    assert not any("traceback" in line.lower() for line in list(locked.log))


def test_a_body_that_does_not_come_is_given_up(locked: GatewayProcess) -> None:
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    with raw(locked, head.encode()) as connection:
        answer = b""
        while b"request_timeout" not in answer:
            piece = connection.recv(4096)
            assert piece, answer
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408")


def test_too_many_connections_are_turned_away_and_room_comes_back(locked: GatewayProcess) -> None:
    open_ones = [raw(locked, b"G") for _ in range(8)]
    last = raw(locked, b"")
    answer = last.recv(4096)
    assert answer.startswith(b"HTTP/1.1 429")
    assert b"connections are open" in answer
    for connection in (*open_ones, last):
        connection.close()

    def answers() -> bool:
        with locked.http() as http:
            return http.get("/health/live").status_code == 200

    assert wait_until(answers, 5)


def test_log_lines_are_json_and_name_the_request_its_user_and_its_key(
    locked: GatewayProcess,
) -> None:
    with locked.http(headers={"Authorization": f"Bearer {PLAIN}"}) as http:
        body = {"model": "story", "prompt": "Once", "max_tokens": 2, "user": "u-7"}
        headers = {"X-Request-Id": "log-me"}
        assert http.post("/v1/completions", json=body, headers=headers).status_code == 200

    def found() -> list[dict[str, object]]:
        lines = [json.loads(line) for line in list(locked.log)]
        return [line for line in lines if line.get("request_id") == "log-me"]

    assert wait_until(lambda: bool(found()), 5)
    (line,) = found()
    assert line["message"] == "request"
    assert (line["key"], line["user"], line["model"]) == ("bob", "u-7", "story")
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert not any(secret in text for secret in (KEY, HASHED, PLAIN) for text in locked.log)


def run_gateway(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    run = subprocess.run(
        [sys.executable, "-P", "-m", "gateway", "--http", "127.0.0.1:0", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(PROJECT), **(env or {})},
    )
    assert run.stdout == ""
    return run.returncode, run.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--http", "0.0.0.0:0"], ["0.0.0.0", "--api-key"]),
        (["--http", "8000"], ["'8000'", "HOST:PORT"]),
        (["--http", "127.0.0.1:99999"], ["99999", "HOST:PORT"]),
        (["--http", "203.0.113.5:0", "--api-key", "secret-secret"], ["203.0.113.5", "--http"]),
        (["--max-body", "big"], ["'big'", "512M"]),
        (["--max-body", "0"], ["max_body", "'0'"]),
        (["--ping", "0"], ["ping (flag --ping)", "'0'", "> 0"]),
        (["--log-format", "xml"], ["log_format", "'xml'"]),
        (["--api-key", "short"], ["api_key number 1", "8"]),
        (["--api-key-file", "/does/not/exist"], ["/does/not/exist", "No such file"]),
        (["--cors-origin", "*"], ["'*'", "https://example.org"]),
    ],
)
def test_a_bad_setting_is_one_clear_line(arguments: list[str], words: list[str]) -> None:
    code, text = run_gateway(*arguments)
    assert code == 2
    assert text.count("\n") == 1
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("justakey-justakey\n", ["line 1", "name:KEY"]),
        ("a:long-enough-1\na:long-enough-2\n", ["line 2", "'a'", "twice"]),
        ("a:short\n", ["'a'", "8"]),
        ("# nothing\n", ["no keys"]),
    ],
)
def test_a_bad_key_file_is_one_clear_line_without_the_key(
    tmp_path: Path, content: str, words: list[str]
) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    code, text = run_gateway("--api-key-file", str(file))
    assert code == 2
    for word in words:
        assert word in text
    assert "justakey" not in text


def test_a_port_that_is_taken_is_one_clear_line(gateway: GatewayProcess) -> None:
    code, text = run_gateway("--http", f"127.0.0.1:{gateway.port}")
    assert code == 2
    assert text.count("\n") == 1
    assert "in use" in text
