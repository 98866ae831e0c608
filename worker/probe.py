"""How fast one process of this machine computes and exchanges: what `coordinator/machine.py` asks.

    python -m worker.probe

Says {"kernels": ...} and then answers each line of standard input, a JSON object, with another one;
several of these processes that are asked at once measure what they leave each other.

    {"weights": "int8", "bytes": N, "threads": 1}   -> {"bytes": ...}; makes as many layers as have N bytes
    {"rows": 8}          -> {"seconds": ...} for that many tokens, each of a sequence of its own, to pass them
    {"ranks": CommSetup, "region": fd, "steps": 40}
                         -> {"pass_s": ..., "layer_s": ..., "float_s": ...}, see `_ranks`
    {}                   -> {}; the way there and back
"""

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import save_file

from shared.messages import Precision
from shared.model_config import ModelConfig
from shared.precision import BYTES_PER_WEIGHT
from shared.rope import Rope
from shared.sharding import ModelShards
from shared.worker_messages import (
    AllocateKV,
    CommSetup,
    LoadModel,
    Sampling,
    SequenceStep,
    StepPlan,
)
from worker.comm.base import Communicator
from worker.comm.local import LocalCommunicator
from worker.comm.open import open_communicator
from worker.layers import Placement
from worker.loader import Checkpoint
from worker.model import Decoder
from worker.native.api import Pool, native_library
from worker.ops.choose import describe, make_ops
from worker.runner import Runner

MOST_ROWS = 128
_LEAST_REPETITIONS, _MOST_REPETITIONS = 3, 40
_ENOUGH_S = 0.15
"""Of repetitions; their median counts."""
_REPETITIONS = 5
_SHARDS = 8
_FEW_LAYERS, _MANY_LAYERS = 2, 10
_SIZE = 64
_LONG = 1 << 16
"""Floats of a long all-reduce."""
_GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0)
_TWO_BLOCKS = np.array([0, 1], "<i4").tobytes()


def main() -> None:
    """Answer the lines of standard input."""
    library = native_library()
    print(json.dumps({"kernels": describe(library)}), flush=True)
    layers: Layers | None = None
    for line in sys.stdin:
        answer: dict[str, float] = {}
        match json.loads(line):
            case {"weights": dtype, "bytes": size, "threads": threads}:
                layers = None  # gives the memory of the last ones back
                layers = Layers(dtype, size, threads)
                answer = {"bytes": layers.weight_bytes}
            case {"rows": rows}:
                assert layers is not None, "weights come first"
                answer = {"seconds": _usual_s(partial(layers.compute, rows))}
            case {"ranks": setup, "region": region, "steps": steps}:
                answer = _ranks(msgspec.convert(setup, CommSetup), region, steps)
        print(json.dumps(answer), flush=True)


def _usual_s(work: Callable[[], None]) -> float:
    """The median time that it takes, after a first time that does not count."""
    work()
    times: list[float] = []
    while len(times) < _LEAST_REPETITIONS or (
        len(times) < _MOST_REPETITIONS and sum(times) < _ENOUGH_S
    ):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


class Layers:
    """Layers of TinyLlama-1.1B's shape, with all that a step does in them, at the first position."""

    def __init__(self, dtype: Precision, size: int, threads: int) -> None:
        """Raises ModelError where the kernels do not know the precision."""
        library = native_library()
        torch.set_num_threads(threads)
        pool = None if library is None else Pool(library, threads, crowded=False, from_bytes=0)
        owned = [range(_SHARDS)]
        setup = CommSetup(kind="local", rank=0, owned=[(0, _SHARDS)], deadline_s=60)
        order = LoadModel(
            model="probe", path="", dtype=dtype, kv_dtype="fp32", max_model_len=16, threads=threads
        )
        one = _config(1, hidden=2048, inner=5632, heads=32, kv_heads=4)
        weights = one.parameters - one.vocab_size * one.hidden_size
        config = msgspec.structs.replace(
            one, num_layers=math.ceil(size / (weights * BYTES_PER_WEIGHT[dtype]))
        )
        shards = ModelShards(config, _SHARDS)
        ops = make_ops(order, config, LocalCommunicator(setup), pool, owned, lambda _: None)
        placement = Placement(shards, owned[0], ops)
        decoder = Decoder(_Constant(), placement, order.max_model_len)
        layers, layout = config.num_layers, placement.head_layout()
        ops.allocate(decoder, layers, layout, MOST_ROWS, MOST_ROWS)
        self._ops, self.weight_bytes = ops, ops.weight_bytes
        self._last = np.zeros(MOST_ROWS, np.int64)
        self._sequences = [
            SequenceStep(slot, 0, [0], np.array([slot], "<i4").tobytes(), _GREEDY)
            for slot in range(MOST_ROWS)
        ]

    def compute(self, rows: int) -> None:
        """A pass of so many sequences, a token each."""
        self._ops.run(self._sequences[:rows], self._last)


