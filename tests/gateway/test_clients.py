"""Clients that go away or do not read, and the servers behind and before them."""

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from client.zmq_client import Client
from tests.e2e.server import Server, wait_until
from tests.gateway.process import GatewayProcess
from tests.processes import suspended

ENDLESS: dict[str, Any] = {"model": "story", "prompt": "Once", "ignore_eos": True, "stream": True}
"""With max_tokens left to each test: the context is where it ends."""


def running(client: Client) -> int:
    status = client.status()
    return status.running + sum(status.queued.values())


def raw_post(
    port: int,
    body: dict[str, Any],
    receive_buffer: int | None = None,
    path: str = "/v1/completions",
) -> socket.socket:
    """Send a request over a plain socket; the answer is left unread."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", port))
    content = json.dumps(body).encode()
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return connection


def read_all(connection: socket.socket) -> bytes:
    """What still comes before the connection is closed or reset."""
    received = b""
    connection.settimeout(30)
    with connection, contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            received += piece
    return received


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_job(
    gateway: GatewayProcess, address: str, stream: bool
) -> None:
    body = {**ENDLESS, "n": 64, "max_tokens": 400, "logprobs": 20, "stream": stream}
    with Client(address) as client:
        connection = raw_post(gateway.port, body)
        assert wait_until(lambda: running(client) > 0, 10)
        connection.close()
        gone_at = time.monotonic()
        assert wait_until(lambda: running(client) == 0, 10)
        assert time.monotonic() - gone_at < 5


@pytest.mark.slow
def test_a_client_that_does_not_read_is_cut_off_and_others_are_not_slowed(
    address: str,
) -> None:
    body = {**ENDLESS, "n": 64, "max_tokens": 400, "logprobs": 20}
    with GatewayProcess(address, "--slow-reader", "2") as gateway, Client(address) as client:
        lazy = raw_post(gateway.port, body, receive_buffer=4096)
        assert wait_until(lambda: running(client) > 0, 10)
        with gateway.http() as http:
            other = http.post(
                "/v1/completions", json={**ENDLESS, "max_tokens": 100, "temperature": 0}
            )
            assert other.text.endswith("data: [DONE]\n\n")
            assert wait_until(lambda: running(client) == 0, 60)
            metrics = http.get("/metrics").text
        assert 'tpserve_http_streams_total{outcome="slow_reader"} 1.0' in metrics
        assert b"[DONE]" not in read_all(lazy)
    assert any("a client was cut off" in line for line in gateway.log)


def test_pings_come_while_nothing_else_does(address: str) -> None:
    crowd = {**ENDLESS, "n": 64, "max_tokens": 300}
    with GatewayProcess(address, "--ping", "0.05") as gateway, gateway.http() as http:
        # The places for running sequences are taken, so the next job has nothing to tell.
        first = raw_post(gateway.port, crowd)
        with Client(address) as client:
            assert wait_until(lambda: running(client) >= 64, 10)
        second = raw_post(gateway.port, {**ENDLESS, "n": 64, "max_tokens": 1})
        data = b""
        second.settimeout(30)
        while b": ping\n\n" not in data:
            piece = second.recv(4096)
            assert piece, data
            data += piece
        first.close()
        second.close()
        assert http.get("/health/live").status_code == 200


@pytest.fixture
def own_server() -> Iterator[Server]:
    with Server("--threads-per-worker", "1", "--kv-memory", "64M") as server:
        server.wait_ready()
        yield server


def test_a_coordinator_that_comes_back_is_found_again(own_server: Server) -> None:
    address = own_server.address
    with GatewayProcess(address) as gateway, gateway.http() as http:
        assert http.get("/health/ready").json() == {"status": "ready"}
        broken: list[str] = []

        def read() -> None:
            body = {**ENDLESS, "n": 64, "max_tokens": 400, "logprobs": 20}
            broken.append(http.post("/v1/completions", json=body).text)

        reader = threading.Thread(target=read)
        reader.start()
        with Client(address) as client:
            assert wait_until(lambda: running(client) > 0, 10)
        own_server.process.kill()
        own_server.process.wait()
        reader.join(20)
        last = json.loads(broken[0].rstrip().rpartition("data: ")[2])
        assert last["error"]["code"] == "connection_lost"
        refused = http.post("/v1/completions", json={"model": "story", "prompt": "Once"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "connection_lost"
        assert address in refused.json()["error"]["message"]
        assert http.get("/health/ready").status_code == 503
        assert http.get("/health/live").status_code == 200
        assert "tpserve_up 0.0" in http.get("/metrics").text
        with Server(
            *("--threads-per-worker", "1", "--kv-memory", "64M", "--listen", address)
        ) as again:
            again.wait_ready()
            assert wait_until(lambda: http.get("/health/ready").status_code == 200, 20)
            answer = http.post("/v1/completions", json={"model": "story", "prompt": "Once"})
            assert answer.status_code == 200


def test_a_full_queue_is_429_with_a_time_to_try_again() -> None:
    with (
        Server("--queue-limit", "1", "--max-num-seqs", "1", "--kv-memory", "64M") as server,
        GatewayProcess(server.wait_ready()) as gateway,
        Client(server.address) as client,
        gateway.http() as http,
        suspended(server.workers()),
    ):
        held = [raw_post(gateway.port, {**ENDLESS, "max_tokens": 400})]
        assert wait_until(lambda: client.status().running == 1, 20)
        held.append(raw_post(gateway.port, {**ENDLESS, "max_tokens": 400}))
        assert wait_until(lambda: running(client) == 2, 20)
        answer = http.post("/v1/completions", json={"model": "story", "prompt": "x"})
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "queue_full"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert int(answer.headers["retry-after"]) >= 1
        for connection in held:
            connection.close()


@pytest.mark.parametrize("grace", [30, 1])
def test_sigterm_lets_streams_finish_within_the_grace_period(address: str, grace: int) -> None:
    gateway = GatewayProcess(address, "--grace", str(grace))
    long = grace == 1
    body = {**ENDLESS, "max_tokens": 400 if long else 60, "n": 64 if long else 8}
    if long:
        body["logprobs"] = 20
    with Client(address) as client:
        connection = raw_post(gateway.port, body)
        assert wait_until(lambda: running(client) > 0, 10)
        gateway.process.terminate()
        received = read_all(connection)
        assert gateway.wait_exit(30) == 0
        assert (b"[DONE]" in received) is not long
        assert wait_until(lambda: running(client) == 0, 10)
    gateway.stop()
    assert not any("Traceback" in line for line in gateway.log), gateway.log


def test_a_request_id_leads_to_the_step_in_which_a_worker_was_lost() -> None:
    with (
        Server("--workers", "2", "--threads-per-worker", "1", "--kv-memory", "64M") as server,
        GatewayProcess(server.wait_ready()) as gateway,
        gateway.http() as http,
    ):
        body = {**ENDLESS, "n": 16, "max_tokens": 400}
        headers = {"X-Request-Id": "find-me"}
        with http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            pieces = answer.iter_bytes()
            next(pieces)
            server.workers()[1].kill()
            assert b"".join(pieces).endswith(b"data: [DONE]\n\n")

        def told() -> bool:
            return any(
                re.search(r"epoch 1, step \d+ of story was under way, with jobs find-me-", line)
                for line in list(server.log)
            )

        assert wait_until(told, 10), "".join(server.log)
