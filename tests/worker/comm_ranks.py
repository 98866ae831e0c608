"""Rank processes for the tests of the communicators.

`RankPool` (in the test's process) starts each rank once and then tells it over a socket pair which
communicator to open and what to do with it; `python comm_ranks.py FD` is such a rank. Importing torch
takes seconds, so processes are kept from test to test.
"""

import contextlib
import hashlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from shared.errors import CommError
from shared.shm import create_shm_region
from shared.worker_messages import CommSetup
from worker.comm.base import Communicator, Floats
from worker.comm.open import open_communicator
from worker.comm.shm import ShmCommunicator

PROJECT = Path(__file__).resolve().parent.parent.parent
ANSWER_TIMEOUT_S = 120
MESSAGE_BYTES = 1 << 18

Kind = Literal["local", "shm", "shm-python", "zmq", "gloo"]
"""A transport; shm is that of the native library, shm-python the one without."""


class Prepare(Struct, tag=True):
    """Import what takes seconds to import, so that it counts towards no deadline."""

    module: str


class Open(Struct, tag=True):
    kind: Kind
    setup: CommSetup


class Reduce(Struct, tag=True):
    """All-reduce leaves of each size in turn; before each, with `jitter_s`, sometimes sleep."""

    sizes: list[int]
    jitter_s: float = 0
    from_roots: bool = False
    """Do the local additions first, and all-reduce the roots."""


class ReduceUntilLost(Struct, tag=True):
    """All-reduce until an error, or for as long as a test may last."""

    size: int


class Exchange(Struct, tag=True):
    cases: list[tuple[str, tuple[int, ...]]]
    """(dtype, shape)"""


class Barrier(Struct, tag=True):
    delay_s: float = 0


class Close(Struct, tag=True):
    """Twice; nothing if none is open."""


Command = Prepare | Open | Reduce | ReduceUntilLost | Exchange | Barrier | Close


class Answer(Struct):
    """Times are of the monotonic clock, which all processes of a host share."""

    began: float
    ended: float
    digests: list[str] = []
    lost_rank: int | None = None
    error: str = ""


def leaf(shard: int, length: int) -> Floats:
    """The partial sum of a virtual shard: magnitudes from 2^-31 to 2^32, so that order matters."""
    rng = np.random.default_rng([shard, length])
    bits = rng.integers(0, 1 << 32, length, np.uint32)
    exponents = 96 + (bits >> 23) % 64
    return ((bits & 0x807FFFFF) | exponents << 23).astype(np.uint32).view(np.float32)


def rank_array(rank: int, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    """What a rank gives to an exchange."""
    rng = np.random.default_rng([rank, *shape])
    return np.asarray(rng.integers(0, 100, shape)).astype(dtype)


def digest(array: npt.NDArray[np.generic]) -> str:
    """Of the bits, the dtype and the shape."""
    description = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(description + array.tobytes()).hexdigest()


def open_kind(kind: Kind, setup: CommSetup, region: int | None) -> Communicator:
    if kind == "shm-python":
        assert region is not None
        crowded = len(setup.owned) > len(os.sched_getaffinity(0))
        comm: Communicator = ShmCommunicator(setup, region, None, crowded)
    else:
        comm = open_communicator(setup, region)
    assert (comm.native is not None) == (kind == "shm")
    return comm


class Rank:
    """One rank: what it was told to open, and how it carries out commands."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._comm: Communicator | None = None
        self._setup: CommSetup | None = None

    def serve(self) -> None:
        """Until the test's process closes its end."""
        decoder = msgspec.json.Decoder(Command)
        while True:
            message, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE_BYTES, 1)
            if not message:
                return
            began = time.monotonic()
            answer = Answer(began=began, ended=began)
            try:
                answer.digests = self._carry_out(decoder.decode(message), descriptors)
            except CommError as error:
                answer.lost_rank, answer.error = error.rank, error.message
            answer.ended = time.monotonic()
            self._control.send(msgspec.json.encode(answer))

    def _carry_out(self, command: Command, descriptors: list[int]) -> list[str]:
        match command:
            case Prepare(module):
                importlib.import_module(module)
            case Open(kind, setup):
                self._setup = setup
                region = descriptors[0] if descriptors else None
                self._comm = open_kind(kind, setup, region)
            case Reduce(sizes, jitter_s, from_roots):
                return [self._reduce(size, jitter_s, from_roots) for size in sizes]
            case ReduceUntilLost(size):
                until = time.monotonic() + ANSWER_TIMEOUT_S
                while time.monotonic() < until:
                    self._reduce(size)
            case Exchange(cases):
                assert self._comm is not None
                mine = [rank_array(self._comm.rank, *case) for case in cases]
                return [digest(self._comm.exchange_small(array)) for array in mine]
            case Barrier(delay_s):
                assert self._comm is not None
                time.sleep(delay_s)
                entered = time.monotonic()
                self._comm.barrier()
                return [str(entered)]
            case Close() if self._comm is not None:
                self._comm.close()
                self._comm.close()
                self._comm = None
        return []

    def _reduce(self, size: int, jitter_s: float = 0, from_roots: bool = False) -> str:
        assert self._comm is not None
        assert self._setup is not None
        start, stop = self._setup.owned[self._setup.rank]
        partials = np.stack([leaf(shard, size) for shard in range(start, stop)])
        if np.random.default_rng().random() < 0.1:
            time.sleep(jitter_s)
        if from_roots:
            for i, j in self._comm.tree.local_additions:
                partials[i] += partials[j]
            roots = partials[list(self._comm.tree.local_roots)]
            total = self._comm.all_reduce_roots(roots)
        else:
            total = self._comm.all_reduce_tree(partials)
        result = digest(total)
        # It is the caller's to change: that must not reach any peer.
        total.fill(np.nan)
        return result


