"""Servers with --device cuda: what GPUs compute, here on the CPU where there is none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from client.zmq_client import Client
from shared.errors import TpserveError
from tests.e2e.server import Server

ON_CPU = {"TPSERVE_TEST_DEVICE": "cpu"}
ON_ONE_GPU = {"TPSERVE_TEST_DEVICE": "cuda:0"}
EACH_ON_ITS_OWN: dict[str, str] = {}
CONFIGURATIONS = [
    pytest.param((1, "shm", ON_CPU), id="shm-1"),
    pytest.param((2, "nccl", ON_CPU), id="nccl-2"),
    pytest.param((2, "gloo", ON_CPU), id="gloo-2"),
    pytest.param((3, "shm", ON_CPU), id="shm-3"),
    pytest.param((1, "shm", EACH_ON_ITS_OWN), id="gpu-1", marks=pytest.mark.gpu),
    pytest.param((2, "gloo", ON_ONE_GPU), id="gpu-gloo-2", marks=pytest.mark.gpu),
    pytest.param((2, "nccl", EACH_ON_ITS_OWN), id="gpu-nccl-2", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def address(request: pytest.FixtureRequest, story_model: Path) -> Iterator[str]:
    workers, comm, environment = request.param
    if environment is not ON_CPU:
        needed = 1 if environment is ON_ONE_GPU else workers
        if torch.cuda.device_count() < needed:
            pytest.skip(f"torch sees {torch.cuda.device_count()} GPUs of {needed}")
    # fp32: the reference's precision, whatever the checkpoint's is.
    flags = ("--workers", str(workers), "--comm", comm, "--model", f"story={story_model}")
    precision = ("--dtype", "fp32", "--kv-dtype", "fp32", "--kv-memory", "64M")
    with Server(*flags, *precision, "--device", "cuda", env=environment) as server:
        yield server.wait_ready()


def test_greedy_stories_are_the_reference(address: str, golden: list[dict[str, Any]]) -> None:
    with Client(address) as client:
        kernels = client.status().kernels
        assert kernels == "torch on cpu" or (" on " in kernels and torch.cuda.is_available())
        streams = [client.story(case["prompt"], temperature=0, max_tokens=200) for case in golden]
        for stream, case in zip(streams, golden, strict=True):
            assert stream.result().token_ids == case["new_ids"]


# Filled by the first configuration; every other one must agree with it.
SAMPLED: list[tuple[dict[str, Any], list[int]]] = [
    ({"temperature": 1.0}, []),
    ({"temperature": 0.8, "top_k": 40}, []),
    ({"temperature": 1.2, "top_p": 0.9}, []),
    ({"temperature": 1.0, "min_p": 0.02}, []),
    ({"temperature": 1.0, "presence_penalty": 0.5}, []),
]


def test_a_seed_gives_one_story_for_any_number_of_workers(address: str) -> None:
    with Client(address) as client:
        for sampling, expected in SAMPLED:
            done = client.story("Once upon a time", max_tokens=24, seed=7, **sampling).result()
            expected[:] = expected or done.token_ids
            assert done.token_ids == expected


def test_deterministic_kernels_that_are_not_there_end_the_start(story_model: Path) -> None:
    flags = ("--model", f"story={story_model}", "--device", "cuda", "--deterministic")
    with Server(*flags, env=ON_CPU) as server:
        assert server.wait_exit(120) != 0
        log = "".join(server.log)
    assert "--deterministic needs the Triton kernels, and they are for GPUs, not for cpu" in log
    assert "Traceback" not in log


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_start_says_so(story_model: Path) -> None:
    with Server("--model", f"story={story_model}", "--device", "cuda") as server:
        assert server.wait_exit(120) != 0
        log = "".join(server.log)
    assert "--device cuda needs" in log
    assert "or use --device cpu" in log or "or --device cpu" in log
    assert "Traceback" not in log


def test_out_of_memory_in_a_step_ends_its_jobs_and_nothing_else(
    story_model: Path, golden: list[dict[str, Any]]
) -> None:
    """One rank alone: steps of more than 100 tokens have no room."""
    environment = {**ON_CPU, "TPSERVE_TEST_DEVICE_ROOM": "100"}
    flags = ("--model", f"story={story_model}", "--device", "cuda", "--kv-memory", "64M")
    with Server(*flags, env=environment) as server, Client(server.wait_ready()) as client:
        for _ in range(8):  # more often than workers could be lost
            with pytest.raises(TpserveError, match="no room for a step of 1 sequences") as caught:
                client.story("word " * 150, temperature=0, max_tokens=4).result()
            assert caught.value.code == "out_of_memory"
        case = golden[0]
        done = client.story(case["prompt"], temperature=0, max_tokens=200).result()
        assert done.token_ids == case["new_ids"]
        assert client.status().epoch == 1


def test_out_of_memory_among_several_ranks_is_an_error_of_the_job_that_wants_it(
    story_model: Path,
) -> None:
    environment = {**ON_CPU, "TPSERVE_TEST_DEVICE_ROOM": "100"}
    flags = ("--model", f"story={story_model}", "--device", "cuda", "--workers", "2")
    with Server(*flags, "--kv-memory", "64M", env=environment) as server:
        client = Client(server.wait_ready())
        with client, pytest.raises(TpserveError, match="TPSERVE_TEST_DEVICE_ROOM is 100") as caught:
            client.story("word " * 150, temperature=0, max_tokens=4).result()
        assert caught.value.code == "job_kills_workers"
