"""The decoder's arithmetic in plain torch: the reference, and what runs without the native library.

Activations are float32 [T, ...] between operations; products take their inputs in the weights'
dtype. torch picks kernels by shape, so results may differ in the last bits between batches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from shared.messages import BLOCK_TOKENS
from shared.worker_messages import SequenceStep
from worker.comm.base import Communicator, Floats
from worker.kv_cache import KVCache, block_bytes
from worker.native.sampling import Wanted
from worker.ops.base import NO_SUMS, HeadLayout, HeadNorms, RopeTable, Source
from worker.sampling.vocabulary import Doubles, Ints, StepLogits, best_of

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
class StepInput:
    """One forward pass: T tokens of several sequences, and whose logits are wanted."""

    ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64."""
    places: torch.Tensor
    """[T] int64: where the KV cache keeps each token."""
    prefill: tuple[PrefillSpan, ...]
    decode: DecodeBatch | None
    logit_rows: torch.Tensor
    """[B] int64: the tokens whose successors are wanted."""
    pooled: tuple[tuple[slice, Doubles], ...]
    """Rows of the batch whose hidden states are added up, and where: [hidden]."""


@dataclass(frozen=True)
class RowWeight:
    """A weight whose columns are cut into virtual shards, as one batch of products.

    Narrower shards are filled up with zeros; `spread` [shards * width] then says which column of the
    input each column of the batch takes, the one behind the last being zero.
    """

    batch: torch.Tensor
    """[shards, width, N]"""
    spread: torch.Tensor | None


