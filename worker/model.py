"""The Llama decoder: pre-norm attention and SwiGLU blocks with rotary positions and grouped KV heads.

Knows nothing of ranks: its layers do. T is the number of tokens of a step, over all sequences.
"""

from dataclasses import dataclass

import torch

from shared.model_config import ModelConfig
from worker.kv_cache import KVCache
from worker.layers import ColumnLinear, Placement, RowLinear, VocabHead, kv_of_heads, scaled
from worker.loader import Checkpoint
from worker.ops import torch_ops as ops


@dataclass(frozen=True)
class StepInput:
    """One forward pass: T tokens of several sequences, and whose logits are wanted."""

    ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64."""
    places: torch.Tensor
    """[T] int64: where the KV cache keeps each token."""
    attention: ops.AttentionPlan
    logit_rows: torch.Tensor
    """[B] int64: the tokens whose successors are wanted."""


class RMSNorm:
    """x / rms(x) * weight."""

    def __init__(self, checkpoint: Checkpoint, name: str, config: ModelConfig) -> None:
        self.weight = checkpoint.read(name, (config.hidden_size,), torch.float32)
        self.eps = config.rms_norm_eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """X [T, hidden] -> [T, hidden]."""
        return ops.rms_norm(x, self.weight, self.eps)


class Attention:
    """Causal attention of the own query heads over the paged KV cache."""

    def __init__(self, checkpoint: Checkpoint, layer: int, placement: Placement) -> None:
        config, shards, owned = placement.shards.config, placement.shards, placement.owned
        d, prefix = config.head_dim, f"model.layers.{layer}.self_attn."
        heads, kv_heads = shards.heads(owned), shards.kv_heads(owned)
        self.layer, self.heads, self.kv_heads, self.head_dim = layer, len(heads), len(kv_heads), d
        self.kv_of_head = kv_of_heads(shards, owned)
        self.qkv = ColumnLinear(
            checkpoint,
            names=[prefix + f"{n}_proj.weight" for n in "qkv"],
            totals=[config.num_heads * d, config.num_kv_heads * d, config.num_kv_heads * d],
            rows=[scaled(heads, d), scaled(kv_heads, d), scaled(kv_heads, d)],
            inputs=config.hidden_size,
            dtype=placement.dtype,
        )
        self.o_proj = RowLinear(
            checkpoint,
            prefix + "o_proj.weight",
            outputs=config.hidden_size,
            inputs=config.num_heads * d,
            columns=[scaled(shards.heads(v), d) for v in placement.each],
            placement=placement,
        )

    def __call__(
        self, x: torch.Tensor, step: StepInput, cache: KVCache, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """X [T, hidden] -> [T, hidden]; the new keys and values go into the cache first."""
        heads, kv_heads = self.heads, self.kv_heads
        qkv = self.qkv(x).view(len(x), heads + 2 * kv_heads, self.head_dim)
        rotated = ops.rope(qkv[:, : heads + kv_heads], cos, sin)
        q, k = rotated[:, :heads], rotated[:, heads:]
        cache.write(self.layer, k, qkv[:, heads + kv_heads :], step.places)
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        mixed = ops.attention(q, keys, values, step.attention, self.kv_of_head)  # [T, heads, d]
        return self.o_proj(mixed.view(len(x), heads * self.head_dim))


class MLP:
    """down(silu(gate(x)) * up(x)) over the own intermediate rows."""

    def __init__(self, checkpoint: Checkpoint, layer: int, placement: Placement) -> None:
        config, shards = placement.shards.config, placement.shards
        prefix, rows = f"model.layers.{layer}.mlp.", shards.mlp_rows(placement.owned)
        self.gate_up = ColumnLinear(
            checkpoint,
            names=[prefix + "gate_proj.weight", prefix + "up_proj.weight"],
            totals=[config.intermediate_size] * 2,
            rows=[rows] * 2,
            inputs=config.hidden_size,
            dtype=placement.dtype,
        )
        self.down_proj = RowLinear(
            checkpoint,
            prefix + "down_proj.weight",
            outputs=config.hidden_size,
            inputs=config.intermediate_size,
            columns=[shards.mlp_rows(v) for v in placement.each],
            placement=placement,
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """X [T, hidden] -> [T, hidden]."""
        return self.down_proj(ops.swiglu(self.gate_up(x)))


class Block:
    """One decoder layer."""

    def __init__(self, checkpoint: Checkpoint, layer: int, placement: Placement) -> None:
        config, prefix = placement.shards.config, f"model.layers.{layer}."
        self.attention_norm = RMSNorm(checkpoint, prefix + "input_layernorm.weight", config)
        self.attention = Attention(checkpoint, layer, placement)
        self.mlp_norm = RMSNorm(checkpoint, prefix + "post_attention_layernorm.weight", config)
        self.mlp = MLP(checkpoint, layer, placement)

    def __call__(
        self, x: torch.Tensor, step: StepInput, cache: KVCache, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """X [T, hidden] -> [T, hidden]."""
        x = x + self.attention(self.attention_norm(x), step, cache, cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Decoder:
    """Token ids in, logits of the own vocabulary rows out."""

    def __init__(self, checkpoint: Checkpoint, placement: Placement, max_positions: int) -> None:
        """Read this rank's slices. Raises ModelError naming the tensor that does not fit."""
        config = placement.shards.config
        self.config, self.dtype = config, placement.dtype
        self.kv_heads = len(placement.shards.kv_heads(placement.owned))
        self.blocks = [Block(checkpoint, i, placement) for i in range(config.num_layers)]
        self.norm = RMSNorm(checkpoint, "model.norm.weight", config)
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        if config.tie_word_embeddings:  # one tensor, saved under either name
            embedding = head = embedding if embedding in checkpoint else head
        self.lm_head = VocabHead(checkpoint, head, config.hidden_size, placement)
        self.embedding = checkpoint.map(embedding, (config.vocab_size, config.hidden_size))
        self.cos, self.sin = ops.rope_table(config.head_dim, max_positions, config.rope_theta)

    def __call__(self, step: StepInput, cache: KVCache) -> torch.Tensor:
        """Logits [B, own tokens] float32 of the rows that `step` asks for."""
        cos, sin = self.cos[step.positions], self.sin[step.positions]
        x = ops.embed(step.ids, self.embedding, self.dtype)  # [T, hidden]
        for block in self.blocks:
            x = block(x, step, cache, cos, sin)
        return self.lm_head(self.norm(x[step.logit_rows]))

    def weight_bytes(self) -> int:
        """Memory of the own weights; the embedding is a shared mapping and not counted."""
        total = self.lm_head.weight.nbytes
        for block in self.blocks:
            attention, mlp = block.attention, block.mlp
            for layer in (attention.qkv, attention.o_proj, mlp.gate_up, mlp.down_proj):
                total += layer.weight.nbytes
        return total
