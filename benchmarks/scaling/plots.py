"""The pictures of a run: throughput, speed-up against ideal, where a step's time goes, roofline."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.scaling.grid import Test
from benchmarks.scaling.record import Record
from benchmarks.scaling.summary import STEP_TOKENS, Row, cores_of, step_bytes, summarise
from benchmarks.scaling.tables import PLOTS
from shared.errors import ConfigError

_PANELS = 3
"""Beside each other."""


def plot(record: Record, folder: Path) -> None:
    """Write the PNGs that tables.PLOTS names. Raises ConfigError if one cannot be written."""
    mpl.use("Agg")
    rows = summarise(record)
    for name, draw in zip(PLOTS, (_throughput, _speed_up, _latency, _roofline), strict=True):
        figure = Figure(figsize=(9, 5), layout="constrained")
        draw(figure, record, rows)
        try:
            figure.savefig(folder / name, format="png", dpi=150)
        except OSError as error:
            raise ConfigError(f"{folder / name} cannot be written: {error.strerror}") from None


def _throughput(figure: Figure, record: Record, rows: Sequence[Row]) -> None:
    """Bars from zero, a panel for each test."""
    for axes, at, own in _panels(figure, rows):
        spreads = [row.tokens_per_s for row in own]
        ranges = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        axes.barh(at, [s.median for s in spreads], xerr=ranges, error_kw={"linewidth": 0.8})
    figure.suptitle("Tokens per second; lines: lowest and highest round", fontsize=11)


def _speed_up(figure: Figure, record: Record, rows: Sequence[Row]) -> None:
    """Over workers of the fewest threads, a line for each test and precision."""
    axes = figure.add_subplot()
    cores = record.machine.cores
    threads = min((row.configuration.threads for row in rows), default=1)
    series: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.speed_up is not None and row.configuration.threads == threads:
            line = series.setdefault(f"{row.test.name}, {row.configuration.dtype}", {})
            best = max(line.get(row.configuration.workers, 0.0), row.speed_up.median)
            line[row.configuration.workers] = best
    counts = sorted({row.configuration.workers for row in rows})
    least = min(counts, default=1)
    ideal = [min(workers, max(least, cores / threads)) / least for workers in counts]
    axes.plot(counts, ideal, color="gray", linestyle=":", label=f"ideal on {cores} cores")
    for name, line in series.items():
        at = sorted(line)
        axes.plot(at, [line[workers] for workers in at], marker="o", label=name)
    axes.set_xticks(counts)
    axes.set_xlabel("workers of one thread" if threads == 1 else f"workers of {threads} threads")
    axes.set_ylabel("times the speed of the fewest workers")
    _finish(axes, "Speed-up")


def _latency(figure: Figure, record: Record, rows: Sequence[Row]) -> None:
    """Stacked, a panel for each test: a decode step's compute, all-reduce, and the rest."""
    parts: dict[str, Callable[[Row], float]] = {
        "reading at the measured bandwidth": lambda row: min(row.reading_s, row.split.compute_s),
        "computing beyond that": lambda row: max(0.0, row.split.compute_s - row.reading_s),
        "all-reduce": lambda row: row.split.comm_s,
        "neither": lambda row: row.split.other_s,
    }
    handles: list[Artist] = []
    for axes, at, own in _panels(figure, [row for row in rows if row.test.kind == "decode"]):
        handles, left = [], np.zeros(len(own))
        for of in parts.values():
            values = np.array([1e3 * of(row) for row in own])
            handles.append(axes.barh(at, values, left=left).patches[0])
            left += values
    if handles:
        figure.legend(handles, parts, loc="outside lower center", ncols=len(parts), fontsize=8)
    figure.suptitle("Where a decode step's time goes, in milliseconds", fontsize=11)


def _panels(figure: Figure, rows: Sequence[Row]) -> Iterator[tuple[Axes, list[int], list[Row]]]:
    """For each test its panel and its rows, with their places on the axis of configurations."""
    tests = list(dict.fromkeys(row.test for row in rows))
    names = list(dict.fromkeys(row.configuration.name for row in rows))
    across = max(1, min(_PANELS, len(tests)))
    down = max(1, -(-len(tests) // across))
    figure.set_size_inches(9, max(3, down * (1.0 + 0.25 * len(names))))
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes, test in zip(panels, tests, strict=False):
        own = [row for row in rows if row.test == test]
        yield axes, [names.index(row.configuration.name) for row in own], own
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(test.name, fontsize=10)
        axes.grid(True, axis="x", alpha=0.3)
    for axes in panels[len(tests) :]:
        axes.set_visible(False)


def _roofline(figure: Figure, record: Record, rows: Sequence[Row]) -> None:
    """Operations per second over operations per byte, under what the machine was measured to do."""
    axes = figure.add_subplot()
    machine = record.machine
    cores = machine.cores
    intensities = np.logspace(-1, 3.5, 200)
    for dtype in dict.fromkeys(row.configuration.dtype for row in rows):
        roof = np.minimum(intensities * machine.bandwidth(cores), machine.operations(dtype, cores))
        (line,) = axes.plot(intensities, roof / 1e9, label=f"{dtype}, {cores} cores")
        own = [row for row in rows if row.configuration.dtype == dtype]
        for marker, used in (("o", cores), ("x", 1)):
            some = [row for row in own if cores_of(row.configuration, cores) == used]
            axes.plot(
                [_intensity(record, row) for row in some],
                [2e-9 * record.weights * row.tokens_per_s.median for row in some],
                marker,
                color=line.get_color(),
            )
            if cores == 1:
                break
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte read")
    axes.set_ylabel("10^9 operations per second")
    _finish(axes, "Roofline; o: all cores, x: one core")


def _intensity(record: Record, row: Row) -> float:
    """Operations for each byte of weights, keys and values that a step reads."""
    sample = next(
        s for s in record.samples if s.test == row.test and s.configuration == row.configuration
    )
    return 2 * record.weights * _tokens_of_a_step(row.test) / step_bytes(row.test, sample)


def _tokens_of_a_step(test: Test) -> int:
    return min(test.prompt, STEP_TOKENS) if test.kind == "prefill" else test.streams


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
