"""The HTTP API that `tpserve serve` starts beside itself."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.server import TPSERVE, Server, run_tpserve, wait_until

SMALL = ("--threads-per-worker", "1", "--kv-memory", "64M")


def get(url: str) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=30) as client:
        return client.get(url)


def gateways(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children()
    alive = [p for p in children if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in alive if "gateway" in p.cmdline()]


def test_a_server_has_an_http_api_that_ends_with_it() -> None:
    with Server(*SMALL, "--http", "127.0.0.1:0") as server:
        server.wait_ready()
        url = server.http_url()
        assert get(f"{url}/health/ready").json() == {"status": "ready"}
        assert [m["id"] for m in get(f"{url}/v1/models").json()["data"]] == ["story", "chat"]
        (gateway,) = gateways(server)
        assert server.stop() == 0
        assert not gateway.is_running()
        with pytest.raises(httpx.ConnectError):
            get(f"{url}/health/live")


def test_a_gateway_that_dies_is_started_again_at_the_same_address() -> None:
    with Server(*SMALL, "--http", "127.0.0.1:0") as server:
        server.wait_ready()
        url = server.http_url()
        assert get(f"{url}/health/live").status_code == 200
        for _ in range(2):
            (gateway,) = gateways(server)
            gateway.kill()
            gateway.wait(10)
            # The socket is open all the time: this request waits for the next gateway.
            assert get(f"{url}/health/live").status_code == 200
    assert sum("it is started again" in line for line in server.log) == 2


def test_a_gateway_does_not_outlive_a_killed_coordinator() -> None:
    with Server(*SMALL, "--http", "127.0.0.1:0") as server:
        server.wait_ready()
        assert get(f"{server.http_url()}/health/live").status_code == 200
        (gateway,) = gateways(server)
        server.process.send_signal(signal.SIGKILL)
        assert wait_until(lambda: not gateway.is_running(), 5)


def test_a_chosen_address_that_is_taken_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        run = run_tpserve(["serve", "--listen", "tcp://127.0.0.1:*", "--http", address])
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    for word in (address, "in use", "--http"):
        assert word in run.stderr


def test_an_address_that_strangers_reach_needs_a_key() -> None:
    run = run_tpserve(["serve", "--listen", "tcp://127.0.0.1:*", "--http", "0.0.0.0:0"])
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "TPSERVE_API_KEYS" in run.stderr
    with Server(*SMALL, "--http", "0.0.0.0:0", env={"TPSERVE_API_KEYS": "sesame-sesame"}) as server:
        server.wait_ready()
        port = server.http_url().rpartition(":")[2]
        assert get(f"http://127.0.0.1:{port}/v1/models").status_code == 401


def test_the_default_port_gives_way_when_it_is_taken(tmp_path: Path) -> None:
    holder = socket.socket()
    try:
        holder.bind(("127.0.0.1", 8000))
        holder.listen()
    except OSError:
        pass  # somebody else has it: just as well
    log = tmp_path / "log"
    with holder, log.open("w") as stderr:
        process = subprocess.Popen(
            [TPSERVE, "serve", "--listen", "tcp://127.0.0.1:*", *SMALL],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "TPSERVE_HTTP"},
        )
        try:
            assert process.stdout is not None
            with process.stdout as output:
                assert output.readline().startswith("ready ")
                url = output.readline().split()[1]
            assert not url.endswith(":8000")
            assert get(f"{url}/health/live").status_code == 200
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
    assert "port 8000 is taken" in log.read_text()


def test_settings_that_the_gateway_refuses_leave_the_server_without_http() -> None:
    with Server(*SMALL, "--http", "127.0.0.1:0", env={"TPSERVE_HTTP_PING": "never"}) as server:
        server.wait_ready()
        url = server.http_url()

        def refused() -> bool:
            with httpx.Client(trust_env=False, timeout=1) as client:
                try:
                    client.get(url)
                except httpx.ConnectError:
                    return True
                except httpx.TransportError:
                    return False
            return False

        assert wait_until(refused, 20)
    assert any("ping (environment TPSERVE_HTTP_PING) is 'never'" in line for line in server.log)
    assert any("there is no HTTP API" in line for line in server.log)
