"""The parts of peers.py: who competes in what, how much of it, and the ratios that matter."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contestants import (
    MemoryReaders,
    PeerProcess,
    TpserveServer,
    llama_cpp,
    openvino,
    transformers,
    vllm,
)
from benchmarks.interleaved import Part, Ratio, Rounds, interleave
from benchmarks.peer_files import Peers, gguf, openvino_model
from benchmarks.prompts import Prompt, Prompts
from shared.model_config import read_model_config

CORES = 2
"""What every side may use in decode and batch: threads of a peer, workers x threads of tpserve."""
PROMPT_TOKENS = 17
"""One more than a KV block: of a prompt seen before, one token is left to compute."""


@dataclass(frozen=True)
class Precision:
    """How both sides of a comparison store weights."""

    gguf: str
    layer_bytes: float
    """Of tpserve, per weight, scales included."""
    head_bytes: float
    tokens: int
    """In a sample; about as many seconds in every precision."""
    goal: float
    """Times the peer's speed."""

    def bytes_per_step(self, model: Path) -> float:
        """Weights that a step of one token reads; of the embedding it is a single row."""
        config = read_model_config(model)
        head = config.hidden_size * config.vocab_size
        layers = config.parameters - head * (1 if config.tie_word_embeddings else 2)
        return layers * self.layer_bytes + head * self.head_bytes


# int8 and int4 come in groups of 32 with a scale of 16 bits; beside int4 the head is in int8.
PRECISIONS: Mapping[str, Precision] = {
    "int4": Precision("q4_0", 0.5625, 1.0625, tokens=64, goal=1.5),
    "int8": Precision("q8_0", 1.0625, 1.0625, tokens=48, goal=1.35),
    "bf16": Precision("bf16", 2, 2, tokens=32, goal=1.15),
}
READING_GOAL = 0.85
SCALING_GOAL = 1.85

BATCH_GOALS: Mapping[int, float] = {8: 100, 32: 240}
PREFILL_GOALS: Mapping[int, float] = {128: 280, 512: 280}
"""By streams and by prompt tokens: tokens per second on the machine that the goals were set for."""
BATCH_TOKENS = 32
"""Of each stream in a sample."""
SLOW_BATCH_TOKENS = 8
"""Of engines that would take most of the time with as many as the others."""
BATCH_CONTEXT = 576
"""For the longest prompt."""

STORY_PROMPT = "Once upon a time"
STORY_TOKENS = 200
STORY_STREAMS = 32
STORY_RUNS = 5
"""In a sample; one takes less than a tenth of a second."""
STORY_GOAL = 8.0
"""Times the speed of one stream."""


@dataclass(frozen=True)
class Bench:
    """What the parts have in common."""

    peers: Peers
    model: Path
    story: Path
    memory_speed: Path | None
    """The compiled program, where there is a compiler."""
    rounds: int
    dtypes: tuple[str, ...]


def decode(bench: Bench) -> Iterator[Part]:
    """Batch 1, for each precision: the peer, one worker and two, threads, and memory."""
    for dtype in bench.dtypes:
        yield _decode(bench, dtype, PRECISIONS[dtype])


