"""What peers.py has measured so far: kept part by part, written as Markdown with a picture."""

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.interleaved import Part


@dataclass(frozen=True)
class Measured:
    """A part, as it is kept."""

    title: str
    unit: str
    medians: dict[str, float]
    """By who was measured."""
    markdown: str
    samples: dict[str, Any]

    @classmethod
    def of(cls, part: Part) -> "Measured":
        """From what was just measured."""
        medians = {name: statistics.median(values) for name, values in part.samples.items()}
        return cls(part.title, part.unit, medians, part.as_markdown(), part.as_json())


@dataclass
class Report:
    """A run."""

    facts: dict[str, str]
    """About machine, model and programs; by name."""
    parts: dict[str, list[Measured]] = field(default_factory=dict)
    """By the name that --only knows."""

    def parts_of(self, name: str, measure: Callable[[], Iterator[Part]]) -> Iterator[Measured]:
        """The parts of that name, measured if they are not there; complete once all were taken."""
        if name in self.parts:
            yield from self.parts[name]
            return
        measured = []
        for part in measure():
            measured.append(Measured.of(part))
            yield measured[-1]
        self.parts[name] = measured

    def save(self, path: Path) -> None:
        """Write all of it, or nothing."""
        unfinished = path.with_name(f"{path.name}.unfinished")
        unfinished.write_text(json.dumps(asdict(self), indent=1) + "\n")
        unfinished.replace(path)

    def write(self, path: Path) -> None:
        """Tables, and a picture of the same name beside them."""
        parts = [part for of_name in self.parts.values() for part in of_name]
        picture = path.with_suffix(".png")
        lines = ["# tpserve beside others", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts.items()]
        lines += ["", f"![Medians]({picture.name})"]
        for part in parts:
            lines += ["", part.markdown]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        _draw(parts, picture)


def read_report(path: Path | None, facts: dict[str, str]) -> Report:
    """What is in the file, with the facts of its time; a new one if there is none.

    Raises SystemExit when it is of another model, commit or number of rounds: ratios hold within a
    run only.
    """
    if path is None or not path.exists():
        return Report(facts)
    content = json.loads(path.read_text())
    for name in ("CPU", "model", "tpserve", "rounds"):
        if content["facts"].get(name) != facts[name]:
            raise SystemExit(
                f"{path} was measured with {name} {content['facts'].get(name)!r}, this is"
                f" {facts[name]!r}: name another file"
            )
    parts = {
        name: [Measured(**part) for part in of_name] for name, of_name in content["parts"].items()
    }
    return Report(content["facts"], parts)


_BAR, _EDGES = 0.2, 0.6
"""Inches: of a bar, and of what a panel has besides."""


def _draw(parts: list[Measured], path: Path) -> None:
    """A panel for each part, two beside each other; bars from zero, tpserve's in a colour of their own."""
    mpl.use("Agg")
    rows = [parts[i : i + 2] for i in range(0, len(parts), 2)] or [[]]
    heights = [_EDGES + _BAR * max((len(part.medians) for part in row), default=1) for row in rows]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    panels = figure.subplots(len(rows), 2, squeeze=False, height_ratios=heights).flatten()
    for axes, part in zip(panels, parts, strict=False):
        colors = ["C0" if name.startswith("tpserve") else "silver" for name in part.medians]
        values = list(part.medians.values())
        bars = axes.barh(range(len(values)), values, color=colors)
        labels = [f"{value:,.{2 if value < 10 else 1 if value < 1000 else 0}f}" for value in values]
        axes.bar_label(bars, labels, fontsize=7, padding=2)
        axes.set_xlim(0, 1.15 * max(values))  # room for the labels
        axes.set_yticks(range(len(part.medians)), list(part.medians), fontsize=7)
        axes.invert_yaxis()
        axes.set_title(f"{part.title}, {part.unit}", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(True, axis="x", alpha=0.3)
    for axes in panels[len(parts) :]:
        axes.set_visible(False)
    figure.savefig(path, format="png", dpi=120)
