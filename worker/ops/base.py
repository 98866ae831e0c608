"""What a model needs of an arithmetic, whoever computes it: `torch_ops` or the native library.

One `Ops` belongs to one model on one rank. While the model is loaded it turns checkpoint tensors into
weights of its own form; later it carries out forward passes. The model calls the operations in order
and passes their results on without looking inside: torch computes at each call, the native library
records the calls once and runs them all with every step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch

from shared.worker_messages import SequenceStep
from worker.comm.base import Floats
from worker.native.sampling import Wanted
from worker.sampling.vocabulary import Doubles, Ints, StepLogits

Value = Any
"""What flows between operations: a tensor, or the name of a recorded buffer. T tokens of a step."""
Weight = Any
"""A weight in the form that its `Ops` wants."""
NO_SUMS: Mapping[int, Doubles] = MappingProxyType({})
"""Of a step in which no sequence's hidden states are wanted."""


@dataclass(frozen=True)
class Source:
    """A weight [rows, columns] of a checkpoint; `read` fetches it, in the checkpoint's dtype."""

    rows: int
    columns: int
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class HeadLayout:
    """The attention heads of one rank."""

    head_dim: int
    heads: range
    kv_heads: range
    queries_per_kv: int
    """Query heads of the whole model that share a KV head."""
    by_shard: tuple[range, ...]
    """The query heads of each owned virtual shard; may be empty."""

    @property
    def kv_of_head(self) -> list[int]:
        """For each own query head the index of its KV head among the own ones."""
        return [head // self.queries_per_kv - self.kv_heads.start for head in self.heads]


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of every query and every key head before they are rotated (Qwen3)."""

    query: Weight
    key: Weight
    eps: float


@dataclass(frozen=True)
class RopeTable:
    """cos and sin of every position's angles, [positions, head_dim / 2] float32 each."""

    cos: torch.Tensor
    sin: torch.Tensor


class Ops(Protocol):
    """One model's arithmetic on one rank."""

    weight_bytes: int
    """Memory of the weights made so far."""

    # --- loading; tensors are float32, bfloat16 or float16 ---

    def vector(self, values: torch.Tensor, *, head_dim: int | None = None) -> Weight:
        """The weight of a norm, or a bias, [N]; head_dim: of attention heads of so many numbers."""

    def table(self, rows: torch.Tensor) -> Weight:
        """The embedding [vocabulary, hidden], a mapped file that is not copied."""

    def weight(
        self,
        source: Source,
        *,
        head_dim: int | None = None,
        token_ids: Sequence[range] | None = None,
    ) -> Weight:
        """A weight [N, K] whose outputs are this rank's.

        head_dim: its outputs are attention heads of so many numbers. token_ids: they are the logits of
        these tokens, by virtual shard.
        """

    def row_weight(
        self, source: Source, widths: Sequence[int], *, head_dim: int | None = None
    ) -> Weight:
        """Columns [N, sum of widths] of a weight; one width for each owned virtual shard.

        head_dim: its inputs are attention heads of so many numbers.
        """

    def block_bytes(self, layers: int, layout: HeadLayout) -> int:
        """Memory of one KV block over all layers."""

    def observe(self, take: Callable[[Floats], None]) -> None:
        """Before `allocate`: every step calls `take` with x + delta of every `probe`, [T, N].

        The array is the caller's. For a rank that is alone; steps are slower, their results the same.
        """

    def allocate(
        self,
        forward: Callable[[], Value],
        layers: int,
        layout: HeadLayout,
        blocks: int,
        tokens: int,
    ) -> None:
        """KV memory for `blocks` blocks, and what steps of up to `tokens` tokens need.

        `forward` is the model. Raises ConfigError, MemoryError.
        """

    # --- a forward pass ---

    def embed(self, table: Weight) -> Value:
        """The rows of the step's token ids: [T, hidden]."""

    def add_norm(
        self, x: Value, delta: Value | None, weight: Weight, eps: float
    ) -> tuple[Value, Value]:
        """x + delta, and y / sqrt(mean(y^2) + eps) * weight of that (Zhang & Sennrich 2019)."""

    def final_norm(self, x: Value, delta: Value, weight: Weight, eps: float) -> Value:
        """The same for the B tokens whose successors are wanted: [B, hidden].

        Of the step's sequences with `pooled` the norms of all tokens are added to their sums.
        """

    def linear(self, x: Value, weight: Weight) -> Value:
        """x [T, K] times weight [N, K] transposed: [T, N]."""

    def add_bias(self, x: Value, bias: Weight) -> Value:
        """x [T, N] plus bias [N]; x must not be used again."""

    def linear_all_reduce(self, x: Value, weight: Weight) -> Value:
        """Each virtual shard's product for itself, summed over all ranks in the fixed tree: [T, N]."""

    def attention(
        self,
        qkv: Value,
        rope: RopeTable,
        layer: int,
        layout: HeadLayout,
        norms: HeadNorms | None = None,
    ) -> Value:
        """Causal attention over the paged cache; new keys and values go into the cache first.

        qkv [T, (heads + 2 KV heads) * d]; queries and keys are normed head by head if there are
        norms, then rotated by their positions (Su et al.
        2021), dimension i paired with i + d / 2 as in Hugging Face checkpoints; then
        softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017): [T, heads * d].
        """

    def swiglu(self, gate_up: Value) -> Value:
        """silu(gate) * up (Shazeer 2020): [T, 2 * rows] -> [T, rows]."""

    def probe(self, x: Value, delta: Value) -> None:
        """A place where an observer sees x + delta; without one this is nothing."""

    def logits(self, x: Value, head: Weight) -> Value:
        """x [B, hidden] times the head's own rows: [B, own tokens]."""

    # --- steps ---

    def copy_block(self, source: int, target: int) -> None:
        """Copy a KV block in every layer."""

    def run(
        self,
        sequences: Sequence[SequenceStep],
        last_tokens: Ints,
        wanted: Wanted | None = None,
        sums: Mapping[int, Doubles] = NO_SUMS,
        *,
        every_token: bool = False,
    ) -> StepLogits:
        """One forward pass: logits [B, own tokens] of the sequences that want a token.

        last_tokens: by slot, for sequences that bring no tokens. wanted: of each row; more may be
        given. None: all logits. sums: by slot, [hidden], to which the normed hidden states of
        sequences with `pooled` are added, token by token. every_token: logits [T, own tokens] after
        every token of the step instead. Raises CommError.
        """

    @property
    def comm_seconds(self) -> float:
        """Time spent in collectives that no communicator saw."""
