"""How fast one GPU decodes and reads prompts, against its memory's bandwidth and transformers.

    python -m benchmarks.gpu [--out FOLDER] [--model FOLDER] [--dtype bf16] [--parts decode prefill ...]

Prints Markdown, and writes it with all numbers to gpu.md and gpu.json in FOLDER, after each part, so that
what was measured is there if the next part fails. The model is TinyLlama's shape with random weights unless
another is given; it is driven as a worker drives it, plan by plan, except by the part `server`.
"""

import argparse
import gc
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from benchmarks.gpu_parts import layer_errors, seconds, server_rates, transformers_rate
from benchmarks.scaling.random_model import random_checkpoint
from shared.config import PROJECT_ROOT
from shared.messages import BLOCK_TOKENS, Precision
from shared.precision import kv_precision
from shared.worker_messages import (
    AllocateKV,
    CommSetup,
    LoadModel,
    Sampling,
    SequenceStep,
    StepPlan,
)
from worker.comm.device import Accelerator, Alone
from worker.comm.local import LocalCommunicator
from worker.device import describe, device_of
from worker.ops.choose import device_kernels
from worker.runner import Runner

BATCHES = (1, 8, 64, 256)
PROMPTS = (512, 4096)
DEPTH = 128
"""Tokens before those that are written."""
PASSES = 8
"""Of each plan, as a server's --steps-per-plan."""
PLANS = 12
CHUNK = 512
"""Tokens of a prompt that are read in one step."""
STORY_MODEL = PROJECT_ROOT / "models" / "demo-story"
PARTS = ("decode", "prefill", "int8", "server", "errors", "deterministic", "transformers")
_COPIED_BYTES = 1 << 30
_GREEDY = Sampling(temperature=0, top_k=0, top_p=1, seed=0)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    tokens_per_s: float
    limit: float | None = None
    """Tokens per second at which the memory's bandwidth would be used up; None: it is no limit."""

    def __str__(self) -> str:
        share = "" if self.limit is None else f"{self.tokens_per_s / self.limit:.0%}"
        limit = "" if self.limit is None else f"{self.limit:,.0f}"
        return f"| {self.what} | {self.tokens_per_s:,.0f} | {limit} | {share} |"


