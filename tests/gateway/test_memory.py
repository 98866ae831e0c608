"""After a burst of streams the gateway is as it was before."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import psutil
import pytest

from tests.e2e.server import Server, wait_until
from tests.gateway.process import GatewayProcess

STREAMS = 500
BODY = (
    b'{"model": "story", "prompt": "Once", "max_tokens": 400, "ignore_eos": true, "stream": true}'
)
REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
)


@pytest.fixture
def gateway() -> Iterator[GatewayProcess]:
    """Before a server that takes so many jobs."""
    limits = ("--queue-limit", str(2 * STREAMS), "--queue-tokens", "1000000")
    with Server(*limits) as server, GatewayProcess(server.wait_ready()) as started:
        yield started


def burst(gateway: GatewayProcess) -> int:
    """Open all streams, wait until each has begun, and go away; bytes resident in the meantime."""
    process = psutil.Process(gateway.process.pid)
    with ExitStack() as connections:
        opened = []
        for _ in range(STREAMS):
            address = ("127.0.0.1", gateway.port)
            connection = connections.enter_context(socket.create_connection(address, timeout=60))
            connection.sendall(REQUEST)
            opened.append(connection)
        for connection in opened:
            assert connection.recv(12) == b"HTTP/1.1 200"
        return int(process.memory_info().rss)


@pytest.mark.slow
def test_a_burst_of_streams_leaves_no_descriptors_threads_or_memory_behind(
    gateway: GatewayProcess,
) -> None:
    process = psutil.Process(gateway.process.pid)
    with gateway.http() as http:  # what is loaded and cached by the first requests stays
        body = {"model": "story", "prompt": "Once", "max_tokens": 2}
        assert http.post("/v1/completions", json=body).status_code == 200

    def clients() -> list[str]:
        ours = [c for c in process.net_connections() if c.laddr.port == gateway.port]
        return [c.status for c in ours if c.status != psutil.CONN_LISTEN]

    assert wait_until(lambda: not clients(), 10)
    before = process.memory_info().rss, process.num_fds(), process.num_threads()
    highest = before[0] + max(burst(gateway) - before[0], 0) // 2
    assert highest > before[0] + 2_500_000, "or this test would ask for nothing"
    assert burst(gateway) > highest
    assert wait_until(lambda: process.num_fds() == before[1], 30)
    assert process.num_threads() == before[2]
    assert wait_until(lambda: process.memory_info().rss < highest, 30)
