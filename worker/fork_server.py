"""A process that has imported what workers need, and forks each of them in milliseconds.

Started by the coordinator as `python -m worker.fork_server`. It only waits and forks: a thread, a
ZeroMQ context, a device or memory that is in use would not survive that. A worker it forks becomes
the coordinator's child, and goes on as if it had been started as `python -m worker`.
"""

import argparse
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from shared.processes import die_with
from worker.__main__ import main as run_worker

_MAX_ORDER_BYTES = 1 << 16
_ADOPTION_POLL_S = 0.0005
_ARG_START, _ARG_END = 45, 46
"""Fields of /proc/self/stat after the process's name, counted from 0; see proc(5)."""


def main() -> None:
    """Entry of the fork server, and of each worker that it forks."""
    parser = argparse.ArgumentParser(prog="python -m worker.fork_server")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket of the coordinator")
    parser.add_argument("--parent", type=int, required=True, help="the coordinator's process id")
    parser.add_argument(
        "--room", required=True, help="blanks: room for the longer command lines of workers"
    )
    args = parser.parse_args()
    die_with(args.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's to handle
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, children could not be waited for
    _show_command(sys.orig_argv[:-2])  # without the blanks
    gc.collect()
    gc.freeze()  # or a worker's first collection would write to, and so copy, what is shared
    with socket.socket(fileno=args.fd) as coordinator:
        arguments = _serve(coordinator)
    _show_command([sys.executable, "-P", "-m", "worker", *arguments])
    run_worker(arguments)
    # Taking the interpreter apart would write to, and so copy, all that is shared.
    logging.shutdown()
    os._exit(0)


def _serve(coordinator: socket.socket) -> list[str]:
    """Fork what the coordinator asks for until it closes; returns in workers, their arguments.

    It gives a list of arguments for each worker and, if they share memory, its descriptor; it gets
    the process ids.
    """
    while True:
        frame, fds, _, _ = socket.recv_fds(coordinator, _MAX_ORDER_BYTES, maxfds=1)
        if not frame:
            sys.exit()
        pids = []
        for arguments in msgspec.msgpack.decode(frame, type=list[list[str]]):
            pid = _fork_for_parent()
            if pid is None:
                return [*arguments, *(f"--shm-fd={fd}" for fd in fds)]
            pids.append(pid)
        for fd in fds:
            os.close(fd)
        coordinator.send(msgspec.msgpack.encode(pids))


def _fork_for_parent() -> int | None:
    """Fork a child of this process's parent: its process id, or None in that child.

    The parent has called `adopt_orphans`, so it gets the child of a process that ends at once. The
    process ends with a message when the system has no room for another.
    """
    reader, writer = os.pipe()
    try:
        between = os.fork()
        if between == 0:
            between = os.getpid()
            if pid := os.fork():
                os.write(writer, b"%d" % pid)
                os._exit(0)
            os.close(reader)
            os.close(writer)
            while os.getppid() == between:
                time.sleep(_ADOPTION_POLL_S)
            return None
    except OSError as error:
        sys.exit(f"tpserve: the fork server cannot fork: {error.strerror}")
    os.close(writer)
    os.waitpid(between, 0)  # after which the child has been adopted
    answer = os.read(reader, 20)
    os.close(reader)
    if not answer:
        sys.exit(1)  # the process between has said why
    return int(answer)


def _show_command(arguments: Sequence[str]) -> None:
    """Let this process's command line, as `ps` shows it, be this one.

    It is written over the one that the process was started with and cut where that ends. A last byte that is not zero tells the
    kernel that the text ends earlier, at the first zero.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()
    start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
    if start == 0:  # the kernel does not tell
        return
    text = os.fsencode(" ".join(arguments))[: end - start - 2]
    ctypes.memmove(start, text.ljust(end - start - 1, b"\0") + b" ", end - start)


if __name__ == "__main__":
    main()
