"""What several tests of the worker need."""

import pytest

from worker.native.api import native_library


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> str:
    """What computes. Both give the same but for rounding."""
    if request.param == "native" and native_library() is None:
        pytest.skip("there is no native library: no C++ compiler when it was to be built")
    return str(request.param)
