"""How fast one GPU decodes and reads prompts, against its memory's bandwidth and transformers.

    python -m benchmarks.gpu [--model FOLDER] [--dtype bf16] [--no-transformers]

Prints Markdown. The model is TinyLlama's shape with random weights unless another is given; it is
driven as a worker drives it, plan by plan, without a server around it.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.scaling.random_model import random_checkpoint
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
_COPIED_BYTES = 1 << 30
_GREEDY = Sampling(temperature=0, top_k=0, top_p=1, seed=0)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    tokens_per_s: float
    limit: float | None
    """Tokens per second at which the memory's bandwidth would be used up; None: it is no limit."""

    def __str__(self) -> str:
        share = "" if self.limit is None else f"{self.tokens_per_s / self.limit:.0%}"
        limit = "" if self.limit is None else f"{self.limit:,.0f}"
        return f"| {self.what} | {self.tokens_per_s:,.0f} | {limit} | {share} |"


class Model:
    """A model on the device, and plans for it."""

    def __init__(self, folder: Path, dtype: Precision, slots: int, positions: int) -> None:
        setup = CommSetup(kind="local", rank=0, owned=[(0, 8)], deadline_s=60)
        self.device = device_of(0, 1)
        accelerator = Accelerator(self.device, Alone())
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


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Until the device has done it."""
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a long copy reads and writes together, the best of several."""
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / min(seconds(device, lambda: target.copy_(source)) for _ in range(8))


def measure(
    model: Model, copied: float, batches: Sequence[int], prompts: Sequence[int]
) -> list[Row]:
    """Decoding at each batch size, reading prompts of each length."""
    rows = []
    for batch in batches:
        model.begin(batch)
        model.write(batch, range(2))  # captures the steps
        elapsed = seconds(model.device, lambda n=batch: model.write(n, range(2, PLANS)))  # type: ignore[misc]
        rate = batch * (PLANS - 2) * PASSES / elapsed
        rows.append(Row(f"decode, batch {batch}", rate, batch * copied / model.step_bytes(batch)))
    for length in prompts:
        model.read(length)
        elapsed = min(seconds(model.device, lambda n=length: model.read(n)) for _ in range(3))  # type: ignore[misc]
        rows.append(Row(f"prefill, {length} tokens", length / elapsed, None))
    return rows


def measure_transformers(folder: Path, device: torch.device, tokens: int) -> Row:
    """Its generate with a static cache, compiled: one sequence, greedy."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model.to(device)
    prompt = torch.arange(3, 3 + DEPTH, device=device)[None]

    def generate() -> None:
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            cache_implementation="static",
        )

    for _ in range(2):
        generate()
    rate = tokens / min(seconds(device, generate) for _ in range(3))
    return Row("transformers generate (sdpa, static cache, compiled), batch 1", rate, None)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--model", type=Path, help="folder; default: TinyLlama's shape, random")
    parser.add_argument("--dtype", choices=get_args(Precision), default="bf16")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS)
    parser.add_argument("--transformers", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    folder = args.model or random_checkpoint("tinyllama-1.1b", Path("build/tinyllama-1.1b"))
    positions = max(*args.prompts, DEPTH + PLANS * PASSES) + BLOCK_TOKENS
    model = Model(folder, args.dtype, max(args.batches), positions)
    copied = bandwidth(model.device)
    rows = measure(model, copied, args.batches, args.prompts)
    if args.transformers:
        rows.append(measure_transformers(folder, model.device, PLANS * PASSES))
    print(f"{describe(model.device)}, {args.dtype}, {DEPTH} tokens of context;", end=" ")
    print(f"a copy moves {copied / 1e9:,.0f} GB/s, read and written\n")
    print("| measured | tokens/s | bandwidth limit | of it |\n|---|---:|---:|---:|")
    for row in rows:
        print(row)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
