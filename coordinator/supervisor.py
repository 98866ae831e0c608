"""The worker processes of one epoch: start them, notice when one ends, end them all."""

import contextlib
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from coordinator.fork_server import (
    FORK_SERVER_COMMAND,
    AdoptedProcess,
    ForkServer,
    ForkServerLostError,
)
from shared.errors import WorkerLostError
from shared.processes import describe_exit

# -P: a folder called `worker` where the server is started must not be taken for ours.
WORKER_COMMAND = (sys.executable, "-P", "-m", "worker")

log = logging.getLogger("coordinator.supervisor")


@dataclass(frozen=True)
class WorkerProcess:
    """A running worker; `pidfd` becomes readable when it ends."""

    rank: int
    process: subprocess.Popen[bytes] | AdoptedProcess
    pidfd: int

    def memory_bytes(self) -> int:
        """Resident memory that it does not share with others; 0 when it is gone."""
        try:
            return int(psutil.Process(self.process.pid).memory_full_info().uss)
        except psutil.Error:
            return 0


@dataclass(frozen=True)
class _Order:
    """Workers that are to be started: their arguments by rank, and what they inherit."""

    workers: list[list[str]]
    shm_fd: int | None


class Supervisor:
    """Owns the worker processes, and the fork server that they come from."""

    def __init__(
        self,
        log_level: str,
        worker_command: Sequence[str] = WORKER_COMMAND,
        fork_server_command: Sequence[str] | None = FORK_SERVER_COMMAND,
    ) -> None:
        """Start the fork server: it imports what workers need while the caller goes on.

        worker_command: starts a worker without it, before its flags. fork_server_command: None: all
        workers are started so.
        """
        self._log_level = log_level
        self._worker_command = tuple(worker_command)
        self._fork_server_command = fork_server_command
        self.workers: list[WorkerProcess] = []
        """By rank, those that have been started; `start` only asks for them."""
        self._watch = select.epoll()
        self._asked: _Order | None = None
        """What the fork server has not answered yet."""
        self._fork_server = self._start_fork_server()

    def fileno(self) -> int:
        """Readable when `notice` has something to do."""
        return self._watch.fileno()

    def start(self, world: int, epoch: int, address: str, shm_fd: int | None) -> None:
        """Start `world` workers that connect to `address`; `notice` makes them `workers`.

        shm_fd: is inherited by them; to be kept open until then.
        """
        order = _Order([self._arguments(rank, epoch, address) for rank in range(world)], shm_fd)
        if self._fork_server is None:
            self._fork_server = self._start_fork_server()
        if self._fork_server is None:
            self._start_without(order)
            return
        self._asked = order
        # When it has just ended, `notice` will say so.
        with contextlib.suppress(ConnectionError):
            self._fork_server.ask(order.workers, order.shm_fd)

    def notice(self) -> None:
        """Take over workers that were forked. Raises WorkerLostError when one has ended."""
        for fd, _ in self._watch.poll(0):
            if self._fork_server is not None and fd == self._fork_server.fileno():
                self._hear(self._fork_server)
            else:
                raise WorkerLostError(self._ended(fd))

    def stop(self, grace_s: float) -> None:
        """Wait until the workers have left by themselves, at most `grace_s`; kill who has not."""
        if self._asked is not None:
            self._asked = None
            self._end_fork_server()  # with the workers that it may have forked
        deadline = time.monotonic() + grace_s
        for worker in self.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))
        for worker in self.workers:
            worker.process.kill()  # does nothing to one that has ended
        for worker in self.workers:
            worker.process.wait()
            self._watch.unregister(worker.pidfd)
            os.close(worker.pidfd)
        self.workers.clear()

    def close(self) -> None:
        """End everything."""
        self.stop(grace_s=0.0)
        self._end_fork_server()
        self._watch.close()

    def _arguments(self, rank: int, epoch: int, address: str) -> list[str]:
        return [
            *("--rank", str(rank), "--epoch", str(epoch), "--connect", address),
            *("--parent", str(os.getpid()), "--log-level", self._log_level),
        ]

    def _ended(self, pidfd: int) -> str:
        """Say how the worker behind a readable `pidfd` ended."""
        worker = next(w for w in self.workers if w.pidfd == pidfd)
        how = describe_exit(worker.process.wait())
        return f"worker {worker.rank} (pid {worker.process.pid}) {how}"

    def _add(self, rank: int, process: subprocess.Popen[bytes] | AdoptedProcess) -> None:
        worker = WorkerProcess(rank, process, os.pidfd_open(process.pid))
        self._watch.register(worker.pidfd, select.EPOLLIN)
        self.workers.append(worker)

    def _start_without(self, order: _Order) -> None:
        """Start workers without a fork server: each imports everything by itself."""
        for rank, arguments in enumerate(order.workers):
            fds = () if order.shm_fd is None else (order.shm_fd,)
            process = subprocess.Popen(
                [*self._worker_command, *arguments, *(f"--shm-fd={fd}" for fd in fds)],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,  # standard output is the coordinator's, for its ready line
                pass_fds=fds,
                process_group=0,  # Ctrl-C at a terminal is for the coordinator alone
            )
            self._add(rank, process)

    # --- the fork server --------------------------------------------------------------------------

    def _start_fork_server(self) -> ForkServer | None:
        """None, and a line in the log, where it cannot be had."""
        if self._fork_server_command is None:
            return None
        try:
            fork_server = ForkServer(self._fork_server_command)
        except OSError as error:
            log.warning("workers are started without a fork server, which takes longer: %s", error)
            return None
        self._watch.register(fork_server.fileno(), select.EPOLLIN)
        return fork_server

    def _hear(self, fork_server: ForkServer) -> None:
        try:
            processes = fork_server.answer()
        except ForkServerLostError:
            self._fork_server_lost()
            return
        self._asked = None
        for rank, process in enumerate(processes):
            self._add(rank, process)

    def _fork_server_lost(self) -> None:
        how = describe_exit(self._end_fork_server())
        if self._asked is None:
            log.warning("the fork server %s: the next workers get a new one", how)
            return
        log.warning("the fork server %s: these workers are started without it", how)
        order, self._asked = self._asked, None
        self._start_without(order)

    def _end_fork_server(self) -> int:
        """Its exit code; 0 if there is none."""
        if self._fork_server is None:
            return 0
        fork_server, self._fork_server = self._fork_server, None
        self._watch.unregister(fork_server.fileno())
        return fork_server.close()
