"""What child processes owe to their parent, and what the parent learns of their end."""

import ctypes
import os
import signal
import sys

GIVES_MEMORY_BACK = {"PYTHONMALLOC": "malloc"}
"""Environment of a Python process that can: Python chooses its allocator before it runs any code."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent goes, however it goes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the request was made
        sys.exit(1)


def adopt_orphans() -> None:
    """Have descendants whose parent ends become children of this process. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(code)}")


def describe_exit(code: int) -> str:
    """What happened to a process; `code` as `subprocess` gives it."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
