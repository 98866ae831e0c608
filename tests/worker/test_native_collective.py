"""The native collective under sanitizers: ranks in threads, whose every memory access is watched."""

import os
import subprocess
from pathlib import Path

import pytest

from worker.native.build import SOURCES
from worker.native.toolchain import COMPILE, find_compiler, optimisation

HARNESS = Path(__file__).resolve().parent / "native" / "collective_stress.cpp"
DEADLINE_S = 240

Sanitizers = tuple[str, ...]
COMPILER = find_compiler(os.uname().machine)


@pytest.fixture(
    scope="module",
    params=[("thread",), ("address", "undefined")],
    ids="+".join,
)
def stress(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled harness."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler (apt install g++)")
    sanitizers: Sanitizers = request.param
    folder = tmp_path_factory.mktemp("stress")
    build = [*COMPILER.command, *COMPILE, *optimisation(sanitizers), f"-I{SOURCES}"]

    empty = folder / "empty.cpp"
    empty.write_text("int main() {}\n")
    commands: list[list[str | Path]] = [[*build, empty, "-o", folder / "empty"], [folder / "empty"]]
    for command in commands:
        tried = subprocess.run(command, capture_output=True, text=True)
        if tried.returncode:
            pytest.skip(f"no {'+'.join(sanitizers)} sanitizer here: {tried.stderr[-200:]}")

    made = folder / "collective_stress"
    subprocess.run([*build, HARNESS, SOURCES / "collective.cpp", "-o", made], check=True)
    return made


@pytest.mark.parametrize(("ranks", "rounds"), [(2, 4_000), (3, 2_000), (4, 2_000)])
def test_ranks_read_what_was_posted_and_no_access_races_with_another(
    stress: Path, ranks: int, rounds: int
) -> None:
    run = subprocess.run(
        [stress, str(ranks), str(rounds)], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert (run.returncode, run.stderr) == (0, "")
