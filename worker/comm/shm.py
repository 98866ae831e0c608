"""Collectives through memory that the ranks of one host share (layout: shared/shm.py).

A rank posts a round by writing its rows into its buffer and then raising its sequence number; it
reads its peers' rows when their numbers have come as far. Nothing else is ever locked or signalled.

Data and number are plain stores and loads, in this order only because x86-64 keeps the order of
stores and that of loads (and memcpy ends its non-temporal stores with a fence). Other machines do
not promise that, and are refused.
"""

import mmap
import os
import platform
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError
from shared.messages import CommSetup
from shared.shm import BUFFER_BYTES, HEADER_BYTES, buffer_offset, region_bytes
from worker.comm.base import Row, TreeCommunicator

_POLLS = 300
"""About 20 us of spinning, longer than what well-matched ranks wait for each other."""
_POLLS_WHEN_CROWDED = 4
"""With more ranks than cores, a spinning rank keeps its peers from running."""
_YIELDS = 1000
"""About 1 ms of offering the core to others, before a sleep, from which one wakes late."""
_FIRST_SLEEP_S = 50e-6
_LONGEST_SLEEP_S = 1e-3
_SHAPES_KEPT = 512

_Shape = tuple[int, str, tuple[int, ...]]
"""Of the blocks of one round: length of a row, dtype code, rows of each rank."""
_Views = tuple[Sequence[Row], Sequence[Row]]
"""Of the buffers of one parity: where this rank's rows go, and the rows of all ranks."""


class ShmCommunicator(TreeCommunicator):
    """One of the ranks that share a region made by `create_shm_region`."""

    def __init__(self, setup: CommSetup, descriptor: int) -> None:
        """Maps the region and closes `descriptor`. Raises ConfigError when that cannot work."""
        super().__init__(setup, BUFFER_BYTES)
        if platform.machine().lower() not in ("x86_64", "amd64"):
            raise ConfigError(
                f"--comm shm relies on the memory order of x86-64, and this is a"
                f" {platform.machine()} machine; use --comm zmq"
            )
        size, expected = os.fstat(descriptor).st_size, region_bytes(self.world)
        if size != expected:
            raise ConfigError(
                f"the shared memory region has {size} bytes, {self.world} ranks need {expected}"
            )
        # The mapping goes away with the last view of it, and needs the descriptor no longer.
        mapping = mmap.mmap(descriptor, size)
        os.close(descriptor)
        self._memory: npt.NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)
        self._posted = memoryview(mapping)[: self.world * HEADER_BYTES].cast("Q")
        self._mine = self.rank * HEADER_BYTES // 8
        self._peers = tuple(
            (rank, rank * HEADER_BYTES // 8) for rank in range(self.world) if rank != self.rank
        )
        crowded = self.world > len(os.sched_getaffinity(0))
        self._polls = _POLLS_WHEN_CROWDED if crowded else _POLLS
        self._round = 0
        self._views: dict[_Shape, tuple[_Views, _Views]] = {}

    def close(self) -> None:
        """See Communicator."""
        self._views.clear()
        self._posted = memoryview(b"").cast("Q")
        self._memory = np.empty(0, np.uint8)

    def _all_gather(
        self,
        operation: str,
        rows: Sequence[Row],
        rows_per_rank: tuple[int, ...],
        parts: Sequence[slice] | None = None,
    ) -> Sequence[Row]:
        first = rows[0]
        shape = (first.size, first.dtype.char, rows_per_rank)
        views = self._views.get(shape) or self._make_views(shape)
        # Two buffers in turn are enough: a rank comes to round k + 2 only when all peers have posted
        # round k + 1, and a peer posts that only after it has finished reading round k.
        self._round = current = self._round + 1
        mine, everyone = views[current & 1]
        for target, row in zip(mine, rows, strict=True):
            target[:] = row
        posted = self._posted
        posted[self._mine] = current
        for _, index in self._peers:
            if posted[index] < current:
                self._await_peers(current, operation)
                break
        return everyone if parts is None else [row[parts[self.rank]] for row in everyone]

    def _await_peers(self, current: int, operation: str) -> None:
        """Spin, then yield, then sleep, until all peers have posted round `current`."""
        posted = self._posted
        polls = self._polls
        yields = polls + _YIELDS
        pause = _FIRST_SLEEP_S
        deadline = time.monotonic() + self._deadline_s
        done = 0
        for rank, index in self._peers:
            while posted[index] < current:
                done += 1
                if done < polls:
                    continue
                if done < yields:
                    os.sched_yield()
                else:
                    time.sleep(pause)
                    pause = min(2 * pause, _LONGEST_SLEEP_S)
                if time.monotonic() > deadline:
                    raise self._lost(rank, operation)

    def _make_views(self, shape: _Shape) -> tuple[_Views, _Views]:
        """Views are made once per shape: making one takes as long as adding 1,000 floats."""
        if len(self._views) >= _SHAPES_KEPT:
            self._views.clear()
        self._views[shape] = (self._views_of(shape, 0), self._views_of(shape, 1))
        return self._views[shape]

    def _views_of(self, shape: _Shape, parity: int) -> _Views:
        length, code, rows_per_rank = shape
        dtype = np.dtype(code)
        blocks = []
        for rank, rows in enumerate(rows_per_rank):
            start = buffer_offset(self.world, rank, parity)
            block = self._memory[start : start + rows * length * dtype.itemsize].view(dtype)
            blocks.append(list(block.reshape(rows, length)))
        return blocks[self.rank], [row for block in blocks for row in block]
