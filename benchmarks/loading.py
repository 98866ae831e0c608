"""How long a model takes to load, and how much memory while it does.

    python benchmarks/loading.py --model DIR [--dtypes bf16,int8] [--workers 1,2] [--rounds 3]

For each precision and number of workers: with the checkpoint not in memory ("cold": its pages are
dropped from the page cache first), with it in memory ("warm"), and for int8 and int4 from the shard
cache, warm. Everything takes turns, once a round. The peak is of the memory that no file backs, of
the worker that takes most; beside it what its shard takes when it is loaded.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import psutil

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from client.zmq_client import Client  # noqa: E402 - runnable without being installed

_SAMPLE_S = 0.01


class Loaded(NamedTuple):
    """One load."""

    seconds: float
    peak_mb: float
    """Above what the worker had before."""
    shard_mb: float


class Case(NamedTuple):
    """What is loaded, and how."""

    workers: int
    dtype: str
    source: str


def drop_from_page_cache(folder: Path) -> None:
    """Have the files read from the disk next time."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_into_page_cache(folder: Path) -> None:
    """Have the files in memory."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def unbacked_bytes(pid: int) -> int:
    """Resident memory of a process that is no file's."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def load(client: Client, workers: list[int], model: Path, dtype: str) -> Loaded:
    """Load it beside the demo story model, and unload it again."""
    before = {pid: unbacked_bytes(pid) for pid in workers}
    peak, stop = dict(before), threading.Event()

    def watch() -> None:
        while not stop.wait(_SAMPLE_S):
            for pid in workers:
                peak[pid] = max(peak[pid], unbacked_bytes(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    info = client.load("measured", model, dtype=dtype)  # type: ignore[arg-type]
    seconds = time.perf_counter() - began
    stop.set()
    watcher.join()
    client.unload("measured")
    above = max(peak[pid] - before[pid] for pid in workers)
    return Loaded(seconds, above / 1e6, max(info.weight_bytes) / 1e6)


def measure(case: Case, model: Path, cache: Path) -> Loaded:
    """In a server of its own."""
    command = [sys.executable, "-P", "-m", "coordinator", "--no-http", "--database", "none"]
    command += ["--listen", "tcp://127.0.0.1:*"]
    command += ["--workers", str(case.workers), "--threads-per-worker", "1", "--kv-memory", "256M"]
    command += ["--model", f"story={PROJECT / 'models' / 'demo-story'}", "--log-level", "warning"]
    if case.source == "shard cache":
        command += ["--shard-cache", str(cache)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("ready "):
            sys.exit("the server did not start")
        workers = [child.pid for child in psutil.Process(process.pid).children()]
        with Client(line.split()[1], silence_s=600) as client:
            if case.source == "shard cache":
                load(client, workers, model, case.dtype)  # fills it, the first time
            if case.source == "cold":
                drop_from_page_cache(model)
            else:
                read_into_page_cache(model)
            return load(client, workers, model, case.dtype)
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtypes", default="bf16,int8")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cases = [
        Case(int(workers), dtype, source)
        for workers in args.workers.split(",")
        for dtype in args.dtypes.split(",")
        for source in ("cold", "warm", "shard cache")
        if source != "shard cache" or dtype.startswith("int")
    ]
    found: dict[Case, list[Loaded]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as cache:
        for number in range(args.rounds):
            for case in cases:
                found[case].append(measure(case, args.model.resolve(), Path(cache)))
                print(f"  {number + 1}/{args.rounds} {case}: {found[case][-1]}", file=sys.stderr)
    print("| workers | weights | from | seconds | peak above before, MB | shard, MB |")
    print("|---|---|---|---|---|---|")
    for case, loads in found.items():
        seconds = statistics.median(one.seconds for one in loads)
        peak, shard = max(one.peak_mb for one in loads), loads[0].shard_mb
        print(
            f"| {case.workers} | {case.dtype} | {case.source} | {seconds:.1f} "
            f"| {peak:,.0f} | {shard:,.0f} |"
        )


if __name__ == "__main__":
    main()
