"""`--workers auto`: a server that has chosen for itself, and says so."""

from pathlib import Path

import msgspec
import pytest

from client.zmq_client import Client
from coordinator import machine
from tests.benchmarks.records import made_up_machine
from tests.e2e.server import Server, run_tpserve

SLOW_MEMORY = 1e6
"""Bytes per second: so slow that the smallest model is worth a worker on each core."""


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine of two cores is in the cache, so that nothing need be measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    slow = made_up_machine(cores=2, bandwidth=SLOW_MEMORY, threads_cost=2.0)
    machine.keep(machine.machine_file(), slow)


@pytest.mark.usefixtures("measured")
def test_a_server_chooses_its_workers_and_serves(story_model: Path) -> None:
    flags = ["--workers", "auto", "--virtual-shards", "2", "--dtype", "fp32"]
    with (
        Server(*flags, "--model", f"story={story_model}") as server,
        Client(server.wait_ready()) as client,
    ):
        status = client.status()
        assert len(status.workers) == 2
        assert status.comm == "shm"
        done = client.story("Once upon a time", temperature=0, max_tokens=5).result()
        assert done.usage.completion_tokens == 5


@pytest.mark.usefixtures("measured")
def test_a_server_chooses_among_the_precisions_that_it_may(story_model: Path) -> None:
    flags = ["--workers", "auto", "--virtual-shards", "2", "--dtype", "fp32"]
    with (
        Server(*flags, "--auto-dtypes", "int8", "--model", f"story={story_model}") as server,
        Client(server.wait_ready()) as client,
    ):
        assert client.models()[0].dtype == "int8"


@pytest.mark.usefixtures("measured")
def test_plan_prints_speeds_and_auto_is_what_it_finds_fastest(story_model: Path) -> None:
    shown = run_tpserve(["plan", str(story_model), "--workers", "auto", "--virtual-shards", "2"])
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert sum(line.startswith("worker ") for line in lines) == 2
    assert any(line.startswith("2 x 1 fp32") for line in lines)
    assert lines[-1] == "fits"
    assert "predicted" not in run_tpserve(["plan", str(story_model), "--no-speed"]).stdout


def test_what_cannot_be_chosen_is_refused() -> None:
    refused = run_tpserve(["serve", "--workers", "2", "--auto-dtypes", "int8"])
    assert refused.returncode == 2
    assert "with --workers auto only" in refused.stderr


def test_the_cache_is_measured_anew_when_it_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = made_up_machine()
    said: list[str] = []
    monkeypatch.setattr(machine, "measure", lambda _: found)
    machine.machine_file().parent.mkdir(parents=True)
    machine.machine_file().write_text("{}")
    assert machine.machine(say=said.append) == found
    assert msgspec.json.decode(machine.machine_file().read_bytes(), type=machine.Machine) == found
    assert len(said) == 2
    assert machine.machine(say=said.append) == found
    assert len(said) == 2