class _Constant(Checkpoint):
    """All its numbers are the same, and in no file."""

    def __init__(self) -> None:
        pass

    def __contains__(self, name: str) -> bool:
        return True

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: range | None = None,
        columns: range | None = None,
    ) -> torch.Tensor:
        """A tensor of that shape, or of the rows and columns that are wanted."""
        wanted = [
            size if part is None else len(part)
            for size, part in zip(shape, (rows, columns), strict=False)
        ]
        return torch.full(wanted, 0.01, dtype=torch.bfloat16)

    def map(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The whole tensor."""
        return self.read(name, shape)


# --- ranks ----------------------------------------------------------------------------------------


def _ranks(setup: CommSetup, region: int | None, steps: int) -> dict[str, float]:
    """What a forward pass takes besides multiplying weights; all ranks of `setup` are asked at once.

    pass_s: for a whole pass, whatever its length. layer_s: for each layer, its two all-reduces
    included. float_s: more for each float of a long all-reduce.
    """
    crowded = len(setup.owned) > len(os.sched_getaffinity(0))
    comm = open_communicator(setup, None if region is None else os.dup(region), crowded)
    try:
        few, many = (_pass_s(comm, setup, layers, steps) for layers in (_FEW_LAYERS, _MANY_LAYERS))
        layer_s = max(0.0, (many - few) / (_MANY_LAYERS - _FEW_LAYERS))
        return {
            "pass_s": max(0.0, few - _FEW_LAYERS * layer_s),
            "layer_s": layer_s,
            "float_s": _float_s(comm, setup),
        }
    finally:
        comm.close()


def _pass_s(comm: Communicator, setup: CommSetup, layers: int, steps: int) -> float:
    """The median time of a pass of a model that has next to no weights."""
    library = native_library()
    pool = None if library is None else Pool(library, 1, crowded=True)
    runner = Runner(comm, [range(*shards) for shards in setup.owned], _SHARDS, pool)
    with tempfile.TemporaryDirectory(prefix="tpserve-probe-") as folder:
        _write_model(Path(folder), layers)
        runner.load(
            LoadModel(model="probe", path=folder, dtype="fp32", kv_dtype="fp32", max_model_len=32)
        )
        runner.allocate(AllocateKV(model="probe", blocks=2, slots=1, tokens=16))
        plan = StepPlan(
            epoch=1,
            step=1,
            model="probe",
            sequences=[SequenceStep(0, 8, [1], _TWO_BLOCKS, _GREEDY)],
        )
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            runner.step(plan)
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def _float_s(comm: Communicator, setup: CommSetup) -> float:
    roots = comm.tree.roots_per_rank[setup.rank]

    def reduce_s(floats: int) -> float:
        times = []
        for _ in range(_REPETITIONS):
            comm.barrier()
            began = time.perf_counter()
            comm.all_reduce_roots(np.zeros((roots, floats), np.float32))
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    return max(0.0, reduce_s(_LONG) - reduce_s(_SIZE)) / _LONG


def _config(
    layers: int,
    hidden: int = _SIZE,
    inner: int = _SHARDS * 32,
    heads: int = _SHARDS,
    kv_heads: int = _SHARDS,
) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=_SHARDS * 32,
        max_positions=32,
        rms_norm_eps=1e-6,
        rope=Rope(theta=10_000.0),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        head_norms=False,
        sliding_window=None,
        tie_word_embeddings=True,
        dtype="bf16",
        bos_id=None,
        eos_ids=(),
    )


def _write_model(folder: Path, layers: int) -> None:
    """A checkpoint of `_config`."""
    config = _config(layers)
    fields: dict[str, Any] = {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": config.num_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(fields))
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {"model.embed_tokens": (config.vocab_size, hidden), "model.norm": (hidden,)}
    for layer in range(layers):
        own = f"model.layers.{layer}."
        shapes |= {f"{own}self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{own}mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{own}mlp.down_proj"] = (hidden, inner)
        shapes |= {f"{own}{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    save_file(
        {
            f"{name}.weight": torch.full(shape, 0.01, dtype=torch.bfloat16)
            for name, shape in shapes.items()
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


if __name__ == "__main__":
    main()