class Model:
    """A model on the device, and plans for it."""

    def __init__(
        self, folder: Path, dtype: Precision, slots: int, positions: int, deterministic: bool
    ) -> None:
        setup = CommSetup(kind="local", rank=0, owned=[(0, 8)], deadline_s=60)
        self.device = device_of(0, 1)
        accelerator = Accelerator(self.device, Alone(), deterministic)
        self._runner = Runner(LocalCommunicator(setup), [range(8)], 8, None, accelerator)
        kv_dtype = kv_precision("auto", dtype)
        order = LoadModel(
            model="m", path=str(folder), dtype=dtype, kv_dtype=kv_dtype, max_model_len=positions
        )
        self.weight_bytes, self.block_bytes = self._runner.load(order)
        # A step reads only its tokens' rows of the embedding.
        self.weight_bytes -= self._runner.model("m").decoder.embedding.nbytes
        self._blocks = -(-positions // BLOCK_TOKENS)
        shallow = -(-(DEPTH + PLANS * PASSES + PASSES) // BLOCK_TOKENS)
        total = max(self._blocks, slots * shallow)
        self._tables = np.arange(total, dtype="<i4")
        self._shallow = shallow
        self._runner.allocate(AllocateKV(model="m", blocks=total, slots=slots, tokens=CHUNK))

    def read(self, count: int) -> None:
        """A prompt of one sequence, in chunks."""
        for start in range(0, count, CHUNK):
            tokens = list(range(3, 3 + min(CHUNK, count - start)))
            self._plan(
                [SequenceStep(0, start, tokens, self._tables[: self._blocks].tobytes(), _GREEDY)]
            )

    def begin(self, batch: int) -> None:
        """Give each sequence its context."""
        for slot in range(batch):
            tokens = [3 + slot, *range(3, 2 + DEPTH)]
            self._plan([SequenceStep(slot, 0, tokens, self._table(slot), _GREEDY)])

    def write(self, batch: int, plans: range) -> None:
        """Decode steps of these plans."""
        for plan in plans:
            start = DEPTH + plan * PASSES
            steps = [
                SequenceStep(slot, start, [], self._table(slot), _GREEDY) for slot in range(batch)
            ]
            self._plan(steps, PASSES)

    def step_bytes(self, batch: int) -> int:
        """What a decode step has to read: all weights once, and every sequence's keys and values."""
        context = DEPTH + PLANS * PASSES // 2
        return self.weight_bytes + batch * context * self.block_bytes // BLOCK_TOKENS

    def _table(self, slot: int) -> bytes:
        return self._tables[slot * self._shallow : (slot + 1) * self._shallow].tobytes()

    def _plan(self, sequences: Sequence[SequenceStep], passes: int = 1) -> None:
        self._runner.step(
            StepPlan(epoch=1, step=1, model="m", sequences=[*sequences], passes=passes)
        )


@dataclass
class Results:
    """What was measured so far."""

    device: str
    kernels: str
    dtype: Precision
    copied: float
    """Bytes per second that a copy reads and writes together."""
    rows: list[Row] = field(default_factory=list)
    waiting: float | None = None
    """Of a whole server with one stream the share of the time in which the worker had nothing to do."""
    errors: dict[str, dict[str, object]] = field(default_factory=dict)
    """Relative L2 errors against fp32, by precision."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why a part has no result."""

    def markdown(self) -> str:
        """For people."""
        lines = [
            f"{self.device}, {self.kernels} kernels, {self.dtype}, {DEPTH} tokens of context;"
            f" a copy moves {self.copied / 1e9:,.0f} GB/s, read and written",
            "",
            "| measured | tokens/s | bandwidth limit | of it |",
            "|---|---:|---:|---:|",
            *map(str, self.rows),
        ]
        if self.waiting is not None:
            lines += [
                "",
                f"Share of the time in which the server's worker waits: {self.waiting:.1%}",
            ]
        for dtype, found in self.errors.items():
            layers = found["layers"]
            assert isinstance(layers, list)
            each = ", ".join(f"{error:.1e}" for error in layers)
            lines += ["", f"Relative L2 error of {dtype} after each layer: {each};"]
            lines += [f"of the logits: {found['logits']:.1e}"]
        for part, reason in self.failures.items():
            lines += ["", f"**{part} was not measured: {reason}**"]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Into gpu.json and gpu.md."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        (folder / "gpu.md").write_text(self.markdown() + "\n")


class Benchmark:
    """The parts, each of which adds to the results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._device = args, device_of(0, 1)
        self._folder: Path = args.model or random_checkpoint(args.shape, Path("build") / args.shape)
        self.results = Results(
            device=describe(self._device),
            kernels=device_kernels(self._device, deterministic=False).name,
            dtype=args.dtype,
            copied=bandwidth(self._device, args.copied_bytes),
        )

    def run(self, part: str) -> None:
        """One of PARTS."""
        getattr(self, "_" + part)()
        gc.collect()  # models hold themselves, and the next one needs their memory
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _decode(self) -> None:
        self._decode_as("decode", self._args.dtype, False, self._args.batches)

    def _int8(self) -> None:
        self._decode_as("decode, int8", "int8", False, self._args.batches[:1])

    def _deterministic(self) -> None:
        self._decode_as("decode, deterministic", self._args.dtype, True, self._args.batches)
        self._prefill_as("prefill, deterministic", True, self._args.prompts[:1])

    def _prefill(self) -> None:
        self._prefill_as("prefill", False, self._args.prompts)

    def _decode_as(
        self, what: str, dtype: Precision, deterministic: bool, batches: Sequence[int]
    ) -> None:
        positions = DEPTH + (PLANS + 1) * PASSES
        model = Model(self._folder, dtype, max(batches), positions, deterministic)
        for batch in batches:
            model.begin(batch)
            model.write(batch, range(2))  # captures the steps

            def plans(batch: int = batch) -> None:
                model.write(batch, range(2, PLANS))

            rate = batch * (PLANS - 2) * PASSES / seconds(self._device, plans)
            limit = batch * self.results.copied / model.step_bytes(batch)
            self.results.rows.append(Row(f"{what}, batch {batch}", rate, limit))

    def _prefill_as(self, what: str, deterministic: bool, prompts: Sequence[int]) -> None:
        positions = max(prompts) + BLOCK_TOKENS
        model = Model(self._folder, self._args.dtype, 1, positions, deterministic)
        for length in prompts:

            def prompt(length: int = length) -> None:
                model.read(length)

            prompt()
            rate = length / min(seconds(self._device, prompt) for _ in range(3))
            self.results.rows.append(Row(f"{what}, {length} tokens", rate))

    def _server(self) -> None:
        flags = ["--dtype", self._args.dtype, "--kv-memory", self._args.kv_memory]
        found = server_rates(self._folder, flags, self._args.story_tokens)
        self.results.waiting = found["waiting"]
        self.results.rows.append(Row("server, one stream", found["tokens_per_s"]))
        flags = ["--kv-memory", self._args.kv_memory]
        story = server_rates(STORY_MODEL, flags, self._args.story_tokens)
        self.results.rows.append(Row("server, story model, one stream", story["tokens_per_s"]))

    def _errors(self) -> None:
        accelerator = Accelerator(self._device, Alone())
        dtypes: list[Precision] = ["fp16", "bf16"]
        self.results.errors = layer_errors(
            STORY_MODEL, dtypes, accelerator, self._args.error_tokens
        )

    def _transformers(self) -> None:
        for compiled, how in ((False, "dynamic cache"), (True, "static cache, compiled")):
            rate = transformers_rate(
                self._folder, self._device, DEPTH, self._args.new_tokens, compiled
            )
            what = f"transformers generate, sdpa, {how}, batch 1"
            self.results.rows.append(Row(what, rate))


def bandwidth(device: torch.device, size: int = _COPIED_BYTES) -> float:
    """Bytes per second that a long copy reads and writes together, the best of several."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(seconds(device, lambda: target.copy_(source)) for _ in range(8))


def argument_parser() -> argparse.ArgumentParser:
    """Of the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md")
    parser.add_argument("--model", type=Path, help="folder; default: --shape with random weights")
    parser.add_argument("--shape", default="tinyllama-1.1b", help="as benchmarks/scaling has them")
    parser.add_argument("--dtype", choices=get_args(Precision), default="bf16")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS)
    parser.add_argument("--kv-memory", default="2G", help="of the servers")
    parser.add_argument("--new-tokens", type=int, default=96, help="that transformers writes")
    parser.add_argument("--story-tokens", type=int, default=200, help="that a server writes")
    parser.add_argument("--error-tokens", type=int, default=512, help="of the text for errors")
    parser.add_argument("--copied-bytes", type=int, default=_COPIED_BYTES)
    return parser


def main() -> None:
    """Measure, print, and write after each part."""
    args = argument_parser().parse_args()
    benchmark = Benchmark(args)
    for part in args.parts:
        began = time.monotonic()
        try:
            benchmark.run(part)
        except Exception as error:  # noqa: BLE001 - what the other parts measure is still wanted
            reason = str(error).partition("\n")[0]
            benchmark.results.failures[part] = f"{type(error).__name__}: {reason}"
        print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)
        if args.out is not None:
            benchmark.results.write(args.out)
    print("\n" + benchmark.results.markdown())
    if benchmark.results.failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
