"""The three kinds of sharded layer: the only places in the model that know of virtual shards.

A `Placement` says what this rank holds and whom it adds up with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared.sharding import ModelShards
from worker.loader import Checkpoint
from worker.ops.base import HeadLayout, Ops, Source, Value


@dataclass(frozen=True)
class Placement:
    """One rank's part of one model, and the arithmetic it computes with."""

    shards: ModelShards
    owned: range
    """The virtual shards of this rank."""
    ops: Ops

    @property
    def each(self) -> list[range]:
        """The owned virtual shards one by one."""
        return [range(v, v + 1) for v in self.owned]

    def head_layout(self) -> HeadLayout:
        """The attention heads of this rank."""
        config, shards = self.shards.config, self.shards
        return HeadLayout(
            head_dim=config.head_dim,
            heads=shards.heads(self.owned),
            kv_heads=shards.kv_heads(self.owned),
            queries_per_kv=config.num_heads // config.num_kv_heads,
            by_shard=tuple(shards.heads(v) for v in self.each),
        )


def scaled(rows: range, factor: int) -> range:
    """Rows of heads as rows of elements: head h holds rows [h * factor, (h + 1) * factor)."""
    return range(rows.start * factor, rows.stop * factor)


class ColumnLinear:
    """Rows of one or several weights, stacked: each rank computes its own outputs.

    y = x W^T + b with x [T, K] replicated and y [T, sum of own rows].
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Sequence[str],
        totals: Sequence[int],
        rows: Sequence[range],
        inputs: int,
        ops: Ops,
        bias: bool = False,
        head_dim: int | None = None,
    ) -> None:
        """Stack rows[i] of layer names[i], whose weight is [totals[i], inputs].

        head_dim: the outputs are attention heads of so many numbers.
        """
        self._ops = ops
        layers = list(zip(names, totals, rows, strict=True))

        def read() -> torch.Tensor:
            return torch.cat(
                [
                    checkpoint.read(f"{name}.weight", (total, inputs), rows=own)
                    for name, total, own in layers
                ]
            )

        outputs = sum(map(len, rows))
        self._weight = ops.weight(Source(outputs, inputs, read), head_dim=head_dim)
        self._bias = None
        if bias:
            pieces = [
                checkpoint.read(f"{name}.bias", (total,), rows=own) for name, total, own in layers
            ]
            self._bias = ops.vector(torch.cat(pieces), head_dim=head_dim)

    def __call__(self, x: Value) -> Value:
        """X [T, K] -> [T, own rows]."""
        y = self._ops.linear(x, self._weight)
        return y if self._bias is None else self._ops.add_bias(y, self._bias)


class RowLinear:
    """Columns of a weight, a product for each virtual shard, summed over all ranks in the fixed tree.

    x [T, own columns] -> y [T, N], the same on every rank. A bias belongs to the sum, not to a shard:
    every rank adds it to the residual stream, where y goes too.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        outputs: int,
        inputs: int,
        columns: Sequence[range],
        ops: Ops,
        bias: bool = False,
        head_dim: int | None = None,
    ) -> None:
        """`columns` of each owned virtual shard of layer `name`'s weight [outputs, inputs]; may be empty.

        head_dim: the inputs are attention heads of so many numbers.
        """
        self._ops = ops
        own = range(columns[0].start, columns[-1].stop)

        def read() -> torch.Tensor:
            return checkpoint.read(f"{name}.weight", (outputs, inputs), columns=own)

        source = Source(outputs, len(own), read)
        self._weight = ops.row_weight(source, [len(shard) for shard in columns], head_dim=head_dim)
        self._bias = ops.vector(checkpoint.read(f"{name}.bias", (outputs,))) if bias else None

    def __call__(self, x: Value) -> Value:
        """X [T, own columns] -> [T, N], summed over all virtual shards, without the bias."""
        return self._ops.linear_all_reduce(x, self._weight)

    def add_bias(self, residual: Value) -> Value:
        """The residual stream [T, N] with the bias, if there is one."""
        return residual if self._bias is None else self._ops.add_bias(residual, self._bias)


class VocabHead:
    """lm_head cut by vocabulary: each rank computes the logits of its own tokens.

    x [B, hidden] -> [B, own tokens] float32.
    """

    def __init__(
        self, checkpoint: Checkpoint, name: str, hidden: int, placement: Placement
    ) -> None:
        rows = placement.shards.vocab_rows(placement.owned)
        total = placement.shards.config.vocab_size
        token_ids = [placement.shards.vocab_rows(range(v, v + 1)) for v in placement.owned]
        self._ops = placement.ops

        def read() -> torch.Tensor:
            return checkpoint.read(name, (total, hidden), rows=rows)

        self._weight = self._ops.weight(Source(len(rows), hidden, read), token_ids=token_ids)

    def __call__(self, x: Value) -> Value:
        """X [B, hidden] -> [B, own tokens]."""
        return self._ops.logits(x, self._weight)
