"""From samples to the numbers of the report: medians, spreads, ratios within the run, shares of limits.

Plain arithmetic on a Record; nothing is measured here.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.scaling.grid import Configuration, Test
from benchmarks.scaling.record import Record, Sample
from coordinator.step_model import Choice, StepModel
from shared.config import Settings
from shared.precision import kv_precision

VIRTUAL_SHARDS = Settings().virtual_shards
STEP_TOKENS = Settings().max_batched_tokens
"""Of a prompt, that a step reads at most."""


@dataclass(frozen=True)
class Spread:
    """A median with its range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value for each round."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Split:
    """Where the mean step's time went, in seconds."""

    step_s: float
    compute_s: float
    """In kernels, the mean of the workers."""
    comm_s: float
    """In collectives, waiting for slower workers included; the mean of the workers."""
    other_s: float
    """The workers had nothing to do: coordinator, messages, the client."""
    coordinator_s: float
    """In which the coordinator was busy, mostly while workers computed."""


@dataclass(frozen=True)
class Row:
    """One test of one configuration."""

    configuration: Configuration
    test: Test
    tokens_per_s: Spread
    speed_up: Spread | None
    """Times the baseline, in the same rounds; None: there is no baseline."""
    efficiency: float | None
    """Speed-up by how many times as many cores it was given."""
    limit: float | None
    """Decode: tokens per second if reading weights, keys and values were all there is to do."""
    predicted: float | None
    """Tokens per second that the planner expects; None: of kernels that were not measured."""
    ttft_s: tuple[float, float] | None
    """Prefill: the 50th and 99th percentile."""
    gap_s: tuple[float, float] | None
    """Decode: the same of the time per output token."""
    split: Split
    exchanged_bytes: int
    """For a token, by all workers together."""
    memory_bytes: int
    """Of the largest worker."""

    @property
    def reading_s(self) -> float:
        """Of a decode step: reading weights, keys and values, if they are read at full bandwidth."""
        return 0.0 if self.limit is None else self.test.streams / self.limit

    @property
    def share_of_limit(self) -> float | None:
        """Of `limit`; more than 1 where weights stay in the processor's cache."""
        return None if self.limit is None else self.tokens_per_s.median / self.limit


def summarise(record: Record) -> list[Row]:
    """A row for each configuration and test that has samples, by test."""
    cells: dict[tuple[Test, Configuration], list[Sample]] = {}
    for sample in record.samples:
        cells.setdefault((sample.test, sample.configuration), []).append(sample)
    tests = list(dict.fromkeys(test for test, _ in cells))
    order = list(dict.fromkeys(configuration for _, configuration in cells))
    return [
        _row(record, test, configuration, cells)
        for test in tests
        for configuration in sorted(order, key=_cost)
        if (test, configuration) in cells
    ]


def baseline(configuration: Configuration, others: Sequence[Configuration]) -> Configuration:
    """What it is compared with: the fewest workers, then threads, of the same precision."""
    return min((c for c in others if c.dtype == configuration.dtype), key=_cost)


def cores_of(configuration: Configuration, cores: int) -> int:
    """Cores that its threads can keep busy."""
    return min(configuration.workers * configuration.threads, cores)


def percentiles(values: Sequence[float]) -> tuple[float, float] | None:
    """The 50th and the 99th."""
    if not values:
        return None
    middle, high = np.percentile(values, (50, 99))
    return float(middle), float(high)


def _cost(configuration: Configuration) -> tuple[str, int, int, str]:
    return (
        configuration.dtype,
        configuration.workers,
        configuration.threads,
        configuration.comm,
    )


def _row(
    record: Record,
    test: Test,
    configuration: Configuration,
    cells: dict[tuple[Test, Configuration], list[Sample]],
) -> Row:
    samples = cells[test, configuration]
    base = baseline(configuration, [c for t, c in cells if t == test])
    cores = record.machine.cores
    ratios = _ratios(samples, cells[test, base])
    speed_up = Spread.of(ratios) if ratios else None
    given = cores_of(configuration, cores) / cores_of(base, cores)
    return Row(
        configuration=configuration,
        test=test,
        tokens_per_s=Spread.of([sample.tokens_per_s for sample in samples]),
        speed_up=speed_up,
        efficiency=None if speed_up is None else speed_up.median / given,
        limit=_limit(record, test, configuration, samples[0]),
        predicted=predict(record, test, configuration),
        ttft_s=percentiles([s for sample in samples for s in sample.ttft_s]),
        gap_s=percentiles([s for sample in samples for s in sample.gaps_s]),
        split=split(samples),
        exchanged_bytes=record.exchanged_bytes.get(configuration.workers, 0),
        memory_bytes=max(max(sample.memory_bytes) for sample in samples),
    )


def predict(record: Record, test: Test, configuration: Configuration) -> float | None:
    """Of the model of a step, with what was measured of the machine."""
    choice = Choice(
        workers=configuration.workers,
        threads=configuration.threads,
        dtype=configuration.dtype,
        kv_dtype=kv_precision("auto", configuration.dtype),
        comm="local" if configuration.workers == 1 else configuration.comm,
    )
    steps = StepModel(record.machine, record.config, VIRTUAL_SHARDS)
    if not steps.knows(choice):
        return None
    if test.kind == "prefill":
        return steps.prefill_tokens_per_s(choice, test.prompt, STEP_TOKENS)
    return steps.decode_tokens_per_s(choice, test.streams, test.depth + test.tokens // 2)


def _ratios(samples: Sequence[Sample], base: Sequence[Sample]) -> list[float]:
    """Round by round, because the machine's speed drifts."""
    rates = {sample.round: sample.tokens_per_s for sample in base}
    return [s.tokens_per_s / rates[s.round] for s in samples if s.round in rates]


def step_bytes(test: Test, sample: Sample) -> float:
    """Weights, and keys and values of what came before, that a decode step reads."""
    depth = test.depth + test.tokens / 2
    return sum(sample.weight_bytes) + test.streams * depth * sample.kv_token_bytes


def _limit(
    record: Record, test: Test, configuration: Configuration, sample: Sample
) -> float | None:
    if test.kind == "prefill":
        return None
    bandwidth = record.machine.bandwidth(cores_of(configuration, record.machine.cores))
    return test.streams * bandwidth / step_bytes(test, sample)


def split(samples: Sequence[Sample]) -> Split:
    """The mean step of some samples."""
    steps = max(1, sum(sample.steps for sample in samples))

    def per_step(of: Callable[[Sample], float]) -> float:
        return sum(map(of, samples)) / steps

    step_s = per_step(lambda s: s.busy_s)
    compute_s = per_step(lambda s: statistics.mean(s.compute_s))
    comm_s = per_step(lambda s: statistics.mean(s.comm_s))
    return Split(
        step_s=step_s,
        compute_s=compute_s,
        comm_s=comm_s,
        other_s=max(0.0, step_s - compute_s - comm_s),
        coordinator_s=per_step(lambda s: s.coordinator_s),
    )
