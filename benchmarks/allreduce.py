"""How long an all-reduce takes: a table over transports, world sizes and lengths.

    python benchmarks/allreduce.py [--comms shm,zmq,gloo] [--worlds 2,4] [--virtual-shards 8]

Every rank is a process. All combinations of transport and world are open at once and take turns, so
that a busy moment of the machine does not fall on one of them alone; those that wait sleep.
"""

import argparse
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

from shared.messages import CommSetup  # noqa: E402 - runnable without being installed
from shared.sharding import assign_shards  # noqa: E402
from shared.shm import create_shm_region  # noqa: E402
from worker.comm.open import open_communicator  # noqa: E402

LENGTHS = (128, 2_048, 16_384, 131_072, 1 << 20)
TURNS = 5
SECONDS_PER_TURN = 0.1
"""About; of one transport, world and length."""
DEADLINE_S = 60.0


class Group:
    """The rank processes of one transport and world."""

    def __init__(self, kind: str, world: int, virtual_shards: int, folder: Path) -> None:
        self.kind, self.world = kind, world
        self.samples: dict[int, list[float]] = {length: [] for length in LENGTHS}
        place = folder / f"{kind}-{world}"
        addresses = [f"ipc://{place}.{rank}" for rank in range(world)] if kind == "zmq" else []
        if kind == "gloo":
            addresses = [f"file://{place}"]
        owned = [(run.start, run.stop) for run in assign_shards(world, virtual_shards)]
        region = create_shm_region(world) if kind == "shm" else None
        self._ranks = [
            self._start(
                msgspec.convert(
                    {
                        "kind": kind,
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

    @staticmethod
    def _start(setup: CommSetup, region: int | None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                sys.executable,
                __file__,
                "--rank",
                msgspec.json.encode(setup).decode(),
                *([] if region is None else ["--region", str(region)]),
            ],
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


def rank_main(setup: CommSetup, region: int | None) -> None:
    """A rank: one turn for each line of standard input, its times in seconds as a line of output."""
    comm = open_communicator(setup, region)
    start, stop = setup.owned[setup.rank]
    for line in sys.stdin:
        partials = np.zeros((stop - start, int(line)), np.float32)
        comm.barrier()
        began = time.perf_counter()
        for _ in range(3):
            comm.all_reduce_tree(partials)
        # All ranks have to make the same number of calls: that of the one that wants most.
        per_call = (time.perf_counter() - began) / 3
        wanted = np.array([min(2_000, max(3, int(SECONDS_PER_TURN / per_call)))])
        times = []
        for _ in range(int(comm.exchange_small(wanted).max())):
            began = time.perf_counter()
            comm.all_reduce_tree(partials)
            times.append(time.perf_counter() - began)
        print(json.dumps(times), flush=True)
    comm.close()


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--comms", default="shm,zmq,gloo", help="transports, by comma")
    parser.add_argument("--worlds", default="2,4", help="numbers of ranks, by comma")
    parser.add_argument("--virtual-shards", type=int, default=8)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--region", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        rank_main(msgspec.json.decode(options.rank, type=CommSetup), options.region)
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        groups = [
            stack.enter_context(Group(kind, int(world), options.virtual_shards, folder))
            for world in options.worlds.split(",")
            for kind in options.comms.split(",")
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
