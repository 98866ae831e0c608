"""How long an all-reduce takes: a table over transports, world sizes and lengths.

    python benchmarks/allreduce.py [--comms program,shm,...] [--worlds 2,4] [--virtual-shards 8]

Every rank is a process. All combinations of transport and world are open at once and take turns, so
that a busy moment of the machine does not fall on one of them alone; those that wait sleep.

    program      shared memory, as a program of the native library uses it: from writing the roots
                 into the buffer to the total. The loop (allreduce_loop.cpp) is compiled first
    shm          shared memory, called from Python; the rounds are the native library's
    shm-python   the same without the library
    zmq, gloo    sockets, called from Python

Only those called from Python also add up the virtual shards of the rank itself.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from shared.sharding import assign_shards  # noqa: E402
from shared.shm import create_shm_region  # noqa: E402
from shared.worker_messages import CommSetup  # noqa: E402
from worker.comm.base import Communicator  # noqa: E402
from worker.comm.open import open_communicator  # noqa: E402
from worker.native.library import load_library  # noqa: E402
from worker.native.toolchain import COMPILE, RELEASE, find_compiler  # noqa: E402

COMMS = ("program", "shm", "shm-python", "zmq", "gloo")
LENGTHS = (128, 2_048, 16_384, 131_072, 1 << 20)
TURNS = 5
SECONDS_PER_TURN = 0.1
"""About; of one transport, world and length."""
DEADLINE_S = 60.0


class Group:
    """The rank processes of one transport and world."""

    def __init__(self, kind: str, world: int, virtual_shards: int, folder: Path) -> None:
        self.kind, self.world = kind, world
        self._folder = folder
        self.samples: dict[int, list[float]] = {length: [] for length in LENGTHS}
        place = folder / f"{kind}-{world}"
        addresses = [f"ipc://{place}.{rank}" for rank in range(world)] if kind == "zmq" else []
        if kind == "gloo":
            addresses = [f"file://{place}"]
        owned = [(run.start, run.stop) for run in assign_shards(world, virtual_shards)]
        transport = kind if kind in ("zmq", "gloo") else "shm"
        region = create_shm_region(world) if transport == "shm" else None
        self._ranks = [
            self._start(
                msgspec.convert(
                    {
                        "kind": transport,
                        "rank": rank,
                        "owned": owned,
                        "deadline_s": DEADLINE_S,
                        "addresses": addresses,
                    },
                    CommSetup,
                ),
                region,
            )
            for rank in range(world)
        ]
        if region is not None:
            os.close(region)

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._ranks:
            process.communicate()

    def take_turn(self, length: int) -> None:
        """All ranks reduce vectors of `length` floats for a while; rank 0 says how long it took."""
        for process in self._ranks:
            assert process.stdin is not None
            process.stdin.write(f"{length}\n")
            process.stdin.flush()
        answers = [self._read_line(process) for process in self._ranks]
        self.samples[length] += json.loads(answers[0])

    def _start(self, setup: CommSetup, region: int | None) -> subprocess.Popen[str]:
        options = ["--rank", msgspec.json.encode(setup).decode()]
        if region is not None:
            options += ["--region", str(region)]
        if self.kind == "program":
            options += ["--loop", str(loop_path(self._folder))]
        kernels = {"shm-python": "torch", "shm": "native", "program": "native"}.get(self.kind, "")
        return subprocess.Popen(
            [sys.executable, __file__, *options],
            env={**os.environ, "TPSERVE_KERNELS": kernels},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[] if region is None else [region],
        )

    @staticmethod
    def _read_line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"a rank ended with exit code {process.wait()}")
        return line


class PythonLoop:
    """All-reduces of one length, each called from Python."""

    def __init__(self, comm: Communicator, shards: int, length: int) -> None:
        self._comm = comm
        self._partials = np.zeros((shards, length), np.float32)

    def run(self, rounds: int) -> list[float]:
        """The seconds that each round took."""
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            self._comm.all_reduce_tree(self._partials)
            times.append(time.perf_counter() - began)
        return times


class NativeLoop:
    """All-reduces of one length in allreduce_loop.cpp."""

    def __init__(self, comm: Communicator, path: str, length: int) -> None:
        self._comm, self._function = comm, ctypes.CDLL(path).all_reduce_rounds
        self._x = np.zeros(length, np.float32)
        self._roots = np.array(comm.tree.roots_per_rank, np.int32)
        self._additions = np.array(comm.tree.global_additions, np.int32)

    def run(self, rounds: int) -> list[float]:
        """The seconds that each round took."""
        times = np.empty(rounds)
        silent = self._function(
            ctypes.c_void_p(self._comm.native),
            self._comm.rank,
            self._comm.world,
            ctypes.c_void_p(self._roots.ctypes.data),
            ctypes.c_void_p(self._additions.ctypes.data),
            len(self._additions),
            ctypes.c_void_p(self._x.ctypes.data),
            self._x.size,
            rounds,
            ctypes.c_void_p(times.ctypes.data),
        )
        if silent >= 0:
            raise self._comm.lost(silent, "benchmark")
        return [float(seconds) for seconds in times]


def rank_main(setup: CommSetup, region: int | None, loop_path: str | None) -> None:
    """A rank: one turn for each line of standard input, its times in seconds as a line of output."""
    comm = open_communicator(setup, region)
    start, stop = setup.owned[setup.rank]
    for line in sys.stdin:
        length = int(line)
        loop = (
            NativeLoop(comm, loop_path, length)
            if loop_path
            else PythonLoop(comm, stop - start, length)
        )
        comm.barrier()
        per_round = max(statistics.mean(loop.run(3)), 1e-7)
        # All ranks have to make the same number of calls: that of the one that wants most.
        wanted = np.array([min(2_000, max(3, int(SECONDS_PER_TURN / per_round)))])
        rounds = int(comm.exchange_small(wanted).max())
        print(json.dumps(loop.run(rounds)), flush=True)
    comm.close()


def loop_path(folder: Path) -> Path:
    """Where the compiled allreduce_loop.cpp is."""
    return folder / "allreduce_loop.so"


def compile_loop(folder: Path) -> None:
    """For this machine, its kernels apart: those are the library's."""
    compiler = find_compiler(os.uname().machine)
    if compiler is None:
        raise SystemExit("there is no C++ compiler for --comms program (apt install g++)")
    source = Path(__file__).with_name("allreduce_loop.cpp")
    library = load_library()
    assert library is not None
    command: list[str | Path] = [*compiler.command, *COMPILE, *RELEASE, "-march=native", "-shared"]
    subprocess.run([*command, source, library._name, "-o", loop_path(folder)], check=True)


