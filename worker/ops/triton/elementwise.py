"""Triton kernels that read and write every number once: add + norm, rotation + KV write, SwiGLU.

Each computes in float32 and rounds what it writes. A row's result depends on that row alone.
"""

import torch
import triton
import triton.language as tl

_COLUMNS = 1024
"""Of one program of swiglu."""


def add_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta, and y / sqrt(mean(y^2) + eps) * weight of that y (Zhang & Sennrich 2019).

    x [T, N] float32, delta [T, N] of any float type, weight [N] float32 -> [T, N] float32 and in `dtype`.
    """
    rows, size = x.shape
    x = x.contiguous()
    total = x if delta is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=dtype)
    block = triton.next_power_of_2(size)
    if rows:
        add_norm_kernel[(rows,)](
            x,
            x if delta is None else delta.contiguous(),
            weight,
            total,
            normed,
            size,
            eps,
            has_delta=delta is not None,
            block=block,
            num_warps=8 if block >= 4096 else 4,
        )
    return total, normed


def rotate_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    places: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """Rotated queries [T, heads, d]; rotated keys, and values, go into the cache at `places`.

    qkv [T, (heads + 2 KV heads) * d]; cos, sin [T, 1, d / 2] float32; places [T] int64; norms: weights [d]
    float32 and eps of the RMS norms of queries and keys before the rotation; keys, values
    [KV heads, places, d]. Dimension i is paired with i + d / 2.
    """
    tokens, (kv_heads, _, d) = len(qkv), keys.shape
    queries = qkv.new_empty((tokens, heads, d))
    query_norm, key_norm, eps = (cos, cos, 0.0) if norms is None else norms
    if tokens:
        rotate_and_store_kernel[(tokens, heads + 2 * kv_heads)](
            qkv.contiguous(),
            cos,
            sin,
            places,
            query_norm,
            key_norm,
            queries,
            keys,
            values,
            heads,
            kv_heads,
            keys.stride(0),
            eps,
            normed=norms is not None,
            head_dim=d,
            half_block=triton.next_power_of_2(d // 2),
            num_warps=1,
        )
    return queries


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020): [T, 2 * N] -> [T, N] of the same type."""
    rows, size = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, size))
    if out.numel():
        swiglu_kernel[(rows, triton.cdiv(size, _COLUMNS))](
            gate_up.contiguous(), out, size, block=_COLUMNS, num_warps=4
        )
    return out


@triton.jit
def add_norm_kernel(
    x,
    delta,
    weight,
    total,
    normed,
    size,
    eps,
    has_delta: tl.constexpr,
    block: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < size
    y = tl.load(x + row * size + at, mask=inside, other=0.0)
    if has_delta:
        y += tl.load(delta + row * size + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row * size + at, y, mask=inside)
    mean = tl.sum(y * y, axis=0) / size
    w = tl.load(weight + at, mask=inside, other=0.0)
    y = y * (1.0 / tl.sqrt(mean + eps)) * w
    tl.store(normed + row * size + at, y.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def rotate_and_store_kernel(
    qkv,
    cos,
    sin,
    places,
    query_norm,
    key_norm,
    queries,
    keys,
    values,
    heads,
    kv_heads,
    cache_stride,
    eps,
    normed: tl.constexpr,
    head_dim: tl.constexpr,
    half_block: tl.constexpr,
):
    """One head of one token: a query's, a key's or a value's. Only the masks differ."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)  # times the size of a head's cache
    half: tl.constexpr = head_dim // 2
    at = tl.arange(0, half_block)
    inside = at < half
    source = qkv + (token * (heads + 2 * kv_heads) + head) * head_dim
    left = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(source + half + at, mask=inside, other=0.0).to(tl.float32)
    is_query = inside & (head < heads)
    is_key = inside & (head >= heads) & (head < heads + kv_heads)
    is_value = inside & (head >= heads + kv_heads)
    place = tl.load(places + token)

    value_at = values + (head - heads - kv_heads) * cache_stride + place * head_dim + at
    tl.store(value_at, left.to(values.dtype.element_ty), mask=is_value)
    tl.store(value_at + half, right.to(values.dtype.element_ty), mask=is_value)

    if normed:
        squares = tl.sum(left * left, axis=0) + tl.sum(right * right, axis=0)
        scale = 1.0 / tl.sqrt(squares / head_dim + eps)
        w = tl.load(query_norm + at, mask=is_query, other=0.0)
        w += tl.load(key_norm + at, mask=is_key, other=0.0)
        left = left * scale * w
        w = tl.load(query_norm + half + at, mask=is_query, other=0.0)
        w += tl.load(key_norm + half + at, mask=is_key, other=0.0)
        right = right * scale * w
    c = tl.load(cos + token * half + at, mask=inside, other=0.0)
    s = tl.load(sin + token * half + at, mask=inside, other=0.0)
    turned_left = left * c - right * s
    turned_right = right * c + left * s
    query_at = queries + (token * heads + head) * head_dim + at
    tl.store(query_at, turned_left.to(queries.dtype.element_ty), mask=is_query)
    tl.store(query_at + half, turned_right.to(queries.dtype.element_ty), mask=is_query)
    key_at = keys + (head - heads) * cache_stride + place * head_dim + at
    tl.store(key_at, turned_left.to(keys.dtype.element_ty), mask=is_key)
    tl.store(key_at + half, turned_right.to(keys.dtype.element_ty), mask=is_key)


@triton.jit
def swiglu_kernel(gate_up, out, size, block: tl.constexpr):
    """Some columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < size
    gate = tl.load(gate_up + row * 2 * size + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * size + at, y.to(out.dtype.element_ty), mask=inside)
