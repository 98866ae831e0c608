"""Collectives through memory that the ranks of one host share (layout: shared/shm.py).

Owns the region's mapping and knows where each rank's rows are; `rounds` posts them and waits.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError
from shared.shm import BUFFER_BYTES, buffer_offset, region_bytes
from shared.worker_messages import CommSetup
from worker.comm.base import Row, TreeCommunicator
from worker.comm.rounds import NativeRounds, PythonRounds, Rounds, Seat

_BLOCK_BYTES = 1 << 18
"""Much less than a buffer holds, so that peers find in the cache what a rank has just written."""
_SHAPES_KEPT = 512

_Shape = tuple[int, str, tuple[int, ...]]
"""Of the blocks of one round: length of a row, dtype code, rows of each rank."""
_Views = tuple[Sequence[Row], Sequence[Row]]
"""Of the buffers of one parity: where this rank's rows go, and the rows of all ranks."""


class ShmCommunicator(TreeCommunicator):
    """One of the ranks that share a region made by `create_shm_region`."""

    def __init__(
        self, setup: CommSetup, descriptor: int, library: ctypes.CDLL | None, crowded: bool
    ) -> None:
        """Maps the region and closes `descriptor`. Raises ConfigError when that cannot work.

        library: the native one, or None for plain Python; the same for all ranks. crowded: more
        threads than cores are going to compute.
        """
        super().__init__(setup, _BLOCK_BYTES)
        size, expected = os.fstat(descriptor).st_size, region_bytes(self.world)
        if size != expected:
            raise ConfigError(
                f"the shared memory region has {size} bytes, {self.world} ranks need {expected}"
            )
        # The mapping goes away with the last view of it, and needs the descriptor no longer.
        self._memory: npt.NDArray[np.uint8] = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
        seat = Seat(self._memory, self.rank, self.world, crowded, setup.deadline_s)
        self._rounds: Rounds = NativeRounds(seat, library) if library else PythonRounds(seat)
        os.close(descriptor)
        self.native = self._rounds.native
        self.buffer_bytes = BUFFER_BYTES if self.native else 0
        self._views: dict[_Shape, tuple[_Views, _Views]] = {}

    def close(self) -> None:
        """See Communicator."""
        self.native, self.buffer_bytes = None, 0
        self._rounds.close()
        self._views.clear()
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
        mine, everyone = views[self._rounds.next_parity]
        for target, row in zip(mine, rows, strict=True):
            target[:] = row
        silent = self._rounds.exchange()
        if silent is not None:
            raise self.lost(silent, operation)
        return everyone if parts is None else [row[parts[self.rank]] for row in everyone]

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
