"""Measurements that take turns, and the ratios between them.

On a machine whose speed drifts, two numbers can only be compared when they were taken side by side:
so each round takes one sample of everything, in another order than the round before. What else ran
meanwhile is counted, because it does not hurt all alike: threads that wait for each other in a loop,
as OpenMP's do, become many times slower when one of them has to share its core.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.machine import seconds_of_others

Samples = Mapping[str, Sequence[float]]
"""By what was measured, a value for each round."""


class LostError(SystemExit):
    """What was to be measured has ended by itself. Ends a benchmark that cannot go on without it."""


@dataclass(frozen=True)
class Rounds:
    """What `interleave` found."""

    samples: Samples
    other_cores: float
    """Cores that other programs, or other guests of the host, kept busy on average."""
    lost: Mapping[str, str] = field(default_factory=dict)
    """Contenders that have no samples, as they ended by themselves: how."""


def interleave(contenders: Mapping[str, Callable[[], float]], rounds: int) -> Rounds:
    """Sample every contender once a round. A first round, in which all get warm, does not count."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    lost: dict[str, str] = {}
    began, others = time.monotonic(), seconds_of_others()
    for turn in range(rounds + 1):
        order = list(contenders)
        first = turn % len(order)
        for name in order[first:] + order[:first]:
            if name in lost:
                continue
            try:
                value = contenders[name]()
            except LostError as error:
                lost[name] = str(error)
                del samples[name]
                print(f"  {turn}/{rounds} {name}: {error}", file=sys.stderr, flush=True)
                continue
            print(f"  {turn}/{rounds} {name}: {value:,.1f}", file=sys.stderr, flush=True)
            if turn:
                samples[name].append(value)
    passed = time.monotonic() - began
    return Rounds(samples, max(0.0, (seconds_of_others() - others) / passed), lost)


@dataclass(frozen=True)
class Ratio:
    """How many times one thing is another."""

    above: str
    below: str
    goal: float | None = None
    """The least that it should be."""

    def value(self, samples: Samples) -> float:
        """The ratio of the medians."""
        return statistics.median(samples[self.above]) / statistics.median(samples[self.below])

    def spread(self, samples: Samples) -> tuple[float, float]:
        """The lowest and the highest of the ratios within a round."""
        pairs = zip(samples[self.above], samples[self.below], strict=True)
        ratios = [above / below for above, below in pairs]
        return min(ratios), max(ratios)


@dataclass(frozen=True)
class Part:
    """A group of measurements in one unit that were taken together."""

    title: str
    unit: str
    rounds: Rounds
    ratios: Sequence[Ratio]
    goals: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def samples(self) -> Samples:
        """By what was measured."""
        return self.rounds.samples

    def as_json(self) -> dict[str, object]:
        """Everything, samples included."""
        return {
            "title": self.title,
            "unit": self.unit,
            "samples": self.samples,
            "other_cores": self.rounds.other_cores,
            "lost": self.rounds.lost,
            "goals": self.goals,
            "ratios": [
                {
                    "of": ratio.above,
                    "to": ratio.below,
                    "ratio": ratio.value(self.samples),
                    "spread": ratio.spread(self.samples),
                    "goal": ratio.goal,
                }
                for ratio in self.ratios
                if self._has(ratio)
            ],
            "notes": self.notes,
        }

    def as_markdown(self) -> str:
        """Two tables: medians with their range, ratios with their spread."""
        measured = [
            f"| {name} | {_plain(statistics.median(values))} | {_plain(min(values))} to"
            f" {_plain(max(values))} | {_plain(self.goals.get(name))} |"
            for name, values in self.samples.items()
        ]
        ratios = [
            f"| {ratio.above} | {ratio.below} | {ratio.value(self.samples):.2f} |"
            f" {' to '.join(f'{end:.2f}' for end in ratio.spread(self.samples))} |"
            f" {_plain(ratio.goal)} |"
            for ratio in self.ratios
            if self._has(ratio)
        ]
        lines = [
            f"## {self.title}",
            "",
            f"| {self.unit} | median | range | goal |",
            "|---|---|---|---|",
        ]
        lines += measured
        if ratios:
            lines += ["", "| what | to what | ratio | by round | goal |", "|---|---|---|---|---|"]
            lines += ratios
        others = f"Other programs kept {self.rounds.other_cores:.2f} cores busy meanwhile."
        lost = [f"{name} is left out: {how}." for name, how in self.rounds.lost.items()]
        lines += itertools.chain.from_iterable(("", note) for note in (*self.notes, *lost, others))
        return "\n".join(lines)

    def _has(self, ratio: Ratio) -> bool:
        """Whether both sides were measured: a peer may not be there."""
        return ratio.above in self.samples and ratio.below in self.samples


def _plain(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1_000 else f"{value:.3g}"