def table(groups: Sequence[Group]) -> str:
    """Markdown: a row for each transport and world, medians of rank 0 in microseconds."""
    lines = [
        "| transport | ranks | " + " | ".join(f"{length:,} floats" for length in LENGTHS) + " |",
        "|---|---|" + "---|" * len(LENGTHS),
    ]
    for group in groups:
        medians = [statistics.median(group.samples[length]) * 1e6 for length in LENGTHS]
        cells = " | ".join(
            f"{median:,.1f}" if median < 100 else f"{median:,.0f}" for median in medians
        )
        lines.append(f"| {group.kind} | {group.world} | {cells} |")
    return "\n".join(lines)


def usable_comms() -> list[str]:
    """Without the native library there are fewer."""
    if load_library() is not None:
        return list(COMMS)
    print("there is no native library (python -m worker.native.build)", file=sys.stderr)
    return [kind for kind in COMMS if kind not in ("program", "shm")]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--comms", help="transports, by comma (all there are)")
    parser.add_argument("--worlds", default="2,4", help="numbers of ranks, by comma")
    parser.add_argument("--virtual-shards", type=int, default=8)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--region", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        rank_main(msgspec.json.decode(options.rank, type=CommSetup), options.region, options.loop)
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        comms = options.comms.split(",") if options.comms else usable_comms()
        if "program" in comms:
            compile_loop(folder)
        groups = [
            stack.enter_context(Group(kind, int(world), options.virtual_shards, folder))
            for world in options.worlds.split(",")
            for kind in comms
        ]
        for _ in range(TURNS):
            for length in LENGTHS:
                for group in groups:
                    group.take_turn(length)
        print(
            f"Medians in microseconds, {options.virtual_shards} virtual shards,"
            f" {len(os.sched_getaffinity(0))} cores:\n\n{table(groups)}"
        )


if __name__ == "__main__":
    main()
