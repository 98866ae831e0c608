"""`python -m worker.probe`: what one process measures of the machine, alone and with others."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from shared.shm import create_shm_region

SMALL = 1 << 20


class Probe:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def write(self, **request: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def ask(self, **request: object) -> Any:
        self.write(**request)
        return self.read()


@contextmanager
def probe(region: int | None = None) -> Iterator[Probe]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "worker.probe"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[] if region is None else [region],
    )
    try:
        found = Probe(process)
        assert found.read()["kernels"]
        yield found
    finally:
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_multiplying_takes_longer_for_more_rows() -> None:
    with probe() as one:
        assert one.ask() == {}
        assert one.ask(weights="bf16", bytes=SMALL, threads=1)["bytes"] > SMALL
        few, many = (one.ask(rows=rows)["seconds"] for rows in (1, 128))
        assert 0 < few < many


@pytest.mark.parametrize("comm", ["shm", "zmq"])
def test_two_ranks_measure_what_a_layer_takes(comm: str, tmp_path: Any) -> None:
    region = create_shm_region(2)
    with ExitStack() as stack:
        stack.callback(os.close, region)
        ranks = [stack.enter_context(probe(region)) for _ in range(2)]
        for rank, one in enumerate(ranks):
            setup = {"kind": comm, "rank": rank, "owned": [[0, 4], [4, 8]], "deadline_s": 60.0}
            addresses = [f"ipc://{tmp_path}/{peer}" for peer in range(2)] if comm == "zmq" else []
            one.write(ranks={**setup, "addresses": addresses}, region=region, steps=5)
        for answer in [one.read() for one in ranks]:
            assert answer.keys() == {"pass_s", "layer_s", "float_s"}
            assert answer["pass_s"] + answer["layer_s"] > 0
