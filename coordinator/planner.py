"""Will it fit: the memory that a model takes on each worker, before anything of it is read.

Sizes follow from config.json and the settings alone. Weights are counted as the native kernels pack
them (worker/native/tensors.h): blocks of 16 rows, columns in groups of 32; torch takes a little less.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from coordinator.cluster import ModelOnWorkers
from shared.config import Settings
from shared.errors import MemoryPlanError
from shared.memory import free_bytes
from shared.messages import BLOCK_TOKENS, Precision
from shared.model_config import ModelConfig
from shared.precision import kv_precision
from shared.sharding import GROUP, ModelShards, assign_shards

PROCESS_BYTES = 170 << 20
"""Of a worker without a model: Python, torch and what they need."""
LEAST_CONTEXT = 1024
"""KV for a sequence of so many tokens must fit where no --max-model-len was asked for."""

_ROWS = 16
_LINE = 64
"""Blocks of rows begin with a cache line."""
_GROUP_BYTES: dict[Precision, int] = {
    "fp32": 4 * _ROWS * GROUP,
    "bf16": 2 * _ROWS * GROUP,
    "fp16": 2 * _ROWS * GROUP,
    "int8": _ROWS * (GROUP + 2),
    "int4": _ROWS * (GROUP // 2 + 2),
}
"""Of 16 rows and 32 columns, scales included."""
_KV_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
_KV_SCALE_BYTES = {"int8": 4}
_CONTEXTS = (32768, 16384, 8192, 4096, 2048, 1024, 512)
"""That may be advised; the longest that fits is."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one model, by rank."""

    name: str
    config: ModelConfig
    on_workers: ModelOnWorkers
    settings: Settings
    weight_bytes: list[int]
    kv_block_bytes: list[int]
    work_bytes: list[int]
    """Activations of a step, logits, tables of positions."""
    kv_tokens: int
    """Tokens whose KV must fit at least."""

    @property
    def kv_bytes(self) -> list[int]:
        """Of `kv_tokens`, or what was asked for with --kv-memory."""
        blocks = -(-self.kv_tokens // BLOCK_TOKENS)
        asked = self.settings.kv_memory_bytes or 0
        most = self.settings.max_num_seqs * -(-self.on_workers.max_model_len // BLOCK_TOKENS)
        return [max(blocks * b, min(asked, most * b)) for b in self.kv_block_bytes]

    @property
    def bytes(self) -> list[int]:
        """All of it."""
        parts = zip(self.weight_bytes, self.kv_bytes, self.work_bytes, strict=True)
        return [sum(part) for part in parts]


def plan_memory(config: ModelConfig, on_workers: ModelOnWorkers, settings: Settings) -> MemoryPlan:
    """What each worker will take for a model."""
    shards = ModelShards(config, settings.virtual_shards)
    ranks = assign_shards(settings.workers, settings.virtual_shards)
    length = on_workers.max_model_len
    return MemoryPlan(
        name=on_workers.name,
        config=config,
        on_workers=on_workers,
        settings=settings,
        weight_bytes=[_weights(shards, owned, on_workers.dtype) for owned in ranks],
        kv_block_bytes=[_kv_block(shards, owned, on_workers.kv_dtype) for owned in ranks],
        work_bytes=[_work(shards, owned, length, settings) for owned in ranks],
        kv_tokens=length if settings.max_model_len else min(length, LEAST_CONTEXT),
    )


def needed_bytes(config: ModelConfig, settings: Settings, workers: int, dtype: Precision) -> int:
    """What all processes of that many workers take, with the context that the settings allow."""
    length = min(settings.max_model_len or config.max_positions, config.max_positions)
    on_workers = ModelOnWorkers(
        name="",
        path=Path(),
        dtype=dtype,
        kv_dtype=kv_precision(settings.kv_dtype, dtype),
        max_model_len=length,
    )
    chosen = msgspec.structs.replace(settings, workers=workers)
    return sum(_needs([plan_memory(config, on_workers, chosen)], starting=True))


def check_fits(plans: Sequence[MemoryPlan], starting: bool = False) -> None:
    """Raises MemoryPlanError, saying what would fit, when the plans together do not.

    starting: the worker processes, too, are still to come. What GPUs have room for, the workers find
    out when they load.
    """
    if any(plan.settings.device == "cuda" for plan in plans):
        return
    free = free_bytes()
    needs = _needs(plans, starting)
    if sum(needs) <= free:
        return
    world = len(needs)
    names = ", ".join(plan.name for plan in plans)
    raise MemoryPlanError(
        f"{names}: needs {world} x {max(needs) / 1e9:.2f} GB"
        f" ({_gigabytes(plan.weight_bytes for plan in plans)} GB of weights,"
        f" {_gigabytes(plan.kv_bytes for plan in plans)} GB of KV cache at least),"
        f" {free / world / 1e9:.2f} GB is free for each: {_advice(plans, free, starting)}"
    )


def _needs(plans: Sequence[MemoryPlan], starting: bool) -> list[int]:
    """Bytes by rank."""
    process = PROCESS_BYTES if starting else 0
    return [process + sum(of_rank) for of_rank in zip(*(p.bytes for p in plans), strict=True)]


def _gigabytes(of_models: Iterable[Sequence[int]]) -> str:
    """Of the worker that has the most."""
    return f"{max(map(sum, zip(*of_models, strict=True))) / 1e9:.2f}"


def _advice(plans: Sequence[MemoryPlan], free: int, starting: bool) -> str:
    """Single settings with which it would fit."""
    fitting = []
    for precision, size in _GROUP_BYTES.items():
        smaller = all(_GROUP_BYTES[plan.on_workers.dtype] > size for plan in plans)
        if smaller and _would_fit(plans, free, starting, dtype=precision):
            fitting.append(f"--dtype {precision}")
            break
    longest = max(plan.on_workers.max_model_len for plan in plans)
    for context in _CONTEXTS:
        if context < longest and _would_fit(plans, free, starting, max_model_len=context):
            fitting.append(f"--max-model-len {context}")
            break
    if plans[0].settings.kv_memory_bytes and _would_fit(plans, free, starting, kv_memory="auto"):
        fitting.append("less --kv-memory")
    if fitting:
        return "try " + " or ".join(fitting)
    if _would_fit(plans, free, starting, dtype="int4", max_model_len=_CONTEXTS[-1]):
        return f"try --dtype int4 with --max-model-len {_CONTEXTS[-1]}"
    return "no precision makes it fit: free memory, or take a smaller model"


def _would_fit(
    plans: Sequence[MemoryPlan], free: int, starting: bool, **changes: str | int
) -> bool:
    changed = []
    for plan in plans:
        settings = msgspec.structs.replace(plan.settings, **changes)
        dtype = plan.on_workers.dtype if settings.dtype == "auto" else settings.dtype
        on_workers = ModelOnWorkers(
            name=plan.name,
            path=Path(),
            dtype=dtype,
            kv_dtype=kv_precision(plan.settings.kv_dtype, dtype),
            max_model_len=min(
                plan.on_workers.max_model_len, settings.max_model_len or plan.config.max_positions
            ),
        )
        changed.append(plan_memory(plan.config, on_workers, settings))
    return sum(_needs(changed, starting)) <= free


# --- one rank -------------------------------------------------------------------------------------


def _weights(shards: ModelShards, owned: range, dtype: Precision) -> int:
    return sum(layer_and_head_bytes(shards, owned, dtype))


def layer_and_head_bytes(shards: ModelShards, owned: range, dtype: Precision) -> tuple[int, int]:
    """Weights of all layers together, and of the logits, on the worker that has `owned`."""
    config = shards.config
    each = [range(v, v + 1) for v in owned]
    head = _filled(config.head_dim, _ROWS)
    hidden = [config.hidden_size]
    outputs = _filled(config.hidden_size, GROUP)
    heads, kv_heads = len(shards.heads(owned)), len(shards.kv_heads(owned))
    layer = (
        _matrix((heads + 2 * kv_heads) * head, hidden, dtype)
        + _matrix(outputs, [len(shards.heads(v)) * head for v in each], dtype)
        + _matrix(2 * len(shards.mlp_rows(owned)), hidden, dtype)
        + _matrix(outputs, [len(shards.mlp_rows(v)) for v in each], dtype)
    )
    # Logits of int4 models are computed in int8: see worker/ops/native.py.
    of_head: Precision = "int8" if dtype == "int4" else dtype
    vocabulary = _matrix(len(shards.vocab_rows(owned)), hidden, of_head)
    return config.num_layers * layer, vocabulary


def _matrix(rows: int, columns: Sequence[int], dtype: Precision) -> int:
    """`columns` of each segment."""
    groups = sum(-(-count // GROUP) for count in columns)
    return -(-rows // _ROWS) * _filled(groups * _GROUP_BYTES[dtype], _LINE)


def _kv_block(shards: ModelShards, owned: range, kv_dtype: str) -> int:
    return BLOCK_TOKENS * kv_token_bytes(shards, owned, kv_dtype)


def kv_token_bytes(shards: ModelShards, owned: range, kv_dtype: str) -> int:
    """Keys and values of a token, in all layers, on the worker that has `owned`."""
    config = shards.config
    row = _filled(config.head_dim, _ROWS) * _KV_BYTES[kv_dtype] + _KV_SCALE_BYTES.get(kv_dtype, 0)
    return 2 * config.num_layers * len(shards.kv_heads(owned)) * row


def _work(shards: ModelShards, owned: range, positions: int, settings: Settings) -> int:
    config = shards.config
    head = _filled(config.head_dim, _ROWS)
    heads = len(shards.heads(owned)) + 2 * len(shards.kv_heads(owned))
    rows = len(shards.mlp_rows(owned))
    # Values that live at the same time: residual stream, a norm, a layer's input and output, sums.
    per_token = 4 * (4 * config.hidden_size + 2 * heads * head + 4 * rows)
    logits = 4 * settings.max_num_seqs * len(shards.vocab_rows(owned))
    angles = 4 * positions * config.head_dim
    return per_token * settings.max_batched_tokens + logits + angles


def _filled(count: int, unit: int) -> int:
    return -(-count // unit) * unit
