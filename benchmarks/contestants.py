"""What peers.py lets compete: tpserve's server, the peers' processes, and bare reading of memory.

A contestant is a process that stays up for a whole part of the benchmark and sleeps while it is not
asked. All of them end with the context they were entered in.
"""

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from benchmarks.engine import server
from benchmarks.interleaved import LostError
from benchmarks.peer_files import HERE, Installed
from benchmarks.prompts import Prompt
from client.zmq_client import Client
from shared.messages import Status, Token

KV_MEMORY = "256M"
SILENCE_S = 300.0


@dataclass(frozen=True)
class Run:
    """What one request to generate brought."""

    tokens_per_s: float
    ids: list[int]
    """Of the first stream, from the first new token on."""


class TpserveServer(AbstractContextManager["TpserveServer"]):
    """A running server and a client of it: every number is one that a user sees."""

    def __init__(self, model: Path, workers: int, threads: int, dtype: str) -> None:
        flags = ["--workers", str(workers), "--threads-per-worker", str(threads)]
        flags += ["--dtype", dtype, "--kv-memory", KV_MEMORY]
        with ExitStack() as stack:
            address = stack.enter_context(server(model, flags))
            self._client = stack.enter_context(Client(address, silence_s=SILENCE_S))
            self.status: Status = self._client.status()
            self._running = stack.pop_all()

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def decode(self, prompt: Prompt, streams: int, tokens: int) -> Run:
        """Continue `prompt`; timed from sending all requests to the end of the last one.

        The prompt but for its last tokens is put into the prefix cache first, so that the first new
        token of each stream costs what the others do.
        """
        self._client.story(prompt.text, temperature=0, max_tokens=1, ignore_eos=True).result()
        began = time.perf_counter()
        running = [
            self._client.story(prompt.text, temperature=0, max_tokens=tokens, ignore_eos=True)
            for _ in range(streams)
        ]
        answers = [stream.result() for stream in running]
        seconds = time.perf_counter() - began
        self._expect_length(prompt, answers[0].usage.prompt_tokens)
        generated = sum(answer.usage.completion_tokens for answer in answers)
        return Run(generated / seconds, answers[0].choices[0].token_ids)

    def prefill(self, prompt: Prompt) -> float:
        """Tokens per second from sending the request to the arrival of its first new token."""
        began = time.perf_counter()
        stream = self._client.story(prompt.text, temperature=0, max_tokens=1, ignore_eos=True)
        seconds = 0.0
        for event in stream.events():
            if isinstance(event, Token):
                seconds = time.perf_counter() - began
        usage = stream.result().usage
        self._expect_length(prompt, usage.prompt_tokens)
        return usage.prompt_tokens / seconds

    @staticmethod
    def _expect_length(prompt: Prompt, tokens: int) -> None:
        if tokens != len(prompt.ids):
            raise SystemExit(f"tpserve saw {tokens} prompt tokens, not {len(prompt.ids)}")


class _PeerAnswer(TypedDict):
    seconds: float
    tokens: int
    ids: list[int]


class PeerProcess(AbstractContextManager["PeerProcess"]):
    """One of the peers' scripts: a JSON object on a line asks, another one answers."""

    def __init__(self, peer: Installed, script: str, *arguments: str) -> None:
        # Without our folder on its path: what peers import may have the name of a file there.
        command = [str(peer.python), "-P", str(HERE / script), *arguments]
        self._process = _lines(command, peer.variables())
        self.description: str = self._read()["ready"]

    def __exit__(self, *_: object) -> None:
        _end(self._process)

    def decode(self, prompt: Prompt, streams: int, tokens: int) -> Run:
        """Continue `prompt`; the time of reading it does not count."""
        return self._ask(do="decode", prompt=prompt.ids, streams=streams, tokens=tokens)

    def generate(self, prompt: Prompt, tokens: int) -> Run:
        """The same in one stream, through llama.cpp's Python binding."""
        return self._ask(do="generate", prompt=prompt.ids, tokens=tokens)

    def prefill(self, prompt: Prompt) -> float:
        """Tokens per second while `prompt` is read, up to the first new token."""
        return self._ask(do="prefill", prompt=prompt.ids).tokens_per_s

    def _ask(self, **request: object) -> Run:
        _write(self._process, json.dumps(request))
        answer: _PeerAnswer = self._read()
        return Run(answer["tokens"] / answer["seconds"], answer["ids"])

    def _read(self) -> Any:
        return json.loads(read_line(self._process))


def llama_cpp(
    peer: Installed, model: Path, threads: int, streams: int = 1, context: int = 256
) -> PeerProcess:
    """llama.cpp with a GGUF file."""
    sizes = ["--threads", str(threads), "--streams", str(streams), "--context", str(context)]
    return PeerProcess(peer, "peer_llama_cpp.py", "serve", str(model), *sizes)


def openvino(peer: Installed, model: Path, threads: int) -> PeerProcess:
    """OpenVINO GenAI with a converted model."""
    return PeerProcess(peer, "peer_openvino.py", str(model), "--threads", str(threads))


def transformers(peer: Installed, model: Path, threads: int, dtype: str) -> PeerProcess:
    """Hugging Face transformers with the checkpoint itself; dtype as torch calls it."""
    flags = ["--threads", str(threads), "--dtype", dtype]
    return PeerProcess(peer, "peer_transformers.py", str(model), *flags)


def vllm(peer: Installed, model: Path, dtype: str, streams: int, context: int) -> PeerProcess:
    """vLLM with the checkpoint itself; it takes a thread for each core. dtype as torch calls it."""
    sizes = ["--streams", str(streams), "--context", str(context)]
    return PeerProcess(peer, "peer_vllm.py", str(model), "--dtype", dtype, *sizes)


class MemoryReaders(AbstractContextManager["MemoryReaders"]):
    """Processes of memory_speed.cpp, which read more memory than any cache holds."""

    MEBIBYTES = 512
    SECONDS = 0.3
    TURNS = 3

    def __init__(self, program: Path, count: int) -> None:
        self._processes = [_lines([str(program), str(self.MEBIBYTES)]) for _ in range(count)]
        for process in self._processes:
            read_line(process)

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            _end(process)

    def read(self, readers: int) -> float:
        """Bytes per second of the first `readers` processes together; the best of some turns."""
        return max(self._turn(self._processes[:readers]) for _ in range(self.TURNS))

    def _turn(self, processes: Sequence[subprocess.Popen[str]]) -> float:
        for process in processes:
            _write(process, str(self.SECONDS))
        return sum(float(read_line(process)) for process in processes)


def _lines(
    command: list[str], environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)


def _write(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        raise _lost(process) from None


def read_line(process: subprocess.Popen[str]) -> str:
    """What it says next. Raises LostError when it has ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise _lost(process)
    return line


def _lost(process: subprocess.Popen[str]) -> LostError:
    assert isinstance(process.args, list)
    script = next((Path(word).name for word in process.args if word.endswith(".py")), "a reader")
    return LostError(f"{script} ended with exit code {process.wait()}")


def _end(process: subprocess.Popen[str]) -> None:
    """End of input is what all of them end at."""
    process.communicate()
