"""Gives memory back to the system after a burst of requests, which would otherwise stay with the process.

Nothing refers to it any more, but an allocator keeps what is between objects that live on. Python's
own gives back whole MiB only, and hardly any is free of such objects; glibc's can give back single pages.
So the gateway is started with the latter (shared/processes.py), with which requests take 0 to 3 % longer.
"""

import asyncio
import ctypes
import gc
from types import TracebackType

MANY_REQUESTS = 64
"""Open at once: fewer do not take enough memory to be worth a look."""
_SETTLE_S = 1.0
"""For the connections of the requests to be closed, too."""


class OpenRequests:
    """Counts them; a context manager for each. When most of many have ended, their memory goes back."""

    def __init__(self) -> None:
        self._open = self._most = 0

    def __enter__(self) -> None:
        self._open += 1
        self._most = max(self._most, self._open)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open -= 1
        if self._most >= MANY_REQUESTS and self._open <= self._most // 8:
            self._most = self._open
            asyncio.get_running_loop().call_later(_SETTLE_S, _give_back)


def _give_back() -> None:
    """Takes some 5 to 10 ms after 1,000 streams. C libraries other than glibc do not have it."""
    gc.collect()  # empties Python's lists of objects to use again
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
