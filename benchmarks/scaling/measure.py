"""Running servers and what a client measures of them.

A sample repeats its requests until it has taken long enough to be trusted. Where the time went is
the difference of two status answers; workers tell their last times when they rest, so that is
waited for.
"""

import itertools
import os
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.engine import server
from benchmarks.machine import seconds_of_others
from benchmarks.prompts import Prompts
from benchmarks.scaling.grid import Configuration, Test, kv_tokens
from benchmarks.scaling.record import Sample
from client.zmq_client import Client, Stream
from coordinator.planner import PROCESS_BYTES, MemoryPlan, plan_memory
from coordinator.served_model import open_model
from shared.config import Settings
from shared.memory import free_bytes
from shared.messages import BLOCK_TOKENS, Status, Token, WorkerStatus

SAMPLE_S = {"prefill": 2.0, "decode": 0.5}
"""Of requests at least. The first prompt after a pause may take half as long again."""
_SHORT = 16
"""Tokens of a prompt that wakes everything up."""
REST_S = 0.05
"""After which workers have told all their times."""
SILENCE_S = 600.0
GAPS_KEPT = 500
"""Of a sample: enough for its 99th percentile."""
MEMORY_SHARE = 0.8
"""Of the free memory that servers may take together."""


class Running:
    """A server that is up, and its client."""

    def __init__(
        self, model: Path, configuration: Configuration, tests: list[Test], seed: int
    ) -> None:
        """Raises SystemExit when the server does not start; it has said why."""
        self.configuration = configuration
        self._prompts = Prompts(model, seed)
        # The same in every round: what stands before a decode test is read once.
        self._stories = {
            test: Prompts(model, seed + 1 + number).make(test.depth).text
            for number, test in enumerate(tests)
            if test.kind == "decode"
        }
        self._stack = ExitStack()
        with ExitStack() as stack:
            flags = [*configuration.flags(), *_capacity(model, configuration, tests)]
            address = stack.enter_context(server(model, flags))
            self._client = stack.enter_context(Client(address, silence_s=SILENCE_S))
            info = self._client.models()[0]
            self._weight_bytes = info.weight_bytes
            self._kv_token_bytes = sum(info.kv_bytes) // max(1, info.kv_capacity_tokens)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """End the server."""
        self._stack.close()

    def sample(self, test: Test, round_: int) -> Sample:
        """One measurement."""
        if test.kind == "decode":
            self._story(test, 1).result()  # into the cache
        else:
            self._prefill(_SHORT, _Sums())
        time.sleep(REST_S)
        before, others = self._client.status(), seconds_of_others()
        began = time.perf_counter()
        measured = _Sums()
        while time.perf_counter() - began < SAMPLE_S[test.kind]:
            if test.kind == "prefill":
                self._prefill(test.prompt, measured)
            else:
                self._decode(test, measured)
        busy = time.perf_counter() - began
        foreign = seconds_of_others() - others
        time.sleep(REST_S)
        after = self._client.status()
        return Sample(
            round=round_,
            configuration=self.configuration,
            test=test,
            tokens=measured.tokens,
            seconds=measured.seconds,
            ttft_s=measured.ttft_s,
            gaps_s=measured.gaps_s[:GAPS_KEPT],
            busy_s=busy,
            steps=after.totals.steps - before.totals.steps,
            compute_s=[b.compute_s - a.compute_s for a, b in _workers(before, after)],
            comm_s=[b.comm_s - a.comm_s for a, b in _workers(before, after)],
            coordinator_s=_coordinator_s(after) - _coordinator_s(before),
            memory_bytes=[worker.memory_bytes for worker in after.workers],
            weight_bytes=self._weight_bytes,
            kv_token_bytes=self._kv_token_bytes,
            load=os.getloadavg()[0],
            other_cores=max(0.0, foreign / busy),
        )

    def _prefill(self, length: int, measured: "_Sums") -> None:
        """A prompt that nobody has seen before, up to its first new token."""
        prompt = self._prompts.make(length)
        began = time.perf_counter()
        stream = self._client.story(prompt.text, temperature=0, max_tokens=1, ignore_eos=True)
        first = 0.0
        for event in stream.events():
            if isinstance(event, Token) and not first:
                first = time.perf_counter() - began
        usage = stream.result().usage
        measured.tokens += usage.prompt_tokens - usage.cached_tokens
        measured.seconds += first
        measured.ttft_s.append(first)

    def _decode(self, test: Test, measured: "_Sums") -> None:
        """All streams go on from the same prompt; the first one is watched token by token."""
        began = time.perf_counter()
        streams = [self._story(test, test.tokens) for _ in range(test.streams)]
        arrivals: list[tuple[float, int]] = []
        for event in streams[0].events():
            if isinstance(event, Token) and event.token_ids:
                arrivals.append((time.perf_counter(), len(event.token_ids)))
        answers = [stream.result() for stream in streams]
        measured.seconds += time.perf_counter() - began
        measured.tokens += sum(answer.usage.completion_tokens for answer in answers)
        for (before, _), (now, count) in itertools.pairwise(arrivals):
            # Tokens of one message came together: what each took is what they took on average.
            measured.gaps_s += [(now - before) / count] * count

    def _story(self, test: Test, tokens: int) -> Stream:
        return self._client.story(
            self._stories[test], temperature=0, max_tokens=tokens, ignore_eos=True
        )


