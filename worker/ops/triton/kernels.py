"""The Triton kernels put together as DeviceKernels."""

import torch
from torch.nn import functional as F

from worker.ops.base import HeadLayout, HeadNorms
from worker.ops.device_kernels import Heads, Int8Weight, Matrix
from worker.ops.device_step import DeviceStep, attend_spans
from worker.ops.triton.attention import attend_paged
from worker.ops.triton.elementwise import add_norm, rotate_and_store, swiglu
from worker.ops.triton.products import (
    FEW_ROWS,
    FIXED,
    MANY_ROWS,
    Shards,
    one_row_product,
    product,
)

_WIDENED_ROWS = 256
"""From so many rows on int8 weights are widened for torch's product: reading them matters less."""


class TritonKernels:
    """See DeviceKernels: on GPUs, and on the CPU in Triton's interpreter."""

    name = "triton"

    def __init__(self, *, deterministic: bool = False) -> None:
        self.deterministic = deterministic
        self._shards: dict[tuple[int, ...], Shards] = {}

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See DeviceKernels."""
        return add_norm(x, delta, weight, eps, dtype)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        places: torch.Tensor,
        norms: HeadNorms | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        layout: HeadLayout,
    ) -> torch.Tensor:
        """See DeviceKernels."""
        weights = None if norms is None else (norms.query, norms.key, norms.eps)
        return rotate_and_store(qkv, *angles, places, weights, keys, values, len(layout.heads))

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        step: DeviceStep,
        heads: Heads,
    ) -> torch.Tensor:
        """See DeviceKernels. A prompt's tokens too are attended to one by one where bits matter."""
        decode, layout = step.decode, heads.layout
        shared = layout.queries_per_kv
        first = layout.kv_heads.start * shared - layout.heads.start
        if decode is not None and decode.rows is None:
            return attend_paged(
                *(q, keys, values, decode.table, decode.positions, decode.window, shared, first)
            )
        out = torch.empty_like(q)
        if decode is not None:
            rows = decode.rows
            out[rows] = attend_paged(
                *(q[rows], keys, values, decode.table),
                *(decode.positions, decode.window, shared, first),
            )
        if self.deterministic:
            for span in step.spans:
                table = span.table.expand(span.count, -1)
                positions = step.positions[span.rows]
                out[span.rows] = attend_paged(
                    *(q[span.rows], keys, values, table, positions, span.window, shared, first)
                )
        else:
            attend_spans(out, q, keys, values, step.spans, heads.kv_of_head)
        return out

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See DeviceKernels."""
        return swiglu(gate_up)

    def linear(self, x: torch.Tensor, weight: Matrix) -> torch.Tensor:
        """See DeviceKernels."""
        values, scales = _parts(weight)
        if self.deterministic:
            return product(x, values, scales, FIXED)
        if len(x) == 1:
            return one_row_product(x, values, scales)
        if scales is None:
            return F.linear(x, values)
        if len(x) >= _WIDENED_ROWS:
            return F.linear(x, values.to(x.dtype)) * scales
        return product(x, values, scales, FEW_ROWS if len(x) <= FEW_ROWS.rows else MANY_ROWS)

    def shard_products(self, x: torch.Tensor, weight: Matrix, widths: list[int]) -> torch.Tensor:
        """See DeviceKernels."""
        key = tuple(widths)
        if key not in self._shards:
            self._shards[key] = Shards.of(widths, x.device)
        return product(x, *_parts(weight), FIXED, self._shards[key])


def _parts(weight: Matrix) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Numbers, and scales of rows where there are."""
    return (weight.values, weight.scales) if isinstance(weight, Int8Weight) else (weight, None)
