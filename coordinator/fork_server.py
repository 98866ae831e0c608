"""The process that forks workers (worker/fork_server.py), as the coordinator sees it.

A worker that it forks becomes a child of the coordinator, which therefore gets its exit code and
is told by the kernel of its end, as if it had started the worker itself.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

import msgspec

from shared.processes import adopt_orphans

# -P: a folder called `worker` where the server is started must not be taken for ours.
FORK_SERVER_COMMAND = (sys.executable, "-P", "-m", "worker.fork_server")
_TITLE_ROOM = 1024
"""Bytes; a worker writes its command line over the one that the fork server was started with."""
_MAX_ANSWER_BYTES = 1 << 16


class ForkServerLostError(Exception):
    """It has ended, and what it had begun with it; a worker that it handed over has not."""


class AdoptedProcess:
    """A child that another process forked for this one; used like a `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._ended = select.poll()
        self._pidfd = os.pidfd_open(pid)
        self._ended.register(self._pidfd, select.POLLIN)
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or minus the signal. Raises subprocess.TimeoutExpired; in seconds."""
        if self._code is None:
            if not self._ended.poll(None if timeout is None else timeout * 1000):
                assert timeout is not None, "else it would have waited"
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._pidfd)
        return self._code

    def kill(self) -> None:
        """End it; does nothing when it has ended."""
        if self._code is None:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


class ForkServer:
    """A running fork server."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start it; it will need seconds before it answers. Raises OSError when the kernel refuses.

        To be called by the main thread: the kernel ends the process with the thread that made it.
        """
        adopt_orphans()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, no exit code would be kept
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        flags = ("--fd", str(theirs.fileno()), "--parent", str(os.getpid()))
        try:
            self._process = subprocess.Popen(
                [*command, *flags, "--room", " " * _TITLE_ROOM],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,  # standard output is the coordinator's, for its ready line
                pass_fds=(theirs.fileno(),),
                process_group=0,  # `close` ends the group; and Ctrl-C is for the coordinator alone
            )
        except OSError:
            self._socket.close()
            raise
        finally:
            theirs.close()

    def fileno(self) -> int:
        """Readable when there is an answer, or the process has ended."""
        return self._socket.fileno()

    def ask(self, workers: Sequence[Sequence[str]], shm_fd: int | None) -> None:
        """Have a process forked for each list of arguments. Raises OSError when it has ended."""
        fds = [] if shm_fd is None else [shm_fd]
        socket.send_fds(self._socket, [msgspec.msgpack.encode(workers)], fds)

    def answer(self) -> list[AdoptedProcess]:
        """The processes that were asked for; `fileno` is readable. Raises ForkServerLostError."""
        try:
            frame = self._socket.recv(_MAX_ANSWER_BYTES)
        except ConnectionError:
            frame = b""
        if not frame:
            raise ForkServerLostError
        pids = msgspec.msgpack.decode(frame, type=list[int])
        for pid in pids:
            os.setpgid(pid, pid)  # from now on it does not end with the fork server
        return [AdoptedProcess(pid) for pid in pids]

    def close(self) -> int:
        """End the process and every worker that it has not handed over; its exit code."""
        self._socket.close()
        group = self._process.pid  # not given away again before the process has been waited for
        os.killpg(group, signal.SIGKILL)
        # Workers come after it: they are children of this process only once their parents are gone.
        code = self._process.wait()
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-group, 0)
        return code
