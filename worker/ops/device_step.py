"""What a forward pass on a device takes, as tensors of that device, and attention with torch's functions."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional as F

from shared.messages import BLOCK_TOKENS
from worker.ops.torch_ops import StepInput
from worker.sampling.vocabulary import Doubles


@dataclass(frozen=True)
class DeviceSpan:
    """Consecutive tokens of one sequence in a step."""

    rows: slice
    """Of the batch."""
    start: int
    """Position of the first of them."""
    table: torch.Tensor
    """[N] int64: the blocks of the sequence so far, these tokens included."""
    window: int | None

    @cached_property
    def places(self) -> torch.Tensor:
        """[L] int64: where the KV cache holds the sequence so far."""
        at = torch.arange(self._length, device=self.table.device)
        return _places(self.table[None], at[None])[0]

    @cached_property
    def visible(self) -> torch.Tensor | None:
        """[tokens, L] bool; None: the span is the whole sequence, and each token sees those before it."""
        if not self.start and self.window is None:
            return None
        key_at = torch.arange(self._length, device=self.table.device)
        query_at = key_at[self.start :, None]
        visible = key_at <= query_at
        if self.window is not None:
            visible &= key_at > query_at - self.window
        return visible

    @property
    def _length(self) -> int:
        return self.start + self.count

    @property
    def count(self) -> int:
        """Of its tokens."""
        rows: int = self.rows.stop - self.rows.start
        return rows


@dataclass(frozen=True)
class DeviceDecode:
    """Sequences that have one token in a step; they are attended to together."""

    rows: torch.Tensor | None
    """[B] int64: their rows of the batch; None: they are the batch."""
    table: torch.Tensor
    """[B, N] int64: N blocks that hold at least `positions`; any, behind those."""
    positions: torch.Tensor
    """[B] int64."""
    window: int | None

    @cached_property
    def places(self) -> torch.Tensor:
        """[B, L] int64: where the KV cache holds their positions, padded by repetition.

        Memory that was never written may hold NaN, which no mask removes: only written places.
        """
        return _places(self.table, torch.minimum(self._at, self.positions[:, None]))

    @cached_property
    def visible(self) -> torch.Tensor:
        """[B, L] bool: not padding, and inside a sliding window."""
        here = self.positions[:, None]
        visible = self._at <= here
        if self.window is not None:
            visible &= self._at > here - self.window
        return visible

    @property
    def _at(self) -> torch.Tensor:
        return torch.arange(self.table.shape[1] * BLOCK_TOKENS, device=self.table.device)


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
                table=_blocks(step.decode.places).to(device),
                positions=step.positions[step.decode.rows].to(device),
                window=window,
            )
        spans = (
            DeviceSpan(
                rows=slice(span.first, span.first + span.count),
                start=span.start,
                table=_blocks(span.places).to(device),
                window=window,
            )
            for span in step.prefill
        )
        return cls(
            ids=step.ids.to(device),
            positions=step.positions.to(device),
            places=step.places.to(device),
            spans=tuple(spans),
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
        return cls(
            ids=ids,
            positions=positions,
            places=_places(table, positions[:, None])[:, 0],
            spans=(),
            decode=DeviceDecode(None, table, positions, window),
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
    attend_spans(out, q, keys, values, step.spans, kv_of_head)
    if step.decode is not None:
        rows = step.decode.rows
        out[rows] = _attend_decode(q[rows], keys, values, step.decode, kv_of_head)
    return out


def attend_spans(
    out: torch.Tensor,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    spans: Iterable[DeviceSpan],
    kv_of_head: torch.Tensor | None,
) -> None:
    """`attend` for the rows of these spans, into `out` [T, heads, d]."""
    for span in spans:
        out[span.rows] = _attend_span(q[span.rows], keys, values, span, kv_of_head)


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


def _blocks(places: torch.Tensor) -> torch.Tensor:
    """The block tables [..., N] that lead to places [..., L] of the positions from 0 on."""
    return places[..., ::BLOCK_TOKENS] // BLOCK_TOKENS
