"""The report of `tpserve bench` as Markdown and as CSV."""

import csv
import io
from collections.abc import Iterable, Sequence

from benchmarks.scaling.record import Record
from benchmarks.scaling.summary import Row, Spread, summarise

PLOTS = {
    "throughput.png": "Tokens per second",
    "speedup.png": "Speed-up against ideal",
    "latency.png": "Where a decode step's time goes",
    "roofline.png": "Roofline",
}
"""File names, and what they show."""


def markdown(record: Record) -> str:
    """Header, tables, notes, pictures."""
    rows = summarise(record)
    lines = ["# tpserve bench", ""]
    lines += [f"- {name}: {value}" for name, value in record.facts.items()]
    lines += _load_lines(record)
    lines += ["", "## Throughput", "", *_throughput(rows)]
    lines += ["", "## Latency, and where the time of a step goes", "", *_latency(rows)]
    lines += ["", "## Memory", "", *_memory(rows)]
    lines += ["", *(f"- {note}" for note in _notes(record, rows))]
    lines += ["", *(f"![{title}]({name})" for name, title in PLOTS.items())]
    return "\n".join(lines) + "\n"


def as_csv(record: Record) -> str:
    """One line for each configuration and test; times in seconds, sizes in bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for row in summarise(record):
        c, split = row.configuration, row.split
        speed = row.speed_up
        writer.writerow(
            [
                *(c.workers, c.threads, c.dtype, c.comm, row.test.name, row.test.kind),
                *(row.test.prompt, row.test.streams, row.test.tokens),
                *(row.tokens_per_s.median, row.tokens_per_s.low, row.tokens_per_s.high),
                *((speed.median, speed.low, speed.high) if speed else ("", "", "")),
                _or_empty(row.efficiency),
                _or_empty(row.limit),
                _or_empty(row.share_of_limit),
                _or_empty(row.predicted),
                *(row.ttft_s or ("", "")),
                *(row.gap_s or ("", "")),
                *(split.step_s, split.compute_s, split.comm_s, split.other_s),
                *(split.coordinator_s, row.exchanged_bytes, row.memory_bytes),
            ]
        )
    return text.getvalue()


_CSV_COLUMNS = (
    *("workers", "threads", "dtype", "comm", "test", "kind", "prompt", "streams", "tokens"),
    *("tokens_per_s", "tokens_per_s_low", "tokens_per_s_high"),
    *("speed_up", "speed_up_low", "speed_up_high", "efficiency"),
    *("bandwidth_limit_tokens_per_s", "share_of_limit", "predicted_tokens_per_s"),
    *("ttft_p50_s", "ttft_p99_s", "time_per_token_p50_s", "time_per_token_p99_s"),
    *("step_s", "compute_s", "all_reduce_s", "other_s", "coordinator_s"),
    *("exchanged_bytes_per_token", "memory_bytes_per_worker"),
)


def _throughput(rows: Sequence[Row]) -> list[str]:
    return table(
        [
            *("workers x threads", "test", "tokens/s", "range", "speed-up", "by round"),
            *("efficiency", "share of the bandwidth limit", "predicted", "predicted / measured"),
        ],
        (
            [
                row.configuration.name,
                row.test.name,
                number(row.tokens_per_s.median),
                _range(row.tokens_per_s),
                "" if row.speed_up is None else f"{row.speed_up.median:.2f}",
                "" if row.speed_up is None else _range(row.speed_up),
                "" if row.efficiency is None else f"{100 * row.efficiency:.0f} %",
                "" if row.share_of_limit is None else f"{100 * row.share_of_limit:.0f} %",
                "" if row.predicted is None else number(row.predicted),
                "" if row.predicted is None else f"{row.predicted / row.tokens_per_s.median:.2f}",
            ]
            for row in rows
        ),
    )


def _latency(rows: Sequence[Row]) -> list[str]:
    return table(
        [
            *("workers x threads", "test", "first token p50 / p99", "per token p50 / p99"),
            *("a step", "reading alone", "computing", "all-reduce", "neither", "coordinator busy"),
            "exchanged per token",
        ],
        (
            [
                row.configuration.name,
                row.test.name,
                _both(row.ttft_s),
                _both(row.gap_s),
                milliseconds(row.split.step_s),
                "" if row.limit is None else milliseconds(row.reading_s),
                milliseconds(row.split.compute_s),
                milliseconds(row.split.comm_s),
                milliseconds(row.split.other_s),
                milliseconds(row.split.coordinator_s),
                f"{row.exchanged_bytes / 1024:,.0f} KiB",
            ]
            for row in rows
        ),
    )


def _memory(rows: Sequence[Row]) -> list[str]:
    largest: dict[str, int] = {}
    for row in rows:
        name = row.configuration.name
        largest[name] = max(largest.get(name, 0), row.memory_bytes)
    return table(
        ["workers x threads", "memory of the largest worker"],
        ([name, f"{size / 1e6:,.0f} MB"] for name, size in largest.items()),
    )


def _load_lines(record: Record) -> list[str]:
    if not record.samples:
        return []
    loads = [sample.load for sample in record.samples]
    others = sum(sample.other_cores for sample in record.samples) / len(record.samples)
    return [
        f"- load during (1 minute): {min(loads):.1f} to {max(loads):.1f}",
        f"- other programs kept {others:.2f} cores busy on average",
    ]


def _notes(record: Record, rows: Sequence[Row]) -> list[str]:
    request, machine = record.request, record.machine
    notes = [
        f"Medians of {request.rounds} rounds, with the lowest and highest; in each round every"
        " configuration had its turn, in another order than before. Speed-ups are ratios within a"
        " round, against the fewest workers and threads of the same precision.",
        "ppN: reading a prompt of N tokens that no cache knows, to the first new token. tgN @ dM:"
        " writing N tokens after a prompt of about M that is in the cache, all streams together.",
        f"The bandwidth limit: weights, keys and values of a step, read at"
        f" {machine.bandwidth(1) / 1e9:.1f} GB/s by one core,"
        f" {machine.bandwidth(machine.cores) / 1e9:.1f} by all {machine.cores}. More than 100 %:"
        " they stay in the processor's cache.",
        "Predicted: by the planner's model of a step, with what was measured of the machine. It does"
        " not know that a small model stays in the cache.",
        "Reading alone: the step at the bandwidth limit; it is part of computing."
        " Computing and all-reduce: the mean of the workers, waiting for slower workers included in"
        " the all-reduce. Neither: workers had nothing to do. The coordinator is mostly busy while"
        " workers compute.",
        "Exchanged: what all workers together post to the others in the all-reduces of a token,"
        " computed from the shapes; candidates of sampling add a few bytes.",
    ]
    if any(row.configuration.workers * row.configuration.threads > machine.cores for row in rows):
        notes.append(
            f"More threads than the {machine.cores} cores take turns on them: efficiency counts cores."
        )
    return [*notes, *record.left_out]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def number(value: float) -> str:
    """With three digits or so."""
    if value >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def milliseconds(seconds: float) -> str:
    """With three digits or so."""
    return f"{number(1e3 * seconds)} ms"


def _range(spread: Spread) -> str:
    return f"{number(spread.low)} to {number(spread.high)}"


def _both(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else " / ".join(milliseconds(seconds) for seconds in pair)


def _or_empty(value: float | None) -> float | str:
    return "" if value is None else value
