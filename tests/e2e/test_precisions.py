"""Quantised weights through the running server: one text, whatever computes it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from client.zmq_client import Client
from shared.messages import Precision
from tests.e2e.server import Server
from worker.native.api import native_library

PROMPTS = ["Once upon a time", "Lily wanted a red ball", "The little fox", "One day, Tom"]
DTYPES: tuple[Precision, ...] = ("int8", "int4", "bf16")
ARRANGEMENTS = [(1, "shm", 1), (2, "shm", 1), (3, "zmq", 1), (1, "shm", 2)]
"""Workers, their transport, threads of each."""
FIRST: dict[str, list[list[int]]] = {}
"""Filled by the first arrangement for each precision; the others must agree with it."""

needs_native = pytest.mark.skipif(
    native_library() is None, reason="there is no native library: no C++ compiler to build it"
)


@pytest.fixture(scope="module", params=ARRANGEMENTS, ids=lambda a: "-".join(map(str, a)))
def address(request: pytest.FixtureRequest, story_model: Path) -> Iterator[str]:
    """Of a server that has the story model in every precision, each under its name."""
    workers, comm, threads = request.param
    first, *others = DTYPES
    flags = ("--workers", str(workers), "--comm", comm, "--threads-per-worker", str(threads))
    model = ("--model", f"{first}={story_model}", "--dtype", first)
    with Server(*flags, *model, "--kv-memory", "64M") as server:
        with Client(server.wait_ready()) as client:
            for dtype in others:
                client.load(dtype, story_model, dtype=dtype)
        yield server.address


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_precision_gives_one_text(address: str, dtype: str) -> None:
    with Client(address) as client:

        def stories(prompts: list[str]) -> list[list[int]]:
            streams = [
                client.story(prompt, model=dtype, temperature=0, max_tokens=40)
                for prompt in prompts
            ]
            return [stream.result().token_ids for stream in streams]

        alone = [tokens for prompt in PROMPTS for tokens in stories([prompt])]
        assert stories(PROMPTS * 4) == alone * 4
        assert alone == FIRST.setdefault(dtype, alone)
        (model,) = [model for model in client.models() if model.name == dtype]
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
