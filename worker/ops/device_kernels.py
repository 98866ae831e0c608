"""The kernels that a device's arithmetic is made of, and those that torch itself has."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

from worker.ops.base import HeadLayout, HeadNorms
from worker.ops.device_step import DeviceStep, attend
from worker.ops.torch_ops import uneven_kv_of_head


@dataclass(frozen=True)
class Int8Weight:
    """A weight [N, K] whose rows are integers times a scale each."""

    values: torch.Tensor
    """[N, K] int8."""
    scales: torch.Tensor
    """[N], in the compute dtype."""

    @classmethod
    def of(cls, weight: torch.Tensor, compute: torch.dtype) -> "Int8Weight":
        """Rounded to the nearest; the largest number of a row becomes 127."""
        rows = weight.float()
        scales = (rows.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return cls((rows / scales[:, None]).round().to(torch.int8), scales.to(compute))


Matrix = torch.Tensor | Int8Weight


@dataclass(frozen=True)
class Heads:
    """A rank's attention heads, as kernels want to know them."""

    layout: HeadLayout
    kv_of_head: torch.Tensor | None
    """[heads] int64 on the device; None when they fall evenly, in order, onto the KV heads."""

    @classmethod
    def of(cls, layout: HeadLayout, device: torch.device) -> "Heads":
        """The same, with what has to be on the device."""
        uneven = uneven_kv_of_head(layout)
        return cls(layout, None if uneven is None else uneven.to(device))


class DeviceKernels(Protocol):
    """Functions of tensors on one device, none of which waits for it. Weights and caches are contiguous."""

    name: str
    """In a word or two, for people."""
    deterministic: bool
    """Whether a token's results depend on its sequence alone, and on no number of ranks."""

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + delta [T, N] float32, and its RMS norm times weight, in `dtype`."""

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
        """Rotated queries [T, heads, d] in qkv's type; keys and values go into the cache at `places`.

        qkv [T, (heads + 2 KV heads) * d]; angles: cos and sin [T, 1, d / 2]; keys, values [KV heads, places, d].
        """

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        step: DeviceStep,
        heads: Heads,
    ) -> torch.Tensor:
        """Causal attention over the paged cache: [T, heads, d]."""

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up: [T, 2 * N] -> [T, N]."""

    def linear(self, x: torch.Tensor, weight: Matrix) -> torch.Tensor:
        """x [T, K] in the compute dtype times weight [N, K] transposed: [T, N] in x's type."""

    def shard_products(self, x: torch.Tensor, weight: Matrix, widths: list[int]) -> torch.Tensor:
        """A product for each virtual shard, of which widths are the columns: [S, T, N] float32.

        Of kernels that are deterministic.
        """


class TorchKernels:
    """See DeviceKernels: torch's own functions, on any device."""

    name = "torch"
    deterministic = False

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See DeviceKernels."""
        if delta is not None:
            x = x + delta
        return x, F.rms_norm(x, weight.shape, weight, eps).to(dtype)

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
        heads, kv_heads, d = len(layout.heads), len(layout.kv_heads), layout.head_dim
        by_head = qkv.view(len(qkv), heads + 2 * kv_heads, d)
        rotated = by_head[:, : heads + kv_heads].float()
        if norms is not None:
            rotated = torch.cat(
                (
                    F.rms_norm(rotated[:, :heads], (d,), norms.query, norms.eps),
                    F.rms_norm(rotated[:, heads:], (d,), norms.key, norms.eps),
                ),
                dim=1,
            )
        rotated = _rotate(rotated, *angles)
        new_values = by_head[:, heads + kv_heads :]
        for memory, new in ((keys, rotated[:, heads:]), (values, new_values)):
            memory.index_copy_(1, places, new.transpose(0, 1).to(memory.dtype))
        return rotated[:, :heads].to(qkv.dtype)

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        step: DeviceStep,
        heads: Heads,
    ) -> torch.Tensor:
        """See DeviceKernels."""
        return attend(q, keys, values, step, heads.kv_of_head)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See DeviceKernels."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def linear(self, x: torch.Tensor, weight: Matrix) -> torch.Tensor:
        """See DeviceKernels. int8 weights are widened before the product."""
        if isinstance(weight, Int8Weight):
            return F.linear(x, weight.values.to(x.dtype)) * weight.scales
        return F.linear(x, weight)

    def shard_products(self, x: torch.Tensor, weight: Matrix, widths: list[int]) -> torch.Tensor:
        """See DeviceKernels."""
        raise AssertionError("torch picks kernels by shape: its sums have no fixed order")


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, heads, head_dim] by its position; cos, sin [T, 1, head_dim / 2].

    Dimension i is paired with i + head_dim / 2, as in Hugging Face checkpoints.
    """
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
