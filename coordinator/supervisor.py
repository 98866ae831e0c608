"""The worker processes of one epoch: start them, notice when one ends, end them all."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

# -P: a folder called `worker` where the server is started must not be taken for ours.
WORKER_COMMAND = (sys.executable, "-P", "-m", "worker")

log = logging.getLogger("coordinator.supervisor")


@dataclass(frozen=True)
class WorkerProcess:
    """A running worker; `pidfd` becomes readable when it ends."""

    rank: int
    process: subprocess.Popen[bytes]
    pidfd: int

    def memory_bytes(self) -> int:
        """Resident memory that it does not share with others; 0 when it is gone."""
        try:
            return int(psutil.Process(self.process.pid).memory_full_info().uss)
        except psutil.Error:
            return 0


class Supervisor:
    """Owns the worker processes."""

    def __init__(self, log_level: str, command: Sequence[str]) -> None:
        """`command` starts a worker, before its flags."""
        self._log_level = log_level
        self._command = tuple(command)
        self.workers: list[WorkerProcess] = []

    def start(self, world: int, epoch: int, address: str, shm_fd: int | None) -> None:
        """Start `world` workers that connect to `address`; `shm_fd` is inherited by them."""
        for rank in range(world):
            command = [
                *self._command,
                *("--rank", str(rank), "--epoch", str(epoch), "--connect", address),
                *("--parent", str(os.getpid()), "--log-level", self._log_level),
            ]
            if shm_fd is not None:
                command += ["--shm-fd", str(shm_fd)]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,  # standard output is the coordinator's, for its ready line
                pass_fds=() if shm_fd is None else (shm_fd,),
                process_group=0,  # Ctrl-C at a terminal is for the coordinator alone
            )
            self.workers.append(WorkerProcess(rank, process, os.pidfd_open(process.pid)))

    def ended(self, pidfd: int) -> str:
        """Say how the worker behind a readable `pidfd` ended."""
        worker = next(w for w in self.workers if w.pidfd == pidfd)
        code = worker.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        return f"worker {worker.rank} (pid {worker.process.pid}) {how}"

    def stop(self, grace_s: float) -> None:
        """Wait until the workers have left by themselves, at most `grace_s`; kill who has not."""
        deadline = time.monotonic() + grace_s
        for worker in self.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))
        for worker in self.workers:
            worker.process.kill()  # does nothing to one that has ended
        for worker in self.workers:
            worker.process.wait()
            os.close(worker.pidfd)
        self.workers.clear()
