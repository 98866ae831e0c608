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


def _draw(parts: list[Measured], path: Path) -> None:
    """A panel for each part, bars from zero."""
    mpl.use("Agg")
    figure = Figure(figsize=(9, 1 + 2.2 * len(parts)), layout="constrained")
    panels = figure.subplots(max(1, len(parts)), squeeze=False).flatten()
    for axes, part in zip(panels, parts, strict=False):
        bars = axes.barh(range(len(part.medians)), list(part.medians.values()))
        axes.bar_label(bars, fmt="{:,.1f}", fontsize=7, padding=2)
        axes.set_yticks(range(len(part.medians)), list(part.medians), fontsize=7)
        axes.invert_yaxis()
        axes.set_title(f"{part.title}, {part.unit}", fontsize=10)
        axes.grid(True, axis="x", alpha=0.3)
    figure.savefig(path, format="png", dpi=150)
