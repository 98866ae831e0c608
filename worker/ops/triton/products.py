"""Triton kernels for products of activations and weights: int8 weights are read as such, and sums can
have a fixed order.

`product` with a fixed tile gives every row the same bits whatever rows are beside it, and every output
whatever outputs are.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Tile:
    """What one program of `product` computes."""

    rows: int
    outputs: int
    inner: int
    """Columns of the weight that are added up at a time."""
    warps: int

    def inner_of(self, dtype: torch.dtype) -> int:
        """For float32, which has no tensor cores, as many as a program has registers for."""
        return self.inner // 4 if dtype == torch.float32 else self.inner


FIXED = Tile(rows=32, outputs=32, inner=128, warps=4)
"""For a sum whose order is always the same."""
FEW_ROWS = Tile(rows=16, outputs=32, inner=128, warps=4)
MANY_ROWS = Tile(rows=64, outputs=64, inner=64, warps=4)
_OUTPUTS, _INNER = 4, 1024
"""Of one program of a product with one row."""


@dataclass(frozen=True)
class Shards:
    """Where a weight's columns are cut into virtual shards."""

    bounds: torch.Tensor
    """[S + 1] int32: shard s has the columns bounds[s] to bounds[s + 1]."""
    count: int
    aligned: bool
    """Whether all bounds are multiples of 16."""

    @classmethod
    def of(cls, widths: list[int], device: torch.device) -> "Shards":
        """Of such widths, side by side."""
        bounds = [sum(widths[:i]) for i in range(len(widths) + 1)]
        tensor = torch.tensor(bounds, dtype=torch.int32, device=device)
        return cls(tensor, len(widths), all(bound % 16 == 0 for bound in bounds))


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    tile: Tile,
    shards: Shards | None = None,
) -> torch.Tensor:
    """x [T, K] times weight [N, K] transposed -> [T, N] in x's type, sums in float32.

    weight: of x's type, or int8 with scales [N]. shards: each for itself, with scales [S, N] -> [S, T, N]
    float32.
    """
    (rows, inner), outputs = x.shape, len(weight)
    if shards is None:
        out = x.new_empty((1, rows, outputs))
    else:
        out = torch.empty((shards.count, rows, outputs), dtype=torch.float32, device=x.device)
    if out.numel():
        grid = (triton.cdiv(outputs, tile.outputs), triton.cdiv(rows, tile.rows), len(out))
        product_kernel[grid](
            x.contiguous(),
            weight,
            x if scales is None else scales,
            x if shards is None else shards.bounds,
            out,
            rows,
            outputs,
            inner,
            scaled=scales is not None,
            sharded=shards is not None,
            aligned=shards is not None and shards.aligned,
            block_m=tile.rows,
            block_n=tile.outputs,
            block_k=tile.inner_of(x.dtype),
            num_warps=tile.warps,
            num_stages=3,
        )
    return out if shards is not None else out[0]


def one_row_product(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None
) -> torch.Tensor:
    """What `product` gives for x [1, K], without tensor cores, which would mostly multiply padding."""
    inner, outputs = x.shape[1], len(weight)
    out = x.new_empty((1, outputs))
    if outputs:
        one_row_kernel[(triton.cdiv(outputs, _OUTPUTS),)](
            x.contiguous(),
            weight,
            x if scales is None else scales,
            out,
            outputs,
            inner,
            scaled=scales is not None,
            block_n=_OUTPUTS,
            block_k=_INNER,
            num_warps=4,
        )
    return out


@triton.jit
def product_kernel(
    x,
    weight,
    scales,
    bounds,
    out,
    rows,
    outputs,
    inner,
    scaled: tl.constexpr,
    sharded: tl.constexpr,
    aligned: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """One tile of one shard's product, from the first column to the last."""
    shard = tl.program_id(2).to(tl.int64)
    m = tl.program_id(1).to(tl.int64) * block_m + tl.arange(0, block_m)
    n = tl.program_id(0).to(tl.int64) * block_n + tl.arange(0, block_n)
    if sharded:
        begin = tl.load(bounds + shard)
        end = tl.load(bounds + shard + 1)
        if aligned:
            begin = tl.multiple_of(begin, 16)
            end = tl.multiple_of(end, 16)
    else:
        begin = 0
        end = inner
    total = tl.zeros([block_m, block_n], tl.float32)
    for start in range(begin, end, block_k):
        k = start + tl.arange(0, block_k)
        inside = k < end
        a = tl.load(
            x + m[:, None] * inner + k[None, :],
            mask=(m < rows)[:, None] & inside[None, :],
            other=0.0,
        )
        b = tl.load(
            weight + n[:, None] * inner + k[None, :],
            mask=(n < outputs)[:, None] & inside[None, :],
            other=0,
        )
        if scaled:  # integers of 8 bits are exact in any float type
            b = b.to(tl.float32)
        b = b.to(a.dtype)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    if scaled:
        scale = tl.load(scales + shard * outputs + n, mask=n < outputs, other=0.0)
        total *= scale.to(tl.float32)[None, :]
    tl.store(
        out + (shard * rows + m)[:, None] * outputs + n[None, :],
        total.to(out.dtype.element_ty),
        mask=(m < rows)[:, None] & (n < outputs)[None, :],
    )


@triton.jit
def one_row_kernel(
    x,
    weight,
    scales,
    out,
    outputs,
    inner,
    scaled: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """Some outputs: products side by side, which are added up at the end."""
    n = tl.program_id(0).to(tl.int64) * block_n + tl.arange(0, block_n)
    totals = tl.zeros([block_n, block_k], tl.float32)
    for start in range(0, inner, block_k):
        k = start + tl.arange(0, block_k)
        a = tl.load(x + k, mask=k < inner, other=0.0).to(tl.float32)
        b = tl.load(
            weight + n[:, None] * inner + k[None, :],
            mask=(n < outputs)[:, None] & (k < inner)[None, :],
            other=0,
        ).to(tl.float32)
        totals += a[None, :] * b
    y = tl.sum(totals, axis=1)
    if scaled:
        y *= tl.load(scales + n, mask=n < outputs, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=n < outputs)
