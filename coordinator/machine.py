"""What this machine can do, as far as a step of a model depends on it: measured once, then kept.

`python -m worker.probe` measures, in as many processes as there may be workers; this module has them
work alone and together, and keeps the result in the user's cache folder. What a step takes of it is
step_model.py's business.
"""

import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import msgspec
import platformdirs
from msgspec import Struct

from shared.errors import TpserveError
from shared.messages import Precision
from shared.precision import BYTES_PER_WEIGHT
from shared.sharding import assign_shards
from shared.shm import create_shm_region
from shared.worker_messages import CommSetup

log = logging.getLogger("coordinator.machine")

Comm = Literal["local", "shm", "zmq", "gloo", "nccl"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_PRECISIONS_OF_TORCH: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
ROWS = (1, 8, 32, 128)
"""Rows of activations that a weight is multiplied with."""
_FORMAT = 3
_COMMAND = (sys.executable, "-P", "-m", "worker.probe")
_STEPS: Mapping[Comm, int] = {"local": 60, "shm": 60, "zmq": 20, "gloo": 8}
"""Forward passes that are timed."""
_LEAST_BYTES, _MOST_BYTES = 32 << 20, 192 << 20
"""Of a weight: it must not stay in the cache, and is not to take long."""
_CACHES = 1.5
"""Times the size of the last cache that it should have."""
_PASSES = 2
"""Over all precisions, whose mean counts: memory that others use as well is faster now and slower then."""
_SHARDS = 8
_DEADLINE_S = 60.0
_PINGS = 20


class Multiplying(Struct, frozen=True):
    """Seconds per byte of weights, by ROWS, of one precision."""

    alone: list[float]
    """One thread, the other cores idle."""
    together: list[float]
    """Each of as many processes of one thread as there are cores."""
    threaded: list[float]
    """Each of as many threads of one process."""


class Exchanging(Struct, frozen=True):
    """What a forward pass takes besides multiplying weights."""

    pass_s: float
    """For a whole pass: the worker's Python, sampling."""
    layer_s: float
    """For each layer, its two all-reduces included."""
    float_s: float
    """For each float of an all-reduce."""


class Machine(Struct, frozen=True, kw_only=True):
    """What was measured, and on what."""

    cores: int
    kernels: str
    multiplying: dict[Precision, Multiplying]
    exchanging: dict[str, Exchanging]
    """By comm and world, such as shm-2."""
    message_s: float
    """A message to a worker and its answer."""

    def bandwidth(self, cores: int) -> float:
        """Bytes per second that so many cores read together, measured by reading weights."""
        alone = max(1 / kernel.alone[0] for kernel in self.multiplying.values())
        together = max(1 / kernel.together[0] for kernel in self.multiplying.values())
        all_cores = together * self.cores
        return min(alone * min(cores, self.cores), max(all_cores, alone))

    def operations(self, dtype: Precision, cores: int) -> float:
        """Operations per second of the kernels with many rows; a multiply-add counts as two."""
        kernel = self.multiplying[dtype]
        per_byte = 2 * ROWS[-1] / BYTES_PER_WEIGHT[dtype]
        if cores == 1:
            return per_byte / kernel.alone[-1]
        return cores * per_byte / kernel.together[-1]


def machine(*, again: bool = False, say: Callable[[str], None] = log.info) -> Machine:
    """As measured before, or `again` now: about half a minute. Raises TpserveError when it fails.

    say: is told that it takes a while.
    """
    path = machine_file()
    if not again:
        with suppress(OSError, msgspec.DecodeError):  # not there yet, or of another version
            return msgspec.json.decode(path.read_bytes(), type=Machine)
    say("measuring what this machine can do, once: about half a minute")
    began = time.monotonic()
    measured = measure(PRECISIONS)
    say(f"measured in {time.monotonic() - began:.1f} s")
    keep(path, measured)
    return measured


def cache_folder() -> Path:
    """Where measurements are kept."""
    return platformdirs.user_cache_path("tpserve")


def machine_file() -> Path:
    """Where this machine's are."""
    return cache_folder() / f"machine-{machine_key()}.json"


def keep(path: Path, value: Struct) -> None:
    """Write a cache file; one that cannot be written is measured anew the next time."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(msgspec.json.encode(value))
        unfinished.replace(path)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error.strerror)


def machine_key() -> str:
    """Names this machine and how it computes, as far as that is known without measuring."""
    processor = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    names = ("TPSERVE_KERNELS", "TPSERVE_ISA", "TPSERVE_PREFETCH")
    kernels = [os.environ.get(name, "") for name in names]
    facts = [_FORMAT, version("tpserve"), socket.gethostname(), _cores(), processor[:1], kernels]
    return sha256(repr(facts).encode()).hexdigest()[:12]


def _cores() -> int:
    return len(os.sched_getaffinity(0))


# --- measuring ------------------------------------------------------------------------------------


def measure(wanted: Collection[Precision]) -> Machine:
    """Now, in those precisions that the kernels know. Raises TpserveError when a probe fails."""
    cores = _cores()
    worlds = [world for world in (2, 4, 8) if world <= max(4, cores)]
    processes = max(*worlds, min(cores, 16))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tpserve-")))
        regions = {world: create_shm_region(world) for world in worlds}
        for region in regions.values():
            stack.callback(os.close, region)
        probes = [stack.enter_context(_Probe(list(regions.values()))) for _ in range(processes)]
        for probe in probes:
            probe.hello()
        known = PRECISIONS if probes[0].kernels != "torch" else _PRECISIONS_OF_TORCH
        dtypes = [dtype for dtype in known if dtype in wanted]
        exchanging = {"local-1": _exchange(probes[:1], "local", None, folder)}
        for world, region in regions.items():
            # gloo takes seconds to start with many ranks, and is not going to be the fastest.
            comms: tuple[Comm, ...] = ("shm", "zmq", "gloo") if world == 2 else ("shm", "zmq")
            for comm in comms:
                found = _exchange(probes[:world], comm, region, folder)
                exchanging[f"{comm}-{world}"] = found
        computing = probes[: min(cores, 16)]
        passes = [{dtype: _multiply(computing, dtype) for dtype in dtypes} for _ in range(_PASSES)]
        return Machine(
            cores=cores,
            kernels=probes[0].kernels,
            multiplying={dtype: _mean([one[dtype] for one in passes]) for dtype in dtypes},
            exchanging=exchanging,
            message_s=_ping(probes[0]),
        )


def _multiply(probes: Sequence["_Probe"], dtype: Precision) -> Multiplying:
    found: dict[str, list[float]] = {}
    size = _weight_bytes()
    made = _ask(probes, weights=dtype, bytes=size, threads=1)[0]["bytes"]
    for name, group in (("alone", probes[:1]), ("together", probes)):
        found[name] = [seconds / made for seconds in _seconds(group)]
    _ask(probes[:1], weights=dtype, bytes=size, threads=len(probes))
    found["threaded"] = [seconds / made * len(probes) for seconds in _seconds(probes[:1])]
    return Multiplying(**found)


def _seconds(group: Sequence["_Probe"]) -> list[float]:
    """What each of them takes on average, by ROWS; with more rows it is not less."""
    means: list[float] = []
    for rows in ROWS:
        mean = statistics.mean(answer["seconds"] for answer in _ask(group, rows=rows))
        means.append(max([mean, *means]))
    return means


def _mean(passes: Sequence[Multiplying]) -> Multiplying:
    """Of each number."""

    def of(values: Callable[[Multiplying], list[float]]) -> list[float]:
        columns = zip(*(values(one) for one in passes), strict=True)
        return [statistics.mean(column) for column in columns]

    return Multiplying(
        alone=of(lambda one: one.alone),
        together=of(lambda one: one.together),
        threaded=of(lambda one: one.threaded),
    )


def mean_of(measured: Sequence[Machine]) -> Machine:
    """Measurements of one machine as one, of the precisions that all have: each number is their mean."""

    def exchanging(name: str) -> Exchanging:
        all_ = [one.exchanging[name] for one in measured]
        return Exchanging(
            pass_s=statistics.mean(one.pass_s for one in all_),
            layer_s=statistics.mean(one.layer_s for one in all_),
            float_s=statistics.mean(one.float_s for one in all_),
        )

    first = measured[0]
    return Machine(
        cores=first.cores,
        kernels=first.kernels,
        multiplying={
            dtype: _mean([one.multiplying[dtype] for one in measured])
            for dtype in first.multiplying
            if all(dtype in one.multiplying for one in measured)
        },
        exchanging={name: exchanging(name) for name in first.exchanging},
        message_s=statistics.mean(one.message_s for one in measured),
    )


def _weight_bytes() -> int:
    return min(_MOST_BYTES, max(_LEAST_BYTES, int(_CACHES * _last_cache_bytes())))


def _exchange(
    probes: Sequence["_Probe"], comm: Comm, region: int | None, folder: Path
) -> Exchanging:
    world = len(probes)
    place = folder / f"{comm}-{world}"
    addresses = {
        "zmq": [f"ipc://{place}.{rank}" for rank in range(world)],
        "gloo": [f"file://{place}"],
    }
    owned = [(shards.start, shards.stop) for shards in assign_shards(world, _SHARDS)]
    for rank, probe in enumerate(probes):
        setup = CommSetup(
            kind=comm,
            rank=rank,
            owned=owned,
            deadline_s=_DEADLINE_S,
            addresses=addresses.get(comm, []),
        )
        probe.write(
            ranks=msgspec.to_builtins(setup),
            region=region if comm == "shm" else None,
            steps=_STEPS[comm],
        )
    answers = [probe.read() for probe in probes]
    return msgspec.convert(answers[0], Exchanging)


def _ping(probe: "_Probe") -> float:
    times = []
    for _ in range(_PINGS):
        began = time.perf_counter()
        _ask([probe])
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _ask(probes: Sequence["_Probe"], **request: object) -> list[dict[str, float]]:
    """All at once."""
    for probe in probes:
        probe.write(**request)
    return [probe.read() for probe in probes]


def _last_cache_bytes() -> int:
    """Of the largest cache that a core of this machine has; 0 where the system does not say."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0))
    return max(sizes)


class _Probe:
    """A process of worker/probe.py."""

    def __init__(self, regions: Sequence[int]) -> None:
        self.kernels = ""
        self._process = subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=regions,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._process.kill()  # it may wait for a peer that is gone
        self._process.communicate()

    def hello(self) -> None:
        """Wait until it is up."""
        self.kernels = str(json.loads(self._line())["kernels"])

    def write(self, **request: object) -> None:
        """Ask."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def read(self) -> dict[str, float]:
        """What it answers."""
        answer: dict[str, Any] = json.loads(self._line())
        return answer

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise TpserveError(f"what this machine can do was not measured: exit code {code}")
        return line
