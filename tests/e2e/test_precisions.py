"""Quantised weights through the running server: one text, whatever computes it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from client.zmq_client import Client
from tests.e2e.server import Server
from worker.native.api import native_library

PROMPTS = ["Once upon a time", "Lily wanted a red ball", "The little fox", "One day, Tom"]
CONFIGURATIONS = [
    (dtype, workers, comm, threads)
    for dtype in ("int8", "int4", "bf16")
    for workers, comm, threads in ((1, "shm", 1), (2, "shm", 1), (3, "zmq", 1), (1, "shm", 2))
]
FIRST: dict[str, list[list[int]]] = {}
"""Filled by the first configuration of each precision; the others must agree with it."""

needs_native = pytest.mark.skipif(
    native_library() is None, reason="there is no native library: no C++ compiler to build it"
)


@pytest.fixture(scope="module", params=CONFIGURATIONS, ids=lambda c: "-".join(map(str, c)))
def precise(request: pytest.FixtureRequest, story_model: Path) -> Iterator[tuple[str, str]]:
    dtype, workers, comm, threads = request.param
    flags = ("--dtype", dtype, "--workers", str(workers), "--comm", comm)
    model = ("--model", f"story={story_model}", "--threads-per-worker", str(threads))
    with Server(*flags, *model) as server:
        yield dtype, server.wait_ready()


@needs_native
def test_a_precision_gives_one_text(precise: tuple[str, str]) -> None:
    dtype, address = precise
    with Client(address) as client:
        alone = [client.story(p, temperature=0, max_tokens=40).result().token_ids for p in PROMPTS]
        streams = [client.story(p, temperature=0, max_tokens=40) for p in PROMPTS * 4]
        together = [stream.result().token_ids for stream in streams]
        assert together == alone * 4
        assert alone == FIRST.setdefault(dtype, alone)
        (model,) = client.models()
        assert (model.dtype, model.kv_dtype) == (dtype, "bf16")
        assert client.status().kernels.startswith("native ")


def test_torch_refuses_what_it_cannot_compute(story_model: Path) -> None:
    arguments = ("--model", f"story={story_model}", "--dtype", "int8")
    with Server(*arguments, env={"TPSERVE_KERNELS": "torch"}) as server:
        assert server.wait_exit(60) != 0
        log = "".join(server.log)
    assert "--dtype int8 needs the native kernels, and the native library is not there" in log
    assert "use one of fp32, bf16, fp16" in log
    assert "Traceback" not in log
