"""What a run of `tpserve bench` measures: configurations of the server, and tests of each."""

import itertools
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from shared.errors import ConfigError
from shared.messages import BLOCK_TOKENS, Precision

Comm = Literal["shm", "zmq", "gloo"]
KINDS = ("prefill", "decode")


class Configuration(Struct, frozen=True):
    """A server that is measured."""

    workers: int
    threads: int
    """Of each worker."""
    dtype: Precision
    comm: Comm = "shm"

    @property
    def name(self) -> str:
        """As reports call it."""
        comm = f", {self.comm}" if self.workers > 1 and self.comm != "shm" else ""
        return f"{self.workers} x {self.threads}, {self.dtype}{comm}"

    def flags(self) -> list[str]:
        """Of `tpserve serve`."""
        return [
            *("--workers", str(self.workers), "--threads-per-worker", str(self.threads)),
            *("--dtype", self.dtype, "--comm", self.comm),
        ]


class Test(Struct, frozen=True):
    """What is asked of a server."""

    __test__ = False  # not one of pytest's

    kind: Literal["prefill", "decode"]
    prompt: int
    """Tokens that are read, or that stand before those that are written."""
    streams: int = 1
    tokens: int = 1
    """That each stream writes."""

    @property
    def name(self) -> str:
        """As llama-bench calls it."""
        if self.kind == "prefill":
            return f"pp{self.prompt}"
        streams = f", {self.streams} streams" if self.streams > 1 else ""
        return f"tg{self.tokens} @ d{self.prompt}{streams}"

    @property
    def depth(self) -> int:
        """Tokens of a decode test's prompt: whole KV blocks and one more, which is left to compute."""
        return max(1, self.prompt // BLOCK_TOKENS) * BLOCK_TOKENS + 1

    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt + 1 if self.kind == "prefill" else self.depth + self.tokens


class Request(Struct, frozen=True, kw_only=True):
    """What was asked for; with the model and the machine it decides everything else."""

    model: str
    """Folder."""
    workers: list[int]
    threads: list[int]
    """0: cores / workers, at least 1."""
    dtypes: list[Precision]
    comms: list[Comm]
    streams: list[int]
    prompts: list[int]
    tokens: int
    rounds: int
    seed: int


def configurations(request: Request, cores: int) -> list[Configuration]:
    """Every server of the request, once each; a single worker has nothing to exchange."""
    found = [
        Configuration(
            workers, threads or max(1, cores // workers), dtype, comm if workers > 1 else "shm"
        )
        for dtype, workers, threads, comm in itertools.product(
            request.dtypes, request.workers, request.threads, request.comms
        )
    ]
    return list(dict.fromkeys(found))


def wanted_tests(request: Request, longest: int) -> tuple[list[Test], list[Test]]:
    """The tests of each server, and those that are left out: more than `longest` tokens.

    Raises ConfigError when none is left.
    """
    wanted = [Test("prefill", prompt) for prompt in request.prompts]
    wanted += [
        Test("decode", prompt, streams, request.tokens)
        for prompt, streams in itertools.product(request.prompts, request.streams)
    ]
    fitting = [test for test in wanted if test.longest() <= longest]
    if not fitting:
        raise ConfigError(
            f"no test fits: the model's context is {longest} tokens, the shortest test needs"
            f" {min(test.longest() for test in wanted)}: ask for a shorter --prompt or fewer --tokens"
        )
    return fitting, [test for test in wanted if test not in fitting]


def kv_tokens(wanted: Sequence[Test]) -> int:
    """Tokens whose KV must be there at once, so that no decode test loses its prompt to another."""
    kept = sum(test.depth for test in wanted if test.kind == "decode")
    written = max((test.streams * (test.tokens + BLOCK_TOKENS) for test in wanted), default=0)
    read = max(test.prompt for test in wanted) + BLOCK_TOKENS
    return 2 * (kept + written + read)