def _decode(bench: Bench, dtype: str, precision: Precision) -> Part:
    prompt = Prompts(bench.model).make(PROMPT_TOKENS)
    two = f"tpserve {dtype}, {CORES} workers x 1 thread"
    one = f"tpserve {dtype}, 1 worker x 1 thread"
    threaded = f"tpserve {dtype}, 1 worker x {CORES} threads"
    peer = f"llama.cpp {precision.gguf.upper()}, {CORES} threads"
    hugging_face = f"transformers {dtype}, {CORES} threads"
    v_llm = f"vLLM {dtype}, {CORES} threads"
    one_reader = "reading the weights and no more, 1 process"
    readers = f"reading the weights and no more, {CORES} processes"
    contenders: dict[str, Callable[[], float]] = {}
    with ExitStack() as stack:
        for name, workers, threads in ((two, CORES, 1), (one, 1, 1), (threaded, 1, CORES)):
            server = stack.enter_context(TpserveServer(bench.model, workers, threads, dtype))
            contenders[name] = _decoding(server, prompt, 1, precision.tokens)
        if bench.peers.llama_cpp:
            file = gguf(bench.peers.llama_cpp, bench.model, precision.gguf)
            engine = stack.enter_context(llama_cpp(bench.peers.llama_cpp, file, CORES))
            contenders[peer] = _decoding(engine, prompt, 1, precision.tokens)
        if bench.peers.transformers and dtype == "bf16":
            process = transformers(bench.peers.transformers, bench.model, CORES, "bfloat16")
            contenders[hugging_face] = _decoding(
                stack.enter_context(process), prompt, 1, precision.tokens
            )
        if bench.peers.vllm and dtype == "bf16":
            process = vllm(bench.peers.vllm, bench.model, "bfloat16", 1, BATCH_CONTEXT)
            contenders[v_llm] = _decoding(stack.enter_context(process), prompt, 1, precision.tokens)
        if bench.memory_speed is not None:
            memory = stack.enter_context(MemoryReaders(bench.memory_speed, CORES))
            step = precision.bytes_per_step(bench.model)
            contenders[one_reader] = lambda: memory.read(1) / step
            contenders[readers] = lambda: memory.read(CORES) / step
        rounds = interleave(contenders, bench.rounds)
    return Part(
        title=f"Decode, batch 1, {dtype}",
        unit="tokens/s",
        rounds=rounds,
        ratios=[
            Ratio(two, peer, precision.goal),
            Ratio(two, hugging_face),
            Ratio(two, v_llm),
            Ratio(two, readers, READING_GOAL),
            Ratio(two, one, SCALING_GOAL),
            Ratio(two, threaded, 1),
            Ratio(one, one_reader),
        ],
        notes=[
            _kernels(server),
            f"tpserve reads {precision.bytes_per_step(bench.model) / 1e6:,.0f} MB a step.",
        ],
    )


def batch(bench: Bench) -> Iterator[Part]:
    """Many streams, and prompts, in int8 and in bf16."""
    with ExitStack() as stack:
        yield from _batch(bench, "int8", _int8_engines(bench, stack), BATCH_GOALS, PREFILL_GOALS)
    with ExitStack() as stack:
        goals = dict.fromkeys(BATCH_GOALS), dict.fromkeys(PREFILL_GOALS)
        yield from _batch(bench, "bf16", _bf16_engines(bench, stack), *goals)


_Engine = tuple[str, TpserveServer | PeerProcess, int]
"""Its name, and how many tokens each stream of it writes in a sample."""


def _int8_engines(bench: Bench, stack: ExitStack) -> list[_Engine]:
    """tpserve first."""
    engines = [_tpserve(bench, "int8", stack)]
    if bench.peers.openvino:
        folder = openvino_model(bench.peers.openvino, bench.model)
        pipeline = stack.enter_context(openvino(bench.peers.openvino, folder, CORES))
        engines.append((f"OpenVINO GenAI int8, {CORES} threads", pipeline, BATCH_TOKENS))
    if bench.peers.llama_cpp:
        file = gguf(bench.peers.llama_cpp, bench.model, "q8_0")
        engine = stack.enter_context(
            llama_cpp(bench.peers.llama_cpp, file, CORES, max(BATCH_GOALS), BATCH_CONTEXT)
        )
        engines.append((f"llama.cpp Q8_0, {CORES} threads", engine, SLOW_BATCH_TOKENS))
    return engines


def _bf16_engines(bench: Bench, stack: ExitStack) -> list[_Engine]:
    """tpserve first."""
    engines = [_tpserve(bench, "bf16", stack)]
    if bench.peers.vllm:
        engine = stack.enter_context(
            vllm(bench.peers.vllm, bench.model, "bfloat16", max(BATCH_GOALS), BATCH_CONTEXT)
        )
        engines.append((f"vLLM bf16, {CORES} threads", engine, SLOW_BATCH_TOKENS))
    return engines


def _tpserve(bench: Bench, dtype: str, stack: ExitStack) -> _Engine:
    server = stack.enter_context(TpserveServer(bench.model, CORES, 1, dtype))
    return f"tpserve {dtype}, {CORES} workers x 1 thread", server, BATCH_TOKENS


def _batch(
    bench: Bench,
    dtype: str,
    engines: Sequence[_Engine],
    batch_goals: Mapping[int, float | None],
    prefill_goals: Mapping[int, float | None],
) -> Iterator[Part]:
    prompts = Prompts(bench.model)
    prompt = prompts.make(PROMPT_TOKENS)
    ours = engines[0][0]
    for streams, goal in batch_goals.items():
        rounds = interleave(
            {name: _decoding(who, prompt, streams, count) for name, who, count in engines},
            bench.rounds,
        )
        yield _batch_part(f"Decode, {dtype}, batch {streams}", rounds, ours, goal)
    for tokens, goal in prefill_goals.items():
        rounds = interleave(
            {name: _prefilling(who, prompts, tokens) for name, who, _ in engines},
            bench.rounds,
        )
        yield _batch_part(f"Prefill, {dtype}, {tokens} tokens", rounds, ours, goal)


