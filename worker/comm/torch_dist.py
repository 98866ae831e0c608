"""Collectives over torch.distributed: Gloo, by TCP among the ranks, and NCCL among their GPUs.

The only module that imports torch.distributed. The process groups are our own objects, never torch's
global one.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from torch.distributed import (  # type: ignore[attr-defined]  # FileStore: public, not in stubs
    FileStore,
    ProcessGroup,
    ProcessGroupGloo,
    Work,
)

from shared.errors import CommError, ConfigError
from shared.worker_messages import CommSetup
from worker.comm.base import Row, TreeCommunicator

_BLOCK_BYTES = 4 << 20
_FILE_SCHEME = "file://"
_TAGS = 1 << 31


class _PointToPoint(Protocol):
    """What is used of ProcessGroupGloo; torch's own stubs leave these methods out."""

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int, /) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int, /) -> Work: ...


class GlooCommunicator(TreeCommunicator):
    """One of the ranks of a Gloo process group that meet at a file."""

    def __init__(self, setup: CommSetup) -> None:
        """Returns when all ranks are connected.

        Raises CommError naming a rank that does not come within the deadline, ConfigError for a bad
        address.
        """
        super().__init__(setup, _BLOCK_BYTES)
        self._round = 0
        self._peers = tuple(rank for rank in range(self.world) if rank != self.rank)
        self._group: _PointToPoint | None = self._meet(_rendezvous_file(setup))

    def close(self) -> None:
        """See Communicator."""
        self._group = None

    def _meet(self, path: str) -> _PointToPoint:
        deadline = time.monotonic() + self._deadline_s
        store = _open_store(path, self.world)
        store.set(_presence_key(self.rank), "1")
        for peer in self._peers:
            try:
                store.wait([_presence_key(peer)], _time_left(deadline))
            except RuntimeError:
                raise self.lost(peer, "rendezvous") from None
        try:
            group = _gloo_group(store, self.rank, self.world, _time_left(deadline))
        except RuntimeError as error:
            peer = self._first_unconnected(store)
            raise self._fail(
                peer, "rendezvous", f"no connection ({_first_sentence(error)})"
            ) from None
        return cast(_PointToPoint, group)

    def _first_unconnected(self, store: FileStore) -> int:
        """The first peer that has not published its address under the key that Gloo gives it."""
        missing = (peer for peer in self._peers if not store.check([f"0/{peer}"]))
        return next(missing, self._peers[0])

    def _all_gather(
        self,
        operation: str,
        rows: Sequence[Row],
        rows_per_rank: tuple[int, ...],
        parts: Sequence[slice] | None = None,
    ) -> Sequence[Row]:
        deadline = time.monotonic() + self._deadline_s
        self._round = (self._round + 1) % _TAGS
        if parts is None:
            outgoing = [np.stack(rows)] * self.world
        else:
            outgoing = [np.stack([row[part] for row in rows]) for part in parts]
        mine = outgoing[self.rank]
        blocks = [np.empty((count, mine.shape[1]), mine.dtype) for count in rows_per_rank]
        blocks[self.rank] = mine
        assert self._group is not None, "used after close"
        started: dict[int, tuple[Work, Work]] = {}
        peer = self.rank
        try:
            for peer in self._peers:
                incoming, message = torch.from_numpy(blocks[peer]), torch.from_numpy(outgoing[peer])
                started[peer] = (
                    self._group.recv([incoming], peer, self._round),
                    self._group.send([message], peer, self._round),
                )
            for peer in self._peers:
                for work in started[peer]:
                    work.wait(_time_left(deadline))
        except RuntimeError as error:
            if time.monotonic() >= deadline:
                raise self.lost(peer, operation) from None
            reason = f"connection lost ({_first_sentence(error)})"
            raise self._fail(peer, operation, reason) from None
        return [row for block in blocks for row in block]


class GroupCollectives:
    """Collectives of device tensors: over NCCL where they are on GPUs, over Gloo on the CPU."""

    def __init__(self, setup: CommSetup, device: torch.device) -> None:
        """Raises ConfigError for a bad address, or a torch without NCCL; CommError."""
        self.world = len(setup.owned)
        self.capturable = device.type == "cuda"
        self._rank = setup.rank
        store = _open_store(_rendezvous_file(setup) + "-device", self.world)
        make = _nccl_group if device.type == "cuda" else _gloo_group
        timeout = timedelta(seconds=setup.deadline_s)
        with self._naming("rendezvous"):
            self._group = make(store, self._rank, self.world, timeout)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See Collectives."""
        with self._naming("all-reduce"):
            self._group.allreduce([x]).wait()
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See Collectives."""
        gathered = x.new_empty(self.world * x.numel())
        with self._naming("all-gather"):
            self._group._allgather_base(gathered, x.flatten()).wait()
        return gathered.view(self.world, *x.shape)

    @contextmanager
    def _naming(self, operation: str) -> Iterator[None]:
        """What torch raises does not say which rank is gone: of two it can only be the other one."""
        try:
            yield
        except RuntimeError as error:
            peer = next(rank for rank in range(self.world) if rank != self._rank)
            reason = f"connection lost ({_first_sentence(error)}) in {operation}"
            raise CommError(peer, reason) from None


def _nccl_group(store: FileStore, rank: int, world: int, timeout: timedelta) -> ProcessGroup:
    try:
        from torch.distributed import ProcessGroupNCCL
    except ImportError:
        raise ConfigError(
            f"--comm nccl needs a torch with NCCL, and {torch.__version__} has none: use --comm gloo"
        ) from None
    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return cast(ProcessGroup, ProcessGroupNCCL(store, rank, world, options))


def _gloo_group(store: FileStore, rank: int, world: int, timeout: timedelta) -> ProcessGroup:
    # Gloo would otherwise use the interface that the host's name resolves to, if it does.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return cast(ProcessGroup, ProcessGroupGloo(store, rank, world, timeout))


def _rendezvous_file(setup: CommSetup) -> str:
    if len(setup.addresses) != 1 or not setup.addresses[0].startswith(_FILE_SCHEME):
        raise ConfigError(f"--comm {setup.kind} needs one file:// address, got {setup.addresses}")
    return setup.addresses[0].removeprefix(_FILE_SCHEME)


def _open_store(path: str, world: int) -> FileStore:
    try:
        Path(path).touch()  # FileStore would try for minutes
    except OSError as error:
        raise ConfigError(f"cannot use {path} to start Gloo: {error.strerror}") from None
    return FileStore(path, world)


def _presence_key(rank: int) -> str:
    return f"tpserve-rank-{rank}"


def _time_left(deadline: float) -> timedelta:
    """Never zero, which means no limit to torch."""
    return timedelta(seconds=max(0.001, deadline - time.monotonic()))


def _first_sentence(error: RuntimeError) -> str:
    return str(error).partition(". ")[0]