class _Sums:
    """Of the requests of one sample."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self.ttft_s: list[float] = []
        self.gaps_s: list[float] = []


class Fleet:
    """The servers that are up: as many side by side as memory allows.

    An idle server sleeps, so it takes nothing but memory from the one that is measured. They take turns,
    so the one that was used last is needed last: it makes room.
    """

    def __init__(self, model: Path, tests: list[Test], seed: int) -> None:
        self._model, self._tests, self._seed = model, tests, seed
        self._running: dict[Configuration, Running] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._running:
            self._stop_youngest()

    def get(self, configuration: Configuration) -> Running:
        """The server of a configuration; it is started if it is not up, others are ended for it."""
        running = self._running.pop(configuration, None)
        if running is None:
            needed = needed_bytes(self._model, configuration, self._tests)
            while self._running and needed > free_bytes() * MEMORY_SHARE:
                self._stop_youngest()
            running = Running(self._model, configuration, self._tests, self._seed)
        self._running[configuration] = running  # now the youngest
        return running

    def _stop_youngest(self) -> None:
        self._running.popitem()[1].close()


def needed_bytes(model: Path, configuration: Configuration, tests: list[Test]) -> int:
    """What all workers of a server will take."""
    plan = _plan(model, configuration)
    blocks = kv_tokens(tests) // BLOCK_TOKENS + 1
    parts = zip(plan.weight_bytes, plan.work_bytes, plan.kv_block_bytes, strict=True)
    return sum(PROCESS_BYTES + w + work + blocks * block for w, work, block in parts)


def _capacity(model: Path, configuration: Configuration, tests: list[Test]) -> list[str]:
    """Flags that give a server room for the tests and no more: others stand beside it."""
    blocks = kv_tokens(tests) // BLOCK_TOKENS + 1
    largest = max(_plan(model, configuration).kv_block_bytes)
    mebibytes = blocks * largest // (1 << 20) + 1
    streams = max(test.streams for test in tests)
    return ["--kv-memory", f"{mebibytes}M", "--max-num-seqs", str(max(streams, 1))]


def _plan(model: Path, configuration: Configuration) -> MemoryPlan:
    settings = Settings(
        model={"model": str(model)},
        workers=configuration.workers,
        threads_per_worker=configuration.threads,
        dtype=configuration.dtype,
    )
    opened = open_model("model", str(model), settings)
    return plan_memory(opened.config, opened.on_workers, settings)


def _workers(before: Status, after: Status) -> Iterable[tuple[WorkerStatus, WorkerStatus]]:
    return zip(before.workers, after.workers, strict=True)


def _coordinator_s(status: Status) -> float:
    return status.totals.plan_s + status.totals.other_s
