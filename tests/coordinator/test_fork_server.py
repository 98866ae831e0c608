"""The fork server and what it forks, as real processes; whole servers are in tests/e2e."""

import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from coordinator.fork_server import (
    FORK_SERVER_COMMAND,
    AdoptedProcess,
    ForkServer,
    ForkServerLostError,
)
from coordinator.supervisor import Supervisor
from shared.errors import WorkerLostError
from tests.e2e.server import wait_until

PR_SET_CHILD_SUBREAPER = 36
SLEEPING_WORKER = (sys.executable, "-c", "import time; time.sleep(60)")
STUCK_FORK_SERVER = (sys.executable, "-c", "import os, time; os.fork(); time.sleep(60)")
"""It has forked a worker, and never says so."""


@pytest.fixture(scope="module", autouse=True)
def adopting_ends() -> Iterator[None]:
    """Orphans of later tests are not for this process."""
    yield
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    started = ForkServer(FORK_SERVER_COMMAND)
    yield started
    assert started.close() == -signal.SIGKILL


Fork = Callable[..., list[AdoptedProcess]]


@pytest.fixture
def fork(fork_server: ForkServer) -> Iterator[Fork]:
    """Fork workers with these arguments; those that are left end with the test."""
    forked: list[AdoptedProcess] = []

    def ask(*workers: list[str], shm_fd: int | None = None) -> list[AdoptedProcess]:
        fork_server.ask(workers, shm_fd)
        assert select.select([fork_server], [], [], 60)[0]
        forked.extend(answer := fork_server.answer())
        return answer

    yield ask
    for process in forked:
        process.kill()
        process.wait()


def worker_arguments(rank: int, folder: Path) -> list[str]:
    """Of a worker that waits for a coordinator that does not come."""
    address = f"ipc://{folder}/workers"
    return [
        *("--rank", str(rank), "--epoch", "1", "--connect", address, "--parent", str(os.getpid()))
    ]


def is_named(process: AdoptedProcess, arguments: list[str]) -> bool:
    expected = [sys.executable, "-P", "-m", "worker", *arguments]
    return psutil.Process(process.pid).cmdline() == expected


def test_a_forked_worker_is_a_child_with_a_name_and_a_group_of_its_own(
    fork: Fork, short_path: Path
) -> None:
    arguments = [worker_arguments(rank, short_path) for rank in range(2)]
    workers = fork(*arguments)
    for worker, own in zip(workers, arguments, strict=True):
        assert psutil.Process(worker.pid).ppid() == os.getpid()
        assert os.getpgid(worker.pid) == worker.pid
        assert wait_until(lambda worker=worker, own=own: is_named(worker, own), 10)  # type: ignore[misc]


def test_a_command_line_that_has_no_room_is_cut(fork: Fork, short_path: Path) -> None:
    arguments = [*worker_arguments(0, short_path), "--log-level", "i" * 5000]
    (worker,) = fork(arguments)
    assert worker.wait(10) == 1  # there is no such log level; but it came that far


def test_the_shared_memory_reaches_a_worker(fork: Fork, short_path: Path) -> None:
    region = os.memfd_create("a-region-of-the-test")
    (worker,) = fork(worker_arguments(0, short_path), shm_fd=region)
    os.close(region)
    inherited = Path(f"/proc/{worker.pid}/fd")

    def has_the_region() -> bool:
        links = []
        for link in inherited.iterdir():
            with suppress(FileNotFoundError):  # it opens and closes others meanwhile
                links.append(str(link.readlink()))
        return sum("a-region-of-the-test" in link for link in links) == 1

    assert has_the_region()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_signal_that_ended_a_worker_is_known(
    how: signal.Signals, fork: Fork, short_path: Path
) -> None:
    (worker,) = fork(worker_arguments(0, short_path))
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(0.05)
    os.kill(worker.pid, how)
    assert worker.wait(10) == worker.wait() == -how
    worker.kill()  # does nothing: the number may be another process's by now
    assert not psutil.pid_exists(worker.pid)


def test_the_exit_code_of_a_worker_is_known(fork: Fork) -> None:
    (worker,) = fork(["--rank", "none"])
    assert worker.wait(10) == 2


def test_nothing_is_started_in_the_fork_server(fork: Fork, short_path: Path) -> None:
    (worker,) = fork(worker_arguments(0, short_path))
    (server,) = (
        process
        for process in psutil.Process().children()
        # What it has forked bears its name until it has given itself another.
        if process.pid != worker.pid and "worker.fork_server" in process.cmdline()
    )
    assert server.num_threads() == 1
    libraries = {Path(mapped.path).name for mapped in server.memory_maps()}
    assert any(name.startswith("libtorch") for name in libraries)
    assert not server.children()
    worker.kill()


def test_a_fork_server_that_ends_is_noticed() -> None:
    fork_server = ForkServer((sys.executable, "-c", "raise SystemExit(3)"))
    assert select.select([fork_server], [], [], 30)[0]
    with pytest.raises(ForkServerLostError):
        fork_server.answer()
    assert fork_server.close() == 3


def test_workers_that_were_not_handed_over_end_with_the_fork_server() -> None:
    before = set(psutil.Process().children(recursive=True))
    fork_server = ForkServer(STUCK_FORK_SERVER)

    def made() -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True)) - before

    assert wait_until(lambda: len(made()) == 2, 30)
    both = made()
    fork_server.close()
    assert not made()
    assert not any(process.is_running() for process in both)


def test_where_there_can_be_no_fork_server_workers_are_started_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    supervisor = Supervisor("info", SLEEPING_WORKER, ("/no/such/program",))
    supervisor.start(2, 1, "ipc://nowhere", None)
    assert [worker.rank for worker in supervisor.workers] == [0, 1]
    pids = [worker.process.pid for worker in supervisor.workers]
    os.kill(pids[1], signal.SIGTERM)
    assert select.select([supervisor], [], [], 10)[0]
    with pytest.raises(WorkerLostError, match=rf"worker 1 \(pid {pids[1]}\) was killed by SIGTERM"):
        supervisor.notice()
    supervisor.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    lines = {record.getMessage() for record in caplog.records}
    assert len(lines) == 1
    assert "without a fork server" in lines.pop()


def test_workers_that_a_lost_fork_server_owed_are_started_without_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    supervisor = Supervisor("info", SLEEPING_WORKER, STUCK_FORK_SERVER)
    (server,) = (p for p in psutil.Process().children() if p.cmdline()[1:2] == ["-c"])
    supervisor.start(2, 1, "ipc://nowhere", None)
    assert not supervisor.workers
    assert wait_until(lambda: bool(server.children()), 30)
    server.children()[0].kill()  # it has the socket, too
    server.kill()
    assert select.select([supervisor], [], [], 10)[0]
    supervisor.notice()
    assert [worker.rank for worker in supervisor.workers] == [0, 1]
    assert "these workers are started without it" in caplog.text
    supervisor.close()
    assert not server.is_running()


def test_stopping_ends_workers_that_were_asked_for() -> None:
    before = set(psutil.Process().children(recursive=True))
    supervisor = Supervisor("info", SLEEPING_WORKER, STUCK_FORK_SERVER)
    supervisor.start(2, 1, "ipc://nowhere", None)
    supervisor.stop(grace_s=0.0)
    assert set(psutil.Process().children(recursive=True)) == before
    supervisor.close()
