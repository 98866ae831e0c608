"""Remakes requirements.lock and requirements-dev.lock from the ranges in pyproject.toml.

    .venv/bin/python scripts/lock.py

Asks pip for the newest versions that fit together and installs nothing. Run it with the oldest Python
that is supported: packages may need more there than on newer ones.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNTIME_LOCK = ROOT / "requirements.lock"
DEV_LOCK = ROOT / "requirements-dev.lock"
EDITABLE_BUILD = ["editables"]  # what hatchling asks for besides itself in an editable install
CUDA_PREFIXES = ("cuda-", "nvidia-", "triton")
"""Not pinned: each CUDA build of torch names its own exactly, the CPU build has none."""

Pins = dict[str, str]
"""Version by name."""


def resolve(requirements: Iterable[str]) -> Pins:
    """The newest versions of `requirements` and of all they need. Exits when there are none."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report), *requirements]
        if subprocess.run(command).returncode:
            sys.exit("pip found no set of versions; the locks are as they were")
        items = json.loads(report.read_text())["install"]
    found = ((item["metadata"]["name"], item["metadata"]["version"]) for item in items)
    # Without the local part: 2.13.0 takes 2.13.0+cpu as well as a CUDA build.
    return {
        name: version.partition("+")[0]
        for name, version in found
        if not name.lower().startswith(CUDA_PREFIXES)
    }


def write(path: Path, what: str, pins: Pins, includes: Iterable[str] = ()) -> None:
    """One `name==version` a line, under a comment that says what they are for."""
    lines = [f"# {what}", "# Made from pyproject.toml by scripts/lock.py; do not edit by hand."]
    lines += [f"-r {name}" for name in includes]
    lines += [f"{name}=={pins[name]}" for name in sorted(pins, key=str.lower)]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Resolve what the server needs, then on top of exactly that what tests and checks need."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = pyproject["project"]
    needed = [*project["dependencies"], *pyproject["build-system"]["requires"], *EDITABLE_BUILD]
    runtime = resolve(needed)
    as_resolved = [f"{name}=={version}" for name, version in runtime.items()]
    dev = resolve([*project["optional-dependencies"]["dev"], *as_resolved])
    write(RUNTIME_LOCK, "What the server needs, and what builds the project.", runtime)
    write(
        DEV_LOCK,
        "What tests and checks need besides.",
        {name: version for name, version in dev.items() if name not in runtime},
        includes=[RUNTIME_LOCK.name],
    )


if __name__ == "__main__":
    main()
