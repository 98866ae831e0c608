"""How fast one core goes through layers of TinyLlama-1.1B's shape, with kernels chosen in different ways.

    python -m benchmarks.kernels --dtype int8,bf16 --rows 1,8,32 near far
    python -m benchmarks.kernels --rows 32 avx512vnni avx512bf16
    python -m benchmarks.kernels near other/libtpserve.so

A way is `near` or `far` (TPSERVE_PREFETCH), a level of instructions (TPSERVE_ISA), or another build of
the library. All are loaded into this process and take turns, so that ratios hold on a noisy machine.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import get_args

from benchmarks.interleaved import Ratio, interleave
from benchmarks.scaling.tables import table
from shared.messages import Precision
from shared.precision import BYTES_PER_WEIGHT
from worker.native.api import native_library
from worker.native.build import LIBRARY
from worker.native.library import load_library
from worker.probe import Layers

_BYTES = 96 << 20
"""Of weights: they must not stay in the cache."""
_PREFETCHES = ("near", "far")
_KNOBS = ("TPSERVE_NATIVE_LIBRARY", "TPSERVE_ISA", "TPSERVE_PREFETCH")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("way", nargs="+", help="near, far, a level of instructions, or a library")
    parser.add_argument("--dtype", default="int8", help=f"of {', '.join(get_args(Precision))}")
    parser.add_argument("--rows", default="1", help="tokens at once")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    lines = []
    with tempfile.TemporaryDirectory(prefix="tpserve-") as folder:
        for dtype in args.dtype.split(","):
            made = {way: _layers(way, dtype, Path(folder)) for way in args.way}
            for rows in map(int, args.rows.split(",")):
                lines += _measure(made, dtype, rows, args.rounds)
    columns = ("way", "dtype", "rows", "GB/s", "slow and fast tenth", "GOPS", f"/ {args.way[0]}")
    print("\n".join(table(columns, lines)))


def _layers(way: str, dtype: Precision, folder: Path) -> Layers:
    """Layers of that precision, on a library of their own, which is chosen when it is loaded."""
    own = folder / f"{len(list(folder.iterdir()))}.so"
    shutil.copy(way if Path(way).is_file() else LIBRARY, own)
    knob = "TPSERVE_PREFETCH" if way in _PREFETCHES else "TPSERVE_ISA"
    settings = {"TPSERVE_NATIVE_LIBRARY": str(own)} | ({} if Path(way).is_file() else {knob: way})
    before = {name: os.environ.pop(name, None) for name in _KNOBS}
    os.environ.update(settings)
    try:
        load_library.cache_clear()
        native_library.cache_clear()
        return Layers(dtype, _BYTES, 1)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _measure(
    made: dict[str, Layers], dtype: Precision, rows: int, rounds: int
) -> list[tuple[str, ...]]:
    """Lines of the table."""
    contenders = {way: partial(_gigabytes_per_s, layers, rows) for way, layers in made.items()}
    samples = interleave(contenders, rounds).samples
    first = next(iter(made))
    lines: list[tuple[str, ...]] = []
    for way, speeds in samples.items():
        ordered, tenth, usual = sorted(speeds), len(speeds) // 10, statistics.median(speeds)
        operations = 2 * rows * usual / BYTES_PER_WEIGHT[dtype]
        spread = f"{ordered[tenth]:.1f} to {ordered[-1 - tenth]:.1f}"
        ratio = Ratio(way, first).value(samples)
        line = (f"{usual:.1f}", spread, f"{operations:.0f}", f"{ratio:.2f}")
        lines.append((way, dtype, str(rows), *line))
    return lines


def _gigabytes_per_s(layers: Layers, rows: int) -> float:
    began = time.perf_counter()
    layers.compute(rows)
    return layers.weight_bytes / 1e9 / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
