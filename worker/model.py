"""The Llama family: pre-norm attention and SwiGLU blocks with rotary positions and grouped KV heads.

Where its members differ (biases, norms of heads, positions), ModelConfig says what to build. Knows nothing of ranks: its layers do. T is the number of tokens of a step, over all sequences. Each
block hands on the residual stream x and the last layer's output, which the next norm adds to it.
"""

from shared.model_config import ModelConfig
from worker.layers import ColumnLinear, Placement, RowLinear, VocabHead, scaled
from worker.loader import Checkpoint
from worker.ops.base import HeadNorms, Ops, RopeTable, Value
from worker.rope import rope_table


class RMSNorm:
    """x / rms(x) * weight."""

    def __init__(self, checkpoint: Checkpoint, name: str, config: ModelConfig, ops: Ops) -> None:
        self._ops, self._eps = ops, config.rms_norm_eps
        self._weight = ops.vector(checkpoint.read(name, (config.hidden_size,)))

    def __call__(self, x: Value, delta: Value | None) -> tuple[Value, Value]:
        """X + delta and its norm, [T, hidden] each."""
        return self._ops.add_norm(x, delta, self._weight, self._eps)

    def final(self, x: Value, delta: Value) -> Value:
        """The norm of x + delta for the tokens whose successors are wanted: [B, hidden]."""
        return self._ops.final_norm(x, delta, self._weight, self._eps)


class Attention:
    """Causal attention of the own query heads over the paged KV cache."""

    def __init__(self, checkpoint: Checkpoint, layer: int, placement: Placement) -> None:
        config, shards = placement.shards.config, placement.shards
        d, prefix = config.head_dim, f"model.layers.{layer}.self_attn."
        self._ops, self._layer, self._layout = placement.ops, layer, placement.head_layout()
        heads, kv_heads = self._layout.heads, self._layout.kv_heads
        self.qkv = ColumnLinear(
            checkpoint,
            names=[prefix + f"{n}_proj" for n in "qkv"],
            totals=[config.num_heads * d, config.num_kv_heads * d, config.num_kv_heads * d],
            rows=[scaled(heads, d), scaled(kv_heads, d), scaled(kv_heads, d)],
            inputs=config.hidden_size,
            ops=placement.ops,
            bias=config.qkv_bias,
            head_dim=d,
        )
        self._norms = None
        if config.head_norms:
            query, key = (
                self._ops.vector(checkpoint.read(prefix + f"{n}_norm.weight", (d,)), head_dim=d)
                for n in "qk"
            )
            self._norms = HeadNorms(query, key, config.rms_norm_eps)
        self.o_proj = RowLinear(
            checkpoint,
            prefix + "o_proj",
            outputs=config.hidden_size,
            inputs=config.num_heads * d,
            columns=[scaled(shards.heads(v), d) for v in placement.each],
            ops=placement.ops,
            bias=config.output_bias,
            head_dim=d,
        )

    def __call__(self, x: Value, rope: RopeTable) -> Value:
        """X [T, hidden] -> [T, hidden]; the new keys and values go into the cache first."""
        mixed = self._ops.attention(self.qkv(x), rope, self._layer, self._layout, self._norms)
        return self.o_proj(mixed)


class MLP:
    """down(silu(gate(x)) * up(x)) over the own intermediate rows."""

    def __init__(self, checkpoint: Checkpoint, layer: int, placement: Placement) -> None:
        config, shards = placement.shards.config, placement.shards
        prefix, rows = f"model.layers.{layer}.mlp.", shards.mlp_rows(placement.owned)
        self._ops = placement.ops
        self.gate_up = ColumnLinear(
            checkpoint,
            names=[prefix + "gate_proj", prefix + "up_proj"],
            totals=[config.intermediate_size] * 2,
            rows=[rows] * 2,
            inputs=config.hidden_size,
            ops=placement.ops,
            bias=config.mlp_bias,
        )
        self.down_proj = RowLinear(
            checkpoint,
            prefix + "down_proj",
            outputs=config.hidden_size,
            inputs=config.intermediate_size,
            columns=[shards.mlp_rows(v) for v in placement.each],
            ops=placement.ops,
            bias=config.mlp_bias,
        )

    def __call__(self, x: Value) -> Value:
        """X [T, hidden] -> [T, hidden]."""
        return self.down_proj(self._ops.swiglu(self.gate_up(x)))


class Block:
    """One decoder layer."""

    def __init__(self, checkpoint: Checkpoint, layer: int, placement: Placement) -> None:
        config, ops, prefix = placement.shards.config, placement.ops, f"model.layers.{layer}."
        self.attention_norm = RMSNorm(checkpoint, prefix + "input_layernorm.weight", config, ops)
        self.attention = Attention(checkpoint, layer, placement)
        self.mlp_norm = RMSNorm(checkpoint, prefix + "post_attention_layernorm.weight", config, ops)
        self.mlp = MLP(checkpoint, layer, placement)

    def __call__(self, x: Value, delta: Value | None, rope: RopeTable) -> tuple[Value, Value]:
        """The residual stream and what is to be added to it, [T, hidden] each."""
        x, normed = self.attention_norm(x, delta)
        delta = self.attention(normed, rope)
        x, normed = self.mlp_norm(self.attention.o_proj.add_bias(x), delta)
        delta = self.mlp(normed)
        return self.mlp.down_proj.add_bias(x), delta


class Decoder:
    """Token ids in, logits of the own vocabulary rows out."""

    def __init__(self, checkpoint: Checkpoint, placement: Placement, max_positions: int) -> None:
        """Read this rank's slices. Raises ModelError naming the tensor that does not fit."""
        config, ops = placement.shards.config, placement.ops
        self._ops = ops
        self.blocks = [Block(checkpoint, i, placement) for i in range(config.num_layers)]
        self.norm = RMSNorm(checkpoint, "model.norm.weight", config, ops)
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        if config.tie_word_embeddings:  # one tensor, saved under either name
            embedding = head = embedding if embedding in checkpoint else head
        self.lm_head = VocabHead(checkpoint, head, config.hidden_size, placement)
        self.embedding = ops.table(
            checkpoint.map(embedding, (config.vocab_size, config.hidden_size))
        )
        self.rope = rope_table(config.rope, config.head_dim, max_positions)

    def __call__(self) -> Value:
        """Logits [B, own tokens] float32 of the step that the arithmetic is at."""
        x, delta = self._ops.embed(self.embedding), None
        for block in self.blocks:
            x, delta = block(x, delta, self.rope)
            self._ops.probe(x, delta)
        return self.lm_head(self.norm.final(x, delta))
