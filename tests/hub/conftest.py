"""A stub of the hub, and the tpserve command pointed to it with an empty cache."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.e2e.server import TPSERVE
from tests.hub.stub import Stub

Run = Callable[..., subprocess.CompletedProcess[str]]

MODEL_FILES = {
    path.name: path.read_bytes() for path in (PROJECT / "models" / "demo-story").iterdir()
}


@pytest.fixture
def hub() -> Iterator[Stub]:
    """Has org/story, with files that nobody needs."""
    with Stub() as stub:
        stub.add("org/story", MODEL_FILES | UNNEEDED)
        yield stub


UNNEEDED = {
    ".gitattributes": b"x",
    "pytorch_model.bin": b"x" * 1000,
    "consolidated.safetensors": b"x" * 1000,
    "story.Q8_0.gguf": b"x" * 1000,
    "original/model.safetensors": b"x" * 1000,
    "onnx/model.onnx": b"x" * 1000,
}


@pytest.fixture
def hub_env(hub: Stub, tmp_path: Path) -> dict[str, str]:
    """Without a token; HF_ variables of whoever runs the tests do not count."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
    return clean | home | {"NO_PROXY": "127.0.0.1"}


@pytest.fixture
def tpserve(hub_env: dict[str, str], tmp_path: Path) -> Run:
    """Runs the command to its end, in an empty folder; more environment as keywords."""
    (tmp_path / "here").mkdir()

    def run(*arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [TPSERVE, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=tmp_path / "here",
            env=hub_env | env,
        )

    return run
