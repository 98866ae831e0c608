"""What several tests of the worker need."""

import pytest

from tests.worker import interpreter
from worker.native.api import native_library

if interpreter.INTERPRETED:
    interpreter.repair()


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
