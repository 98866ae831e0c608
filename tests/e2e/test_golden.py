"""The reference continuations, token for token, for any number of workers, transport and kernels."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.zmq_client import Client
from shared.messages import Done
from tests.e2e.server import Server, run_tpserve
from worker.native.api import native_library

CONFIGURATIONS = [
    *[(workers, "shm", "native") for workers in (1, 2, 3, 4, 8)],
    *[(workers, "zmq", "native") for workers in (3, 8)],
    (2, "gloo", "native"),
    (1, "shm", "torch"),
    (3, "shm", "torch"),
    (2, "zmq", "torch"),
]


@pytest.fixture(
    scope="module",
    params=CONFIGURATIONS,
    ids=[f"{kernels}-{comm}-{workers}" for workers, comm, kernels in CONFIGURATIONS],
)
def address(request: pytest.FixtureRequest, story_model: Path) -> Iterator[str]:
    workers, comm, kernels = request.param
    if kernels == "native" and native_library() is None:
        pytest.skip("there is no native library: no C++ compiler when it was to be built")
    arguments = ("--workers", str(workers), "--comm", comm, "--model", f"story={story_model}")
    with Server(*arguments, env={"TPSERVE_KERNELS": kernels}) as server:
        yield server.wait_ready()


def test_greedy_stories_are_the_reference(address: str, golden: list[dict[str, Any]]) -> None:
    with Client(address) as client:
        for case in golden:  # alone
            done = client.story(case["prompt"], temperature=0, max_tokens=200).result()
            assert_equal(done, case)
        streams = [client.story(case["prompt"], temperature=0, max_tokens=200) for case in golden]
        for stream, case in zip(streams, golden, strict=True):  # all at once
            assert_equal(stream.result(), case)


def assert_equal(done: Done, case: dict[str, Any]) -> None:
    assert done.token_ids == case["new_ids"]
    assert case["prompt"] + done.text == case["text"]


def test_the_command_line_prints_the_reference(address: str, golden: list[dict[str, Any]]) -> None:
    flags = ("--greedy", "--max-tokens", "200", "--server", address)
    run = run_tpserve(["story", golden[0]["prompt"], *flags])
    assert run.returncode == 0, run.stderr
    assert run.stdout.rstrip("\n") == golden[0]["text"]
    assert golden[0]["text"].startswith(
        "Once upon a time, a little girl named Lily lived in a small house with her mom, dad, and "
        "her dog, Spot, Spot, loved to play all day"
    )


def test_a_seed_gives_the_same_story_for_any_number_of_workers(address: str) -> None:
    with Client(address) as client:
        for sampling, expected in SAMPLED:
            done = client.story("Once upon a time", max_tokens=24, seed=7, **sampling).result()
            assert done.token_ids == expected.setdefault("ids", done.token_ids)


# Filled by the first configuration; every other one must agree with it.
SAMPLED: list[tuple[dict[str, Any], dict[str, list[int]]]] = [
    ({"temperature": 1.0}, {}),
    ({"temperature": 0.8, "top_k": 40}, {}),
    ({"temperature": 1.2, "top_p": 0.9}, {}),
    ({"temperature": 1.5, "top_p": 0.99, "top_k": 500}, {}),
]
