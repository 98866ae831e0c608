"""What several test packages need: the reference material beside the project, a PostgreSQL server."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.postgres import Postgres, PostgresMissingError

PROJECT = Path(__file__).resolve().parent.parent
REFERENCE = PROJECT.parent / "shared"


def pytest_configure() -> None:
    """Who is started in the background ignores Ctrl-C, and would have all that it starts ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["TPSERVE_DATABASE"] = "none"  # the user's own sessions are no place for tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that are slow as a whole come first, or the last one would run on alone in the end."""

    def is_quick(item: pytest.Item) -> bool:
        file = item.getparent(pytest.Module)
        return file is None or all(mark.name != "slow" for mark in file.own_markers)

    items.sort(key=is_quick)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A temporary folder for sockets: the path of tmp_path may be too long for theirs."""
    with tempfile.TemporaryDirectory(prefix="tests-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder with the reference model, golden texts and tools."""
    if not (REFERENCE / "golden").is_dir():
        pytest.skip("the reference material ../shared is not here")
    return REFERENCE


@pytest.fixture(scope="session")
def story_model(reference: Path) -> Path:
    """TinyStories-656K."""
    return reference / "models" / "story"


@pytest.fixture(scope="session")
def golden(reference: Path) -> list[dict[str, Any]]:
    """Greedy continuations of the story model, as transformers writes them."""
    cases: list[dict[str, Any]] = json.loads(
        (reference / "golden" / "story_greedy.json").read_text()
    )["cases"]
    return cases


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL database: that of TPSERVE_TEST_POSTGRES, or one of a server for these tests."""
    if url := os.environ.get("TPSERVE_TEST_POSTGRES"):
        yield url
        return
    with start_postgres() as postgres:
        yield postgres.url


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A PostgreSQL server that the test may stop and start."""
    with start_postgres() as postgres:
        yield postgres


def start_postgres() -> Postgres:
    """Skips the test where there is none."""
    try:
        return Postgres()
    except PostgresMissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def make_checkpoint(
    reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Write (once) a checkpoint with random weights in a real model's shape."""
    made: dict[tuple[str, str], Path] = {}

    def make(preset: str, dtype: str = "fp32") -> Path:
        if (preset, dtype) not in made:
            folder = tmp_path_factory.mktemp(preset)
            tool = reference / "tools" / "make_checkpoint.py"
            command = [sys.executable, str(tool), preset, str(folder), "--dtype", dtype]
            subprocess.run(command, check=True)
            made[preset, dtype] = folder
        return made[preset, dtype]

    return make
