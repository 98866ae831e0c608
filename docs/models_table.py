"""Writes the table of docs/models.md from what the tests of the architectures measure.

    .venv/bin/python docs/models_table.py

Runs tests/worker/test_architectures.py and puts its results between the markers of the page.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PAGE = PROJECT / "docs" / "models.md"
BEGIN, END = "<!-- table: docs/models_table.py -->\n", "<!-- end of the table -->\n"
COLUMNS = ("architecture", "logits, native", "logits, torch", "greedy token", "workers", "int8")


def measured() -> dict[str, list[dict[str, str]]]:
    """The properties that each test recorded, by case. Exits with the tests' output if one fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-o", "junit_family=legacy"]
        ran = subprocess.run(
            [*command, f"--junitxml={report}", "tests/worker/test_architectures.py"],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode:
            sys.exit(ran.stdout[-2000:] + ran.stderr)
        tree = ET.parse(report)
    cases: dict[str, list[dict[str, str]]] = defaultdict(list)
    for test in tree.iter("testcase"):
        found = {p.attrib["name"]: p.attrib["value"] for p in test.iter("property")}
        if "case" in found:
            cases[found["case"]].append(found)
    return cases


def table(cases: dict[str, list[dict[str, str]]]) -> str:
    """Markdown; errors are the worst of all worker counts."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for case, results in cases.items():
        forward = [r for r in results if "logits" in r]
        workers = sorted({int(r["workers"]) for r in forward})
        greedy = all(r["greedy"] == "True" for r in forward)
        cells = [case]
        for kernels in ("native", "torch"):
            errors = [float(r["logits"]) for r in forward if r["kernels"] == kernels]
            cells.append(f"{max(errors):.0e}" if errors else "not run")
        cells += ["same" if greedy else "differs", ", ".join(map(str, workers))]
        int8 = [float(r["int8"]) for r in results if "int8" in r]
        cells.append(f"{max(int8):.1e}" if int8 else "not run")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Replace what stands between the markers."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + BEGIN + table(measured()) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
