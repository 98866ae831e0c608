"""KV cache memory in blocks of 16 positions, one pair of tensors for each layer.

The head is the outermost dimension, so that all blocks of one KV head are contiguous: moving a
virtual shard to another worker moves whole heads. Which block belongs to whom is the coordinator's
business; here a block is just a row of memory.
"""

import torch

from shared.messages import BLOCK_TOKENS


class KVCache:
    """Keys and values of one model's layers for the KV heads that this rank holds."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        blocks: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        """`blocks` blocks for each layer; memory is touched only when it is written. device: None is the CPU."""
        shape = (kv_heads, blocks * BLOCK_TOKENS, head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]

    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor
    ) -> None:
        """Store keys and values [T, kv_heads, head_dim] at `places` [T] (block * 16 + offset)."""
        self.keys[layer].index_copy_(1, places, keys.transpose(0, 1).to(self.keys[layer].dtype))
        self.values[layer].index_copy_(
            1, places, values.transpose(0, 1).to(self.values[layer].dtype)
        )

    def copy(self, source: int, target: int) -> None:
        """Copy block `source` to block `target` in every layer."""
        a, b = source * BLOCK_TOKENS, target * BLOCK_TOKENS
        for memory in (*self.keys, *self.values):
            memory[:, b : b + BLOCK_TOKENS] = memory[:, a : a + BLOCK_TOKENS]


def block_bytes(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers."""
    return 2 * layers * kv_heads * BLOCK_TOKENS * head_dim * dtype.itemsize