def _batch_part(title: str, rounds: Rounds, ours: str, goal: float | None) -> Part:
    ratios = [Ratio(ours, peer) for peer in rounds.samples if peer != ours]
    return Part(title, "tokens/s", rounds, ratios, {} if goal is None else {ours: goal})


def story(bench: Bench) -> Iterator[Part]:
    """fp32 of a model so small that fixed costs decide."""
    prompt = Prompts(bench.story).of(STORY_PROMPT)
    one, many = (f"tpserve, 1 worker x 1 thread, {count} stream(s)" for count in (1, STORY_STREAMS))
    contenders: dict[str, Callable[[], float]] = {}
    ratios = [Ratio(many, one, STORY_GOAL)]
    with ExitStack() as stack:
        server = stack.enter_context(TpserveServer(bench.story, 1, 1, "fp32"))
        notes = [_kernels(server)]
        contenders[one] = _repeated(_decoding(server, prompt, 1, STORY_TOKENS))
        contenders[many] = _decoding(server, prompt, STORY_STREAMS, STORY_TOKENS)
        if bench.peers.llama_cpp:
            file = gguf(bench.peers.llama_cpp, bench.story, "f32")
            context = len(prompt.ids) + STORY_TOKENS + 2
            for threads in range(1, CORES + 1):
                engine = stack.enter_context(
                    llama_cpp(bench.peers.llama_cpp, file, threads, STORY_STREAMS, context)
                )
                name = f"llama.cpp F32, {threads} thread(s)"
                contenders[f"{name}, Python binding"] = _repeated(_generating(engine, prompt))
                contenders[name] = _repeated(_decoding(engine, prompt, 1, STORY_TOKENS))
                batched = f"{name}, {STORY_STREAMS} streams"
                contenders[batched] = _decoding(engine, prompt, STORY_STREAMS, STORY_TOKENS)
                ratios += [
                    Ratio(one, f"{name}, Python binding", 1 if threads == 1 else None),
                    Ratio(one, name),
                    Ratio(many, batched),
                ]
            notes.append(_agreement(server, engine, prompt))
        if bench.peers.transformers:
            name = "transformers fp32, 1 thread"
            process = transformers(bench.peers.transformers, bench.story, 1, "float32")
            contenders[name] = _decoding(stack.enter_context(process), prompt, 1, STORY_TOKENS)
            ratios.append(Ratio(one, name))
        rounds = interleave(contenders, bench.rounds)
    yield Part("Story model, fp32", "tokens/s", rounds, ratios, notes=notes)


def _kernels(server: TpserveServer) -> str:
    return f"tpserve computed with {server.status.kernels} kernels."


def _agreement(server: TpserveServer, peer: PeerProcess, prompt: Prompt) -> str:
    """Whether both compute the same: the text that they agree on."""
    ours = server.decode(prompt, 1, STORY_TOKENS).ids
    theirs = peer.decode(prompt, 1, STORY_TOKENS).ids
    pairs = list(zip(ours, theirs, strict=False))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return (
        f"Greedy text of tpserve and llama.cpp: the first {same} of {len(pairs)} tokens are equal."
    )


def _decoding(
    contestant: TpserveServer | PeerProcess, prompt: Prompt, streams: int, tokens: int
) -> Callable[[], float]:
    return lambda: contestant.decode(prompt, streams, tokens).tokens_per_s


def _prefilling(
    contestant: TpserveServer | PeerProcess, prompts: Prompts, tokens: int
) -> Callable[[], float]:
    return lambda: contestant.prefill(prompts.make(tokens))


def _generating(peer: PeerProcess, prompt: Prompt) -> Callable[[], float]:
    return lambda: peer.generate(prompt, STORY_TOKENS).tokens_per_s


def _repeated(rate: Callable[[], float]) -> Callable[[], float]:
    """The rate of some runs of equal length together."""
    return lambda: statistics.harmonic_mean([rate() for _ in range(STORY_RUNS)])
