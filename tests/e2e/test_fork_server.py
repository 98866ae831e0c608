"""A server whose workers are forked: what its users and its operators see of that."""

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from client.zmq_client import Client
from tests.e2e.server import Server, wait_until


@pytest.fixture(scope="module")
def server(story_model: Path) -> Iterator[Server]:
    with Server("--workers", "2", "--model", f"story={story_model}") as started:
        yield started


@pytest.fixture(scope="module")
def address(server: Server) -> str:
    return server.wait_ready()


def fork_servers(server: Server) -> list[psutil.Process]:
    return [p for p in children(server) if "worker.fork_server" in p.cmdline()]


def children(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def no_zombies(server: Server) -> bool:
    return all(p.status() != psutil.STATUS_ZOMBIE for p in children(server))


def wait_epoch(client: Client, epoch: int) -> None:
    """Until the workers of that epoch are ready."""
    assert wait_until(lambda: client.health().ready and client.status().epoch == epoch, 60)


def test_workers_share_what_they_have_imported(server: Server, address: str) -> None:
    with Client(address) as client:
        client.story("The", max_tokens=8).result()
        told = [worker.memory_bytes for worker in client.status().workers]
    for process, memory_bytes in zip(server.workers(), told, strict=True):
        memory = process.memory_full_info()
        assert memory_bytes == pytest.approx(memory.uss, rel=0.1)
        assert memory.uss < memory.rss / 2


def test_a_lost_worker_is_named_and_all_are_forked_anew(server: Server, address: str) -> None:
    (fork_server,) = fork_servers(server)
    with Client(address) as client:
        epoch = client.status().epoch
        victim = server.workers()[1]
        victim.send_signal(signal.SIGTERM)
        wait_epoch(client, epoch + 1)
    assert any(f"worker 1 (pid {victim.pid}) was killed by SIGTERM" in line for line in server.log)
    assert fork_servers(server) == [fork_server]
    assert len(children(server)) == 3
    assert no_zombies(server)


def test_a_lost_fork_server_harms_nobody_and_gets_a_successor(server: Server, address: str) -> None:
    (fork_server,) = fork_servers(server)
    with Client(address) as client:
        epoch, workers = client.status().epoch, server.workers()
        fork_server.kill()
        assert wait_until(lambda: not fork_server.is_running(), 5)
        assert client.story("The", max_tokens=3, temperature=0).result().token_ids
        assert client.status().epoch == epoch
        assert server.workers() == workers
        assert any("fork server was killed by SIGKILL" in line for line in server.log)
        workers[0].kill()
        wait_epoch(client, epoch + 1)
        assert client.story("The", max_tokens=3, temperature=0).result().token_ids
    assert len(fork_servers(server)) == 1
    assert no_zombies(server)


def test_a_fork_server_that_is_killed_at_the_start_is_done_without(story_model: Path) -> None:
    with Server("--workers", "2", "--model", f"story={story_model}") as server:
        assert wait_until(lambda: bool(fork_servers(server)), 30)
        fork_servers(server)[0].kill()
        with Client(server.wait_ready()) as client:
            assert client.story("The", max_tokens=3, temperature=0).result().token_ids
        assert any("fork server was killed by SIGKILL" in line for line in server.log)
        assert len(server.workers()) == 2
        assert no_zombies(server)
