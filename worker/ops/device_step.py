"""What a forward pass on a device takes, as tensors of that device, and the attention it computes."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from shared.messages import BLOCK_TOKENS
from worker.ops.torch_ops import PrefillSpan, StepInput
from worker.sampling.vocabulary import Doubles


@dataclass(frozen=True)
class DeviceSpan:
    """Consecutive tokens of one sequence in a step."""

    rows: slice
    """Of the batch."""
    places: torch.Tensor
    """[L] int64: where the KV cache holds the sequence so far, these tokens included."""
    visible: torch.Tensor | None
    """[tokens, L] bool; None: the span is the whole sequence, and each token sees those before it."""


@dataclass(frozen=True)
class DeviceDecode:
    """Sequences that have one token in a step; they are attended to together."""

    rows: torch.Tensor | None
    """[B] int64: their rows of the batch; None: they are the batch."""
    places: torch.Tensor
    """[B, L] int64: where the KV cache holds their positions, padded by repetition."""
    visible: torch.Tensor
    """[B, L] bool: not padding, and inside a sliding window."""


@dataclass(frozen=True)
class DeviceStep:
    """One forward pass: T tokens of several sequences."""

    ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64."""
    places: torch.Tensor
    """[T] int64: where the KV cache keeps each token."""
    spans: tuple[DeviceSpan, ...]
    decode: DeviceDecode | None
    logit_rows: torch.Tensor | None
    """[B] int64: the tokens whose successors are wanted; None: all."""
    pooled: tuple[tuple[slice, Doubles], ...]
    """Rows of the batch whose hidden states are added up, and where: [hidden], on the host."""

    @classmethod
    def of(cls, step: StepInput, window: int | None, device: torch.device) -> "DeviceStep":
        """The same step, moved to the device."""
        decode = None
        if step.decode is not None:
            decode = DeviceDecode(
                rows=step.decode.rows.to(device),
                places=step.decode.places.to(device),
                visible=~step.decode.hidden.to(device),
            )
        return cls(
            ids=step.ids.to(device),
            positions=step.positions.to(device),
            places=step.places.to(device),
            spans=tuple(_span(span, window, device) for span in step.prefill),
            decode=decode,
            logit_rows=step.logit_rows.to(device),
            pooled=step.pooled,
        )

    @classmethod
    def of_decode(
        cls, ids: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, window: int | None
    ) -> "DeviceStep":
        """One token of each of B sequences, from tensors of the device, without waiting for it.

        ids, positions: [B] int64; table: [B, N] int64, N blocks that hold at least `positions`.
        """
        at = torch.arange(table.shape[1] * BLOCK_TOKENS, device=table.device)
        here = positions[:, None]
        # Memory that was never written may hold NaN, which no mask removes: only written places.
        written = torch.minimum(at, here)
        places = _places(table, written)
        visible = at <= here
        if window is not None:
            visible &= at > here - window
        return cls(
            ids=ids,
            positions=positions,
            places=_places(table, here)[:, 0],
            spans=(),
            decode=DeviceDecode(None, places, visible),
            logit_rows=None,
            pooled=(),
        )


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    step: DeviceStep,
    kv_of_head: torch.Tensor | None,
) -> torch.Tensor:
    """Causal softmax(q k^T / sqrt(d)) v over the paged cache (Vaswani et al. 2017).

    q [T, heads, d]; keys, values [kv_heads, places, d]. kv_of_head [heads]: the KV head of each query
    head; None when every KV head has the same number of consecutive query heads. -> [T, heads, d]
    """
    if step.decode is not None and step.decode.rows is None:
        return _attend_decode(q, keys, values, step.decode, kv_of_head)
    out = torch.empty_like(q)
    for span in step.spans:
        out[span.rows] = _attend_span(q[span.rows], keys, values, span, kv_of_head)
    if step.decode is not None:
        rows = step.decode.rows
        out[rows] = _attend_decode(q[rows], keys, values, step.decode, kv_of_head)
    return out


def _attend_span(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    span: DeviceSpan,
    kv_of_head: torch.Tensor | None,
) -> torch.Tensor:
    k, v = (_gathered(memory, span.places, kv_of_head, q) for memory in (keys, values))
    mixed = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k[None],
        v[None],
        attn_mask=span.visible,
        is_causal=span.visible is None,
        enable_gqa=len(k) != q.shape[1],
    )
    return mixed[0].transpose(0, 1)


def _attend_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    decode: DeviceDecode,
    kv_of_head: torch.Tensor | None,
) -> torch.Tensor:
    (batch, length), (_, heads, d) = decode.places.shape, q.shape
    places = decode.places.flatten()
    k, v = (
        _gathered(memory, places, kv_of_head, q).view(-1, batch, length, d).transpose(0, 1)
        for memory in (keys, values)
    )
    # Query heads of one KV head are more queries of it: [B, KV, heads/KV, d].
    mixed = F.scaled_dot_product_attention(
        q.view(batch, k.shape[1], -1, d), k, v, attn_mask=decode.visible[:, None, None, :]
    )
    return mixed.reshape(batch, heads, d)


def _gathered(
    memory: torch.Tensor, places: torch.Tensor, kv_of_head: torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor:
    """[KV, places, d], or [heads, places, d] where KV heads have unequal numbers of query heads."""
    found = memory.index_select(1, places).to(like.dtype)
    return found if kv_of_head is None else found[kv_of_head]


def _places(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Where block tables [B, N] keep positions [B, P]."""
    return table.gather(1, positions // BLOCK_TOKENS) * BLOCK_TOKENS + positions % BLOCK_TOKENS


def _span(span: PrefillSpan, window: int | None, device: torch.device) -> DeviceSpan:
    rows = slice(span.first, span.first + span.count)
    visible = None
    if span.start or window is not None:
        query_at = torch.arange(span.start, span.start + span.count, device=device)[:, None]
        key_at = torch.arange(span.start + span.count, device=device)
        visible = key_at <= query_at
        if window is not None:
            visible &= key_at > query_at - window
    return DeviceSpan(rows, span.places.to(device), visible)
