"""The decoder's arithmetic in plain torch: the reference, and what runs without the native library.

Activations are float32 [T, ...] between operations; products take their inputs in the weights'
dtype. torch picks kernels by shape, so results may differ in the last bits between batches.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

_UPCAST_ROWS = 32
"""From so many rows on a CPU without 16-bit matrix instructions does better in float32 (5632 x 2048,
128 rows, one Ice Lake core: bf16 107 ms, fp16 209 ms, converted and then float32 49-57 ms)."""


@dataclass(frozen=True)
class PrefillSpan:
    """Consecutive tokens of one sequence in a step: rows [first, first + count) of the batch."""

    first: int
    count: int
    start: int
    """Position of the first of them."""
    places: torch.Tensor
    """[L] int64: where the KV cache holds positions 0 .. start + count - 1."""


@dataclass(frozen=True)
class DecodeBatch:
    """Sequences that have one token in a step; they are attended to together."""

    rows: torch.Tensor
    """[B] int64: their rows of the batch."""
    places: torch.Tensor
    """[B, L] int64: where the KV cache holds their positions; padded to the longest by repetition,
    because memory that was never written may hold NaN, which no mask removes."""
    hidden: torch.Tensor
    """[B, L] bool: padding, and what a sliding window leaves out."""


@dataclass(frozen=True)
class AttentionPlan:
    """Which cached positions each token of a step attends to."""

    prefill: tuple[PrefillSpan, ...]
    decode: DecodeBatch | None
    sliding_window: int | None


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K] times weight [N, K] transposed -> [T, N] float32."""
    if len(x) >= _UPCAST_ROWS and weight.device.type == "cpu":
        return F.linear(x.to(weight.dtype).float(), weight.float())
    return F.linear(x.to(weight.dtype), weight).float()


def batched_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [S, T, K] times weight [S, K, N], each of S for itself -> [S, T, N] float32."""
    if x.shape[1] >= _UPCAST_ROWS and weight.device.type == "cpu":
        return torch.bmm(x.to(weight.dtype).float(), weight.float())
    return torch.bmm(x.to(weight.dtype), weight).float()


def embed(ids: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows `ids` [T] of table [vocab, hidden], rounded to the model's dtype -> float32."""
    return table[ids].to(dtype).float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019)."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020); gate_up [T, 2 * rows] -> [T, rows]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rope_table(head_dim: int, positions: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [positions, head_dim / 2] of position * theta^(-2i/head_dim) (Su et al. 2021)."""
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.arange(positions).float()[:, None] * frequency
    return angle.cos(), angle.sin()


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, heads, head_dim] by its position; cos, sin [T, head_dim / 2].

    Dimension i is paired with i + head_dim / 2, as in Hugging Face checkpoints.
    """
    left, right = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: AttentionPlan,
    kv_of_head: torch.Tensor | None,
) -> torch.Tensor:
    """Causal softmax(q k^T / sqrt(d)) v over the paged cache (Vaswani et al. 2017), in float32.

    q [T, heads, d]; keys, values [kv_heads, places, d]. kv_of_head [heads]: the KV head of each query
    head; None when every KV head has the same number of consecutive query heads. -> [T, heads, d]
    """
    out = torch.empty_like(q)
    if not out.numel():  # fewer heads than virtual shards
        return out
    scale = q.shape[-1] ** -0.5
    for span in plan.prefill:
        rows = slice(span.first, span.first + span.count)
        k, v = _gather(keys, values, span.places, kv_of_head)  # [KV, L, d]
        out[rows] = _attend_span(q[rows] * scale, k, v, span, plan.sliding_window)
    if plan.decode is not None:
        k, v = _gather(keys, values, plan.decode.places.flatten(), kv_of_head)
        out[plan.decode.rows] = _attend_decode(q[plan.decode.rows] * scale, k, v, plan.decode)
    return out


def _gather(
    keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor, kv_of_head: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = keys.index_select(1, places).float(), values.index_select(1, places).float()
    return (k, v) if kv_of_head is None else (k[kv_of_head], v[kv_of_head])


def _attend_span(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: PrefillSpan, window: int | None
) -> torch.Tensor:
    count, heads, d = q.shape
    kv, length, _ = k.shape
    # Query heads of one KV head become more rows of the same product: [KV, heads/KV * T, d].
    grouped = q.transpose(0, 1).reshape(kv, -1, d)
    scores = (grouped @ k.transpose(1, 2)).view(kv, -1, count, length)
    query_at = torch.arange(span.start, span.start + count)[:, None]
    key_at = torch.arange(length)
    hidden = key_at > query_at
    if window is not None:
        hidden |= key_at <= query_at - window
    weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
    mixed = weights.view(kv, -1, length) @ v
    return mixed.view(heads, count, d).transpose(0, 1)


def _attend_decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decode: DecodeBatch
) -> torch.Tensor:
    batch, heads, d = q.shape
    kv = k.shape[0]
    k, v = k.view(kv, batch, -1, d), v.view(kv, batch, -1, d)
    grouped = q.view(batch, kv, -1, d).transpose(0, 1)  # [KV, B, heads/KV, d]
    scores = grouped @ k.transpose(2, 3)  # [KV, B, heads/KV, L]
    weights = scores.masked_fill_(decode.hidden[:, None, :], float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1).reshape(batch, heads, d)