class RankProcess:
    """A rank, seen from the test."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": str(PROJECT)},
            )
        self._control.settimeout(ANSWER_TIMEOUT_S)

    def tell(self, command: Command, descriptors: Sequence[int] = ()) -> None:
        socket.send_fds(self._control, [msgspec.json.encode(command)], descriptors)

    def answer(self) -> Answer:
        return msgspec.json.decode(self._control.recv(MESSAGE_BYTES), type=Answer)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        """However it is: busy, stopped or gone."""
        self._process.kill()
        self._process.wait()
        self._control.close()


class World:
    """Some ranks that are to meet, and the setups of their communicators."""

    def __init__(
        self, kind: Kind, ranks: Sequence[RankProcess], setups: Sequence[CommSetup]
    ) -> None:
        self.kind = kind
        self.ranks = ranks
        self.setups = setups
        self.killed: set[int] = set()

    def open(self, only: Sequence[int] | None = None) -> list[Answer]:
        """Open the communicators of all ranks, or of those in `only`."""
        region = create_shm_region(len(self.ranks)) if self.setups[0].kind == "shm" else None
        descriptors = [] if region is None else [region]
        ranks = range(len(self.ranks)) if only is None else only
        for rank in ranks:
            self.ranks[rank].tell(Open(self.kind, self.setups[rank]), descriptors)
        answers = [self.ranks[rank].answer() for rank in ranks]
        if region is not None:
            os.close(region)
        return answers

    def run(self, command: Command, only: Sequence[int] | None = None) -> list[Answer]:
        """All ranks, or those in `only`, carry out the command."""
        ranks = range(len(self.ranks)) if only is None else only
        for rank in ranks:
            self.ranks[rank].tell(command)
        return [self.ranks[rank].answer() for rank in ranks]

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Kill, stop or continue the process of a rank."""
        if number == signal.SIGKILL:
            self.killed.add(rank)
        self.ranks[rank].signal(number)


class RankPool:
    """Starts processes as they are needed, and ends them at last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._idle: list[RankProcess] = []
        self._worlds = 0

    @contextlib.contextmanager
    def world(self, kind: Kind, owned: Sequence[range], deadline_s: float) -> Iterator[World]:
        """A world whose rank r owns the virtual shards owned[r]; nothing is opened yet.

        At its end communicators are closed, and processes come back that were not killed; after an
        error nobody knows what they are doing, and all are ended.
        """
        while len(self._idle) < len(owned):
            self._idle.append(RankProcess())
        setups = self._setups(kind, owned, deadline_s)
        world = World(kind, [self._idle.pop(0) for _ in owned], setups)
        kept: list[int] = []
        try:
            if kind == "gloo":
                world.run(Prepare("worker.comm.torch_dist"))
            yield world
            kept = [rank for rank in range(len(owned)) if rank not in world.killed]
            world.run(Close(), only=kept)
        finally:
            for rank in set(range(len(owned))).difference(kept):
                world.ranks[rank].end()
        self._idle = [world.ranks[rank] for rank in kept] + self._idle

    def end(self) -> None:
        for process in self._idle:
            process.end()

    def _setups(self, kind: Kind, owned: Sequence[range], deadline_s: float) -> list[CommSetup]:
        self._worlds += 1
        place = self._folder / str(self._worlds)
        addresses = {
            "zmq": [f"ipc://{place}.{rank}" for rank in range(len(owned))],
            "gloo": [f"file://{place}"],
        }
        return [
            CommSetup(
                kind="shm" if kind == "shm-python" else kind,
                rank=rank,
                owned=[(run.start, run.stop) for run in owned],
                deadline_s=deadline_s,
                addresses=addresses.get(kind, []),
            )
            for rank in range(len(owned))
        ]


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as control:
        Rank(control).serve()
