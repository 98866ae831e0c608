"""The part of peers.py that compares servers: the same client, over HTTP, of each of them.

Users who arrive together send prompts of their own and read a stream each, as people do with
OpenAI's API. Counted are all new tokens by the time until the last stream has ended, reading the
prompts included, and the time to the first token of the user in the middle.
"""

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.contestants import KV_MEMORY, SILENCE_S
from benchmarks.interleaved import Part, Ratio, Rounds, interleave
from benchmarks.peer_files import LLAMA_CPP_BUILT, Installed, gguf
from benchmarks.peer_parts import CORES, Bench
from benchmarks.prompts import Prompts

STREAMS = (1, 8, 32)
PROMPT_TOKENS = 64
TOKENS = 32
"""That each user wants."""
CONTEXT = 256
"""Of each stream; more than both together."""
START_S = 900.0
"""vLLM compiles when it starts for the first time."""
NAME = "model"
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Served:
    """What the users of one wave saw."""

    tokens_per_s: float
    """All new tokens by the time from the first request to the end of the last answer."""
    first_token_s: float
    """The median of the users."""


class HttpServer(AbstractContextManager["HttpServer"]):
    """A server with OpenAI's API on a free port, ended with the context."""

    def __init__(
        self,
        command: Sequence[str],
        health: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """command: without host and port. health: answers 200 once the model can be used.

        Raises SystemExit when it ends before that.
        """
        port = _free_port()
        self._url = f"http://{HOST}:{port}"
        flags = [word.format(host=HOST, port=port) for word in command]
        with ExitStack() as stack:
            self._log = stack.enter_context(tempfile.TemporaryFile())
            self._process = subprocess.Popen(
                flags, stdout=self._log, stderr=subprocess.STDOUT, env=environment
            )
            stack.callback(_end, self._process)
            self._wait_until_ready(health)
            self._running = stack.pop_all()

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def serve(self, prompts: Sequence[str], tokens: int) -> Served:
        """A user for each prompt, all at once."""
        return asyncio.run(self._serve(prompts, tokens))

    async def _serve(self, prompts: Sequence[str], tokens: int) -> Served:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=self._url, timeout=SILENCE_S, limits=limits
        ) as client:
            began = time.perf_counter()
            users = await asyncio.gather(*(_stream(client, prompt, tokens) for prompt in prompts))
            seconds = time.perf_counter() - began
        return Served(
            tokens_per_s=sum(user.tokens for user in users) / seconds,
            first_token_s=statistics.median(user.first_token_s for user in users),
        )

    def _wait_until_ready(self, health: str) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with suppress(httpx.TransportError):  # nobody listens yet
                if httpx.get(self._url + health, timeout=5).status_code == httpx.codes.OK:
                    return
            time.sleep(0.2)
        self._log.seek(0)
        end = self._log.read()[-4000:].decode(errors="replace")
        raise SystemExit(f"{self._process.args!r} did not become ready:\n{end}")


@dataclass(frozen=True)
class _User:
    tokens: int
    first_token_s: float


async def _stream(client: httpx.AsyncClient, prompt: str, tokens: int) -> _User:
    """One user's request; its tokens as the server counts them."""
    request = {
        "model": NAME,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = time.perf_counter()
    first, counted = 0.0, 0
    async with client.stream("POST", "/v1/completions", json=request) as answer:
        if answer.is_error:
            raise SystemExit(f"{answer.status_code}: {(await answer.aread()).decode()}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event.get("choices") and not first:
                first = time.perf_counter() - began
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
    if counted != tokens:
        raise SystemExit(f"{client.base_url}: {counted} tokens came, not {tokens}")
    return _User(counted, first)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tpserve(model: Path, dtype: str) -> HttpServer:
    """A worker of one thread for each core."""
    command = [str(Path(sys.executable).parent / "tpserve"), "serve", "--database", "none"]
    command += ["--listen", "tcp://127.0.0.1:*", "--http", "{host}:{port}"]
    command += ["--workers", str(CORES), "--threads-per-worker", "1", "--kv-memory", KV_MEMORY]
    return HttpServer([*command, "--model", f"{NAME}={model}", "--dtype", dtype], "/health/ready")


def llama_server(peer: Installed, file: Path) -> HttpServer:
    """llama.cpp's own server, with as many slots as there may be users."""
    command = [str(LLAMA_CPP_BUILT / "llama-server"), "--model", str(file), "--alias", NAME]
    command += ["--host", "{host}", "--port", "{port}", "--threads", str(CORES)]
    command += ["--parallel", str(max(STREAMS)), "--ctx-size", str(CONTEXT * max(STREAMS))]
    return HttpServer(command, "/health", peer.variables())


def vllm_server(peer: Installed, model: Path, dtype: str) -> HttpServer:
    """vLLM's OpenAI server; dtype as torch calls it."""
    command = [str(peer.python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", NAME, "--dtype", dtype]
    command += ["--host", "{host}", "--port", "{port}", "--max-model-len", str(CONTEXT)]
    command += ["--max-num-seqs", str(max(STREAMS))]
    return HttpServer(command, "/health", peer.variables())


@dataclass
class _Watched:
    """A server whose waves of users are sampled; keeps the times to the first token as well."""

    server: HttpServer
    prompts: Prompts
    first_token_s: dict[int, list[float]] = field(default_factory=dict)
    """By number of users; of the round in which all get warm, too."""

    def sampling(self, streams: int) -> Callable[[], float]:
        """Tokens per second of that many users."""

        def sample() -> float:
            texts = [self.prompts.make(PROMPT_TOKENS).text for _ in range(streams)]
            served = self.server.serve(texts, TOKENS)
            self.first_token_s.setdefault(streams, []).append(served.first_token_s)
            return served.tokens_per_s

        return sample


def serving(bench: Bench) -> Iterator[Part]:
    """Whole servers, each with the precision that it is fastest with and has in common with tpserve."""
    ours = {dtype: f"tpserve {dtype}" for dtype in ("int8", "bf16")}
    llama_cpp, vllm = "llama.cpp's server, Q8_0", "vLLM, bf16"
    prompts = Prompts(bench.model)
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(tpserve(bench.model, dtype)) for dtype, name in ours.items()
        }
        if bench.peers.llama_cpp:
            file = gguf(bench.peers.llama_cpp, bench.model, "q8_0")
            servers[llama_cpp] = stack.enter_context(llama_server(bench.peers.llama_cpp, file))
        if bench.peers.vllm:
            server = vllm_server(bench.peers.vllm, bench.model, "bfloat16")
            servers[vllm] = stack.enter_context(server)
        watched = {name: _Watched(server, prompts) for name, server in servers.items()}
        for streams in STREAMS:
            rounds = interleave(
                {name: each.sampling(streams) for name, each in watched.items()}, bench.rounds
            )
            first = {name: each.first_token_s[streams][1:] for name, each in watched.items()}
            title = f"Servers over HTTP, {streams} user(s)"
            yield Part(
                f"{title}: new tokens",
                "tokens/s",
                rounds,
                [Ratio(ours["int8"], llama_cpp), Ratio(ours["bf16"], vllm)],
                notes=[
                    f"A prompt of {PROMPT_TOKENS} tokens and {TOKENS} new ones for each; the time of"
                    " reading the prompts counts."
                ],
            )
            yield Part(
                f"{title}: first token",
                "seconds",
                Rounds(first, rounds.other_cores),
                [Ratio(llama_cpp, ours["int8"]), Ratio(vllm, ours["bf16"])],
                notes=["The median of the users."],
            )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port