class TorchOps:
    """See Ops."""

    def __init__(
        self,
        comm: Communicator,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        sliding_window: int | None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """progress: is told the weight bytes so far with every weight."""
        self._progress = progress
        self._comm, self._dtype, self._kv_dtype = comm, dtype, kv_dtype
        self._window = sliding_window
        self._forward: Callable[[], torch.Tensor] | None = None
        self._take: Callable[[Floats], None] | None = None
        self.weight_bytes = 0
        self.comm_seconds = 0.0  # the communicator sees them all
        self._cache: KVCache | None = None
        self._step: StepInput | None = None

    # --- loading ---

    def vector(self, values: torch.Tensor, *, head_dim: int | None = None) -> torch.Tensor:
        """See Ops."""
        return values.float()

    def table(self, rows: torch.Tensor) -> torch.Tensor:
        """See Ops."""
        return rows

    def weight(
        self,
        source: Source,
        *,
        head_dim: int | None = None,
        token_ids: Sequence[range] | None = None,
    ) -> torch.Tensor:
        """See Ops."""
        return self._count(source.read().to(self._dtype))

    def row_weight(
        self, source: Source, widths: Sequence[int], *, head_dim: int | None = None
    ) -> RowWeight:
        """See Ops."""
        columns = source.read()
        width = max(widths)
        batch = torch.zeros(len(widths), width, len(columns), dtype=self._dtype)
        start = 0
        for shard, own in zip(batch, widths, strict=True):
            shard[:own] = columns[:, start : start + own].T
            start += own
        if all(own == width for own in widths):
            return RowWeight(self._count(batch), None)
        starts = np.cumsum([0, *widths])
        spread = [
            starts[shard] + i if i < own else start
            for shard, own in enumerate(widths)
            for i in range(width)
        ]
        return RowWeight(self._count(batch), torch.tensor(spread))

    def block_bytes(self, layers: int, layout: HeadLayout) -> int:
        """See Ops."""
        return block_bytes(layers, len(layout.kv_heads), layout.head_dim, self._kv_dtype)

    def observe(self, take: Callable[[Floats], None]) -> None:
        """See Ops."""
        self._take = take

    def allocate(
        self,
        forward: Callable[[], torch.Tensor],
        layers: int,
        layout: HeadLayout,
        blocks: int,
        tokens: int,
    ) -> None:
        """See Ops."""
        self._forward = forward
        kv_heads = len(layout.kv_heads)
        self._cache = KVCache(layers, kv_heads, layout.head_dim, blocks, self._kv_dtype)

    def _count(self, weight: torch.Tensor) -> torch.Tensor:
        self.weight_bytes += weight.nbytes
        self._progress(self.weight_bytes)
        return weight

    # --- a forward pass ---

    def embed(self, table: torch.Tensor) -> torch.Tensor:
        """See Ops."""
        return table[self._now.ids].to(self._dtype).float()

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Ops."""
        if delta is not None:
            x = x + delta
        return x, rms_norm(x, weight, eps)

    def final_norm(
        self, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See Ops."""
        for span, total in self._now.pooled:
            hidden = rms_norm(x[span] + delta[span], weight, eps)
            total += hidden.double().sum(0).numpy()
        rows = self._now.logit_rows
        return rms_norm(x[rows] + delta[rows], weight, eps)

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See Ops."""
        return linear(x, weight)

    def add_bias(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """See Ops."""
        return x + bias

    def linear_all_reduce(self, x: torch.Tensor, weight: RowWeight) -> torch.Tensor:
        """See Ops."""
        tokens, (shards, width, outputs) = len(x), weight.batch.shape
        if weight.spread is not None:
            x = F.pad(x, (0, 1)).index_select(1, weight.spread)
        by_shard = x.view(tokens, shards, width).transpose(0, 1)
        partials = batched_linear(by_shard, weight.batch)
        total = self._comm.all_reduce_tree(partials.view(shards, -1).numpy())
        return torch.from_numpy(total).view(tokens, outputs)

    def attention(
        self,
        qkv: torch.Tensor,
        rope_table: RopeTable,
        layer: int,
        layout: HeadLayout,
        norms: HeadNorms | None = None,
    ) -> torch.Tensor:
        """See Ops."""
        assert self._cache is not None, "allocate comes before steps"
        step, heads, kv_heads = self._now, len(layout.heads), len(layout.kv_heads)
        by_head = qkv.view(len(qkv), heads + 2 * kv_heads, layout.head_dim)
        cos, sin = rope_table.cos[step.positions], rope_table.sin[step.positions]
        q, k = by_head[:, :heads], by_head[:, heads : heads + kv_heads]
        if norms is not None:
            q, k = rms_norm(q, norms.query, norms.eps), rms_norm(k, norms.key, norms.eps)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        self._cache.write(layer, k, by_head[:, heads + kv_heads :], step.places)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        mixed = attention(q, keys, values, step, self._window, uneven_kv_of_head(layout))
        return mixed.reshape(len(qkv), heads * layout.head_dim)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See Ops."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def probe(self, x: torch.Tensor, delta: torch.Tensor) -> None:
        """See Ops."""
        if self._take is not None:
            self._take((x + delta).numpy())

    def logits(self, x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """See Ops."""
        return linear(x, head)

    @property
    def _now(self) -> StepInput:
        assert self._step is not None, "operations belong to a step"
        return self._step

    # --- steps ---

    def copy_block(self, source: int, target: int) -> None:
        """See Ops."""
        assert self._cache is not None, "allocate comes before steps"
        self._cache.copy(source, target)

    @torch.inference_mode()
    def run(
        self,
        sequences: Sequence[SequenceStep],
        last_tokens: Ints,
        wanted: Wanted | None = None,
        sums: Mapping[int, Doubles] = NO_SUMS,
        *,
        every_token: bool = False,
    ) -> StepLogits:
        """See Ops."""
        assert self._forward is not None, "allocate comes before steps"
        self._step = prepare(sequences, last_tokens, self._window, sums, every_token)
        logits: Floats = self._forward().numpy()
        return StepLogits(logits, best_of(logits), range(len(logits)))


def prepare(
    sequences: Sequence[SequenceStep],
    last_tokens: Ints,
    window: int | None,
    sums: Mapping[int, Doubles],
    every_token: bool,
) -> StepInput:
    """The tensors of one forward pass."""
    ids, positions, places, logit_rows = [], [], [], []
    prefill: list[PrefillSpan] = []
    decode_rows: list[int] = []
    decode_places: list[Ints] = []
    pooled: list[tuple[slice, Doubles]] = []
    row = 0
    for s in sequences:
        tokens = s.tokens or [int(last_tokens[s.slot])]
        count = len(tokens)
        context = _places(s.blocks, s.start + count)
        ids += tokens
        positions.append(np.arange(s.start, s.start + count))
        places.append(context[s.start :])
        if count == 1:
            decode_rows.append(row)
            decode_places.append(context)
        else:
            prefill.append(PrefillSpan(row, count, s.start, torch.from_numpy(context)))
        if s.pooled:
            pooled.append((slice(row, row + count), sums[s.slot]))
        row += count
        if s.sampling is not None:
            logit_rows.append(row - 1)
    if every_token:
        logit_rows = [*range(row)]
    return StepInput(
        ids=torch.tensor(ids),
        positions=torch.from_numpy(np.concatenate(positions)),
        places=torch.from_numpy(np.concatenate(places)),
        prefill=tuple(prefill),
        decode=_decode_batch(decode_rows, decode_places, window) if decode_rows else None,
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        pooled=tuple(pooled),
    )


def _places(blocks: bytes, length: int) -> Ints:
    """Where a block table keeps positions 0 .. length - 1: [length] int64."""
    table = np.frombuffer(blocks, dtype="<i4").astype(np.int64)[:, None]
    return (table * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)).ravel()[:length]


def _decode_batch(rows: list[int], contexts: list[Ints], window: int | None) -> DecodeBatch:
    """Contexts padded to the longest; what a token must not see is hidden."""
    lengths = np.array([len(c) for c in contexts])
    longest = int(lengths.max())
    places = np.stack([np.pad(c, (0, longest - len(c)), mode="edge") for c in contexts])
    at = np.arange(longest)
    hidden = at >= lengths[:, None]
    if window is not None:
        hidden |= at < lengths[:, None] - window
    return DecodeBatch(torch.tensor(rows), torch.from_numpy(places), torch.from_numpy(hidden))


def uneven_kv_of_head(layout: HeadLayout) -> torch.Tensor | None:
    """The KV head of each query head; None when they fall evenly, in order, onto the KV heads."""
    index, kv_heads = layout.kv_of_head, len(layout.kv_heads)
    queries = len(index) // kv_heads if kv_heads else 0
    if index == [kv for kv in range(kv_heads) for _ in range(queries)]:
        return None
    return torch.tensor(index)


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


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019)."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


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
    step: StepInput,
    window: int | None,
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
    for span in step.prefill:
        rows = slice(span.first, span.first + span.count)
        k, v = _gather(keys, values, span.places, kv_of_head)  # [KV, L, d]
        out[rows] = _attend_span(q[rows] * scale, k, v, span, window)
    if step.decode is not None:
        k, v = _gather(keys, values, step.decode.places.flatten(), kv_of_head)
        out[step.decode.rows] = _attend_decode(q[step.decode.rows] * scale, k, v, step.decode)
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
