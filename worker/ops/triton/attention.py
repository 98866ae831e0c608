"""Triton kernels for attention of single tokens over the paged cache, split over the keys (Dao et al. 2023).

A split has a fixed number of positions, counted from the sequence's beginning. So a token's result
depends on nothing but its sequence: not on the batch, nor on how long the other sequences are. How many
positions a row has is read on the device; the shapes of a launch depend on the sizes of tensors alone,
and a CUDA graph can hold it.
"""

import torch
import triton
import triton.language as tl

from shared.messages import BLOCK_TOKENS

SPLIT = 128
"""Positions of one program."""
_LEAST_DOT = 16
"""Rows and columns of a product at least, for tensor cores."""
_EVERYTHING = 1 << 30
"""As a sliding window."""


def attend_paged(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    window: int | None,
    queries_per_kv: int,
    first_query: int,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v of B tokens, each over its own sequence up to itself.

    q [B, heads, d]; keys, values [KV heads, places, d] in any float type; table [B, N] int64, of which
    rows may be the same memory; positions [B] int64. The query heads first_query + queries_per_kv * j + i,
    i < queries_per_kv, belong to KV head j where there are such heads. -> [B, heads, d]
    """
    (batch, heads, d), kv_heads = q.shape, len(keys)
    splits = triton.cdiv(table.shape[1] * BLOCK_TOKENS, SPLIT)
    out = torch.empty_like(q)
    if not out.numel():
        return out
    assert table.stride(1) == 1, "blocks of a table lie side by side"
    tops = torch.empty((batch, heads, splits), dtype=torch.float32, device=q.device)
    sums = torch.empty_like(tops)
    mixed = torch.empty((batch, heads, splits, d), dtype=torch.float32, device=q.device)
    block_d = max(_LEAST_DOT, triton.next_power_of_2(d))
    window = _EVERYTHING if window is None else window
    attend_split_kernel[(batch, kv_heads, splits)](
        q.contiguous(),
        keys,
        values,
        table,
        positions,
        tops,
        sums,
        mixed,
        d**-0.5,
        heads,
        queries_per_kv,
        first_query,
        table.stride(0),
        keys.stride(0),
        positions.stride(0),
        window,
        splits,
        head_dim=d,
        block_d=block_d,
        members=max(_LEAST_DOT, triton.next_power_of_2(queries_per_kv)),
        split_tokens=SPLIT,
        tile=tile_of(block_d, q.dtype),
        page=BLOCK_TOKENS,
        num_warps=4,
    )
    attend_join_kernel[(batch, heads)](
        tops,
        sums,
        mixed,
        positions,
        out,
        heads,
        positions.stride(0),
        window,
        splits,
        head_dim=d,
        block_d=block_d,
        split_tokens=SPLIT,
        num_warps=1,
    )
    return out


def tile_of(block_d: int, dtype: torch.dtype) -> int:
    """Positions at a time: as many as a program has registers for."""
    if block_d <= 64:
        return 64
    return 16 if dtype == torch.float32 else 32


@triton.jit
def attend_split_kernel(
    q,
    keys,
    values,
    table,
    positions,
    tops,
    sums,
    mixed,
    scale,
    heads,
    queries_per_kv,
    first_query,
    table_stride,
    cache_stride,
    positions_stride,
    window,
    splits,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    members: tl.constexpr,
    split_tokens: tl.constexpr,
    tile: tl.constexpr,
    page: tl.constexpr,
):
    """One split of one row for one KV head: the highest score, the sum of weights, and the sum of values.

    Splits without a visible position write nothing, and are not read.
    """
    row = tl.program_id(0).to(tl.int64)
    kv = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    position = tl.load(positions + row * positions_stride)
    begin = split * split_tokens
    if (begin <= position) & (begin + split_tokens > position - window + 1):
        member = tl.arange(0, members)
        head = first_query + kv * queries_per_kv + member
        there = (member < queries_per_kv) & (head >= 0) & (head < heads)
        dims = tl.arange(0, block_d)
        in_head = dims < head_dim
        query = tl.load(
            q + (row * heads + head)[:, None] * head_dim + dims[None, :],
            mask=there[:, None] & in_head[None, :],
            other=0.0,
        )
        top = tl.full([members], float("-inf"), tl.float32)
        total = tl.zeros([members], tl.float32)
        sum_of_values = tl.zeros([members, block_d], tl.float32)
        for start in range(0, split_tokens, tile):
            at = begin + start + tl.arange(0, tile)
            seen = (at <= position) & (at > position - window)
            block = tl.load(table + row * table_stride + at // page, mask=seen, other=0)
            place = block * page + at % page
            where = kv * cache_stride + place[:, None] * head_dim + dims[None, :]
            whole = seen[:, None] & in_head[None, :]
            # What was never written may be NaN, and 0 * NaN is: it is not even read.
            k = tl.load(keys + where, mask=whole, other=0.0).to(query.dtype)
            v = tl.load(values + where, mask=whole, other=0.0).to(query.dtype)
            scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1))
            # A tile without a visible position has no highest score: any finite one does.
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp(scores - finite[:, None])
            decay = tl.exp(top - finite)
            total = total * decay + tl.sum(weights, axis=1)
            sum_of_values = sum_of_values * decay[:, None] + tl.dot(
                weights.to(query.dtype), v, input_precision="ieee"
            )
            top = higher
        to = (row * heads + head) * splits + split
        tl.store(tops + to, top, mask=there)
        tl.store(sums + to, total, mask=there)
        tl.store(
            mixed + to[:, None] * head_dim + dims[None, :],
            sum_of_values,
            mask=there[:, None] & in_head[None, :],
        )


@triton.jit
def attend_join_kernel(
    tops,
    sums,
    mixed,
    positions,
    out,
    heads,
    positions_stride,
    window,
    splits,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    split_tokens: tl.constexpr,
):
    """One head of one row: its splits one after the other."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + row * positions_stride)
    first = tl.maximum(position - window + 1, 0) // split_tokens
    last = position // split_tokens
    dims = tl.arange(0, block_d)
    in_head = dims < head_dim
    base = (row * heads + head) * splits
    top = tl.load(tops + base + first)
    total = tl.load(sums + base + first)
    y = tl.load(mixed + (base + first) * head_dim + dims, mask=in_head, other=0.0)
    for split in range(first + 1, last + 1):
        theirs = tl.load(tops + base + split)
        higher = tl.maximum(top, theirs)
        ours_fade = tl.exp(top - higher)
        theirs_fade = tl.exp(theirs - higher)
        more = tl.load(mixed + (base + split) * head_dim + dims, mask=in_head, other=0.0)
        y = y * ours_fade + more * theirs_fade
        total = total * ours_fade + tl.load(sums + base + split) * theirs_fade
        top = higher
    tl.store(
        out + (row * heads + head) * head_dim + dims,
        (y / total).to(out.dtype.element_ty),
        mask=in_head,
    )
