"""cos and sin of every position, for each way of making contexts longer."""

import math

import torch

from shared.rope import Rope
from worker.ops.base import RopeTable


def rope_table(rope: Rope, head_dim: int, positions: int) -> RopeTable:
    """Of the angles position * frequency (Su et al. 2021), for positions 0 .. positions - 1.

    "dynamic" depends on how many positions there are: all tokens of a sequence must be rotated alike,
    however long it becomes, or keys in the cache would no longer fit its new ones.
    """
    frequency = _frequencies(rope, head_dim, positions)
    angle = torch.arange(positions).float()[:, None] * frequency
    return RopeTable(angle.cos() * rope.attention_factor, angle.sin() * rope.attention_factor)


def _frequencies(rope: Rope, head_dim: int, positions: int) -> torch.Tensor:
    """[head_dim / 2] float32."""
    exponent = torch.arange(0, head_dim, 2).float() / head_dim
    frequency = 1.0 / rope.theta**exponent
    match rope.kind:
        case "default":
            return frequency
        case "linear":  # positions move closer together (Chen et al. 2023)
            return frequency / rope.factor
        case "dynamic":  # "NTK-aware": low frequencies are stretched, high ones hardly
            length = max(positions, rope.original_positions)
            stretch = rope.factor * length / rope.original_positions - (rope.factor - 1)
            theta = rope.theta * stretch ** (head_dim / (head_dim - 2)) if head_dim > 2 else 1.0
            return 1.0 / theta**exponent
        case "yarn":
            return _yarn(rope, frequency, head_dim)
        case "llama3":
            return _llama3(rope, frequency)


def _yarn(rope: Rope, frequency: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Between left alone and stretched by how often a dimension turns (Peng et al. 2023, eq. 17-23)."""

    def dimension(turns: float) -> float:
        """The one that turns so often in the original context."""
        wave = rope.original_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(rope.theta))

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    stretched = ((torch.arange(head_dim // 2).float() - first) / (last - first)).clamp(0, 1)
    return frequency / rope.factor * stretched + frequency * (1 - stretched)


def _llama3(rope: Rope, frequency: torch.Tensor) -> torch.Tensor:
    """As Llama 3.1's published code: by wave length, with a smooth passage between the borders."""
    turns = rope.original_positions * frequency / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency / rope.factor * (1 - kept) + frequency * kept
