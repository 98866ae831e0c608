"""What several tests of the worker need."""

from pathlib import Path

import pytest

from benchmarks.scaling.random_model import random_checkpoint
from tests.worker import interpreter
from worker.native.api import native_library

if interpreter.INTERPRETED:
    interpreter.repair()


@pytest.fixture(scope="session")
def tiny_gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights, for which nothing is needed beside the project."""
    return random_checkpoint("tiny-gqa", tmp_path_factory.mktemp("tiny-gqa"))


@pytest.fixture(params=["torch", "native"])
def host_kernels(request: pytest.FixtureRequest) -> str:
    """What computes on the CPU. Both give the same but for rounding."""
    return _usable(request.param)


@pytest.fixture(params=["torch", "native", "device"])
def kernels(request: pytest.FixtureRequest) -> str:
    """What computes; device is what GPUs run, here on the CPU. All give the same but for rounding."""
    return _usable(request.param)


def _usable(kernels: str) -> str:
    if kernels == "native" and native_library() is None:
        pytest.skip("there is no native library: no C++ compiler when it was to be built")
    return kernels
