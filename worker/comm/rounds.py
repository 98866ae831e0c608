"""How the ranks of one host post their rounds and wait for each other's (layout: shared/shm.py).

A rank posts a round by writing its data into its buffer and then raising its sequence number; it
reads its peers' data when their numbers have come as far. Nothing else is ever locked or signalled.

The native library and plain Python do the same. All ranks of a host run from one installation, so
they all do it in the same way.
"""

import ctypes
import os
import platform
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError
from shared.shm import BUFFER_BYTES, HEADER_BYTES, buffer_offset

_POLLS = 300
"""About 20 us of spinning, longer than what well-matched ranks wait for each other."""
_POLLS_WHEN_CROWDED = 4
_YIELDING_S = 1e-3
"""Of offering the core to others, before a sleep, from which one wakes late."""
_FIRST_SLEEP_S = 50e-6
_LONGEST_SLEEP_S = 1e-3


@dataclass(frozen=True)
class Seat:
    """Which rank of a region this is, and how it waits."""

    region: npt.NDArray[np.uint8]
    rank: int
    world: int
    crowded: bool
    """There are more ranks than cores: one that spins keeps its peers from running."""
    deadline_s: float


class Rounds(ABC):
    """One rank's end of a region."""

    native: int | None = None
    """See Communicator."""

    def __init__(self, seat: Seat) -> None:
        self._posted = seat.region.data[: seat.world * HEADER_BYTES].cast("Q")
        self._mine = seat.rank * HEADER_BYTES // 8

    @property
    def next_parity(self) -> int:
        """Which of its two buffers this rank is to write for the next round.

        From the number in the header, which counts rounds whoever posts them.
        """
        return (self._posted[self._mine] + 1) & 1

    @abstractmethod
    def exchange(self) -> int | None:
        """Post this rank's next round and wait for those of all peers.

        Returns None, or a rank that stayed silent for longer than the deadline.
        """

    def close(self) -> None:
        """Let go of the region."""
        self._posted = memoryview(b"").cast("Q")


class NativeRounds(Rounds):
    """By the native library, on any machine."""

    def __init__(self, seat: Seat, library: ctypes.CDLL) -> None:
        super().__init__(seat)
        new, free = library.tps_collective_new, library.tps_collective_free
        exchange = library.tps_collective_exchange
        sizes, numbers = [ctypes.c_size_t] * 3, [ctypes.c_int32] * 3
        new.argtypes = [ctypes.c_void_p, *sizes, *numbers, ctypes.c_double]
        new.restype = ctypes.c_void_p
        free.argtypes, free.restype = [ctypes.c_void_p], None
        exchange.argtypes, exchange.restype = [ctypes.c_void_p], ctypes.c_int32
        self.native = new(
            seat.region.ctypes.data,
            HEADER_BYTES,
            buffer_offset(seat.world, 0, 0),
            BUFFER_BYTES,
            seat.rank,
            seat.world,
            seat.crowded,
            seat.deadline_s,
        )
        if self.native is None:
            raise MemoryError("for a collective of the native library")
        self._free, self._exchange = free, exchange

    def exchange(self) -> int | None:
        """See Rounds."""
        silent: int = self._exchange(self.native)
        return None if silent < 0 else silent

    def close(self) -> None:
        """See Rounds."""
        self._free(self.native)  # which may be null
        self.native = None
        super().close()


class PythonRounds(Rounds):
    """In plain Python, where there is no native library.

    Data and number are plain stores and loads, in this order only because x86-64 keeps the order of
    stores and that of loads (and memcpy ends its non-temporal stores with a fence). Other machines do
    not promise that, and are refused.
    """

    def __init__(self, seat: Seat) -> None:
        """Raises ConfigError on such a machine."""
        if platform.machine().lower() not in ("x86_64", "amd64"):
            raise ConfigError(
                f"--comm shm needs the native library on a {platform.machine()} machine:"
                " make it (python -m worker.native.build) or use --comm zmq"
            )
        super().__init__(seat)
        self._peers = tuple(
            (peer, peer * HEADER_BYTES // 8) for peer in range(seat.world) if peer != seat.rank
        )
        self._polls = _POLLS_WHEN_CROWDED if seat.crowded else _POLLS
        self._deadline_s = seat.deadline_s

    def exchange(self) -> int | None:
        """See Rounds."""
        posted = self._posted
        posted[self._mine] = current = posted[self._mine] + 1
        for _, index in self._peers:
            if posted[index] < current:
                return self._await_peers(current)
        return None

    def _await_peers(self, current: int) -> int | None:
        """Spin, then yield, then sleep, until all peers have posted round `current`."""
        posted = self._posted
        began = time.monotonic()
        pause = _FIRST_SLEEP_S
        polls = self._polls
        for rank, index in self._peers:
            while posted[index] < current:
                polls -= 1
                if polls > 0:
                    continue
                waited = time.monotonic() - began
                if waited > self._deadline_s:
                    return rank
                if waited < _YIELDING_S:
                    os.sched_yield()
                else:
                    time.sleep(pause)
                    pause = min(2 * pause, _LONGEST_SLEEP_S)
        return None
