"""The three kinds of sharded layer: the only places in the model that know of virtual shards.

A `Placement` says what this rank holds and whom it adds up with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from shared.sharding import ModelShards
from worker.comm.base import Communicator
from worker.loader import Checkpoint
from worker.ops import torch_ops as ops


@dataclass(frozen=True)
class Placement:
    """One rank's part of one model."""

    shards: ModelShards
    owned: range
    """The virtual shards of this rank."""
    comm: Communicator
    dtype: torch.dtype

    @property
    def each(self) -> list[range]:
        """The owned virtual shards one by one."""
        return [range(v, v + 1) for v in self.owned]


def scaled(rows: range, factor: int) -> range:
    """Rows of heads as rows of elements: head h holds rows [h * factor, (h + 1) * factor)."""
    return range(rows.start * factor, rows.stop * factor)


class ColumnLinear:
    """Rows of one or several weights, stacked: each rank computes its own outputs.

    y = x W^T with x [T, K] replicated and y [T, sum of own rows].
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Sequence[str],
        totals: Sequence[int],
        rows: Sequence[range],
        inputs: int,
        dtype: torch.dtype,
    ) -> None:
        """Stack rows[i] of weight names[i], which is [totals[i], inputs]."""
        self.weight = torch.cat(
            [
                checkpoint.read(name, (total, inputs), dtype, rows=own)
                for name, total, own in zip(names, totals, rows, strict=True)
            ]
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """X [T, K] -> [T, own rows]."""
        return ops.linear(x, self.weight)


class RowLinear:
    """Columns of a weight, a product for each virtual shard, summed over all ranks in the fixed tree.

    x [T, own columns] -> y [T, N], the same on every rank.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        outputs: int,
        inputs: int,
        columns: Sequence[range],
        placement: Placement,
    ) -> None:
        """`columns` of each owned virtual shard of weight `name` [outputs, inputs]; may be empty.

        The shards' products are one batched product, so narrower ones are filled up with zeros.
        """
        self.comm = placement.comm
        self.shards, self.outputs = len(columns), outputs
        self.width = max(len(own) for own in columns)
        self.weight = torch.zeros(self.shards, self.width, outputs, dtype=placement.dtype)
        for shard, own in zip(self.weight, columns, strict=True):
            piece = checkpoint.read(name, (outputs, inputs), placement.dtype, columns=own)
            shard[: len(own)] = piece.T
        first, stop = columns[0].start, columns[-1].stop
        self.spread: torch.Tensor | None = None
        if any(len(own) < self.width for own in columns):
            filler = stop - first  # a column of zeros behind the own ones
            self.spread = torch.tensor(
                [
                    own.start - first + i if i < len(own) else filler
                    for own in columns
                    for i in range(self.width)
                ]
            )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """X [T, own columns] -> [T, N], summed over all virtual shards."""
        tokens = len(x)
        if self.spread is not None:
            x = F.pad(x, (0, 1)).index_select(1, self.spread)
        by_shard = x.view(tokens, self.shards, self.width).transpose(0, 1)
        partials = ops.batched_linear(by_shard, self.weight)
        total = self.comm.all_reduce_tree(partials.view(self.shards, -1).numpy())
        return torch.from_numpy(total).view(tokens, self.outputs)


class VocabHead:
    """lm_head cut by vocabulary: each rank computes the logits of its own tokens.

    x [T, hidden] -> [T, own tokens] float32; the first of them is token id `first_id`.
    """

    def __init__(
        self, checkpoint: Checkpoint, name: str, hidden: int, placement: Placement
    ) -> None:
        rows = placement.shards.vocab_rows(placement.owned)
        total = placement.shards.config.vocab_size
        self.first_id = rows.start
        self.weight = checkpoint.read(name, (total, hidden), placement.dtype, rows=rows)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """X [T, hidden] -> [T, own tokens]."""
        return ops.linear(x, self.weight)


def kv_of_heads(shards: ModelShards, owned: range) -> torch.Tensor | None:
    """For each own query head the index of its KV head among the own ones.

    None when the own query heads fall evenly, in order, onto the own KV heads.
    """
    heads, kv_heads = shards.heads(owned), shards.kv_heads(owned)
    queries_per_kv = shards.config.num_heads // shards.config.num_kv_heads
    index = np.array([h // queries_per_kv - kv_heads.start for h in heads], dtype=np.int64)
    even = len(heads) == 0 or (
        len(heads) % len(kv_heads) == 0
        and np.array_equal(index, np.repeat(np.arange(len(kv_heads)), len(heads) // len(kv_heads)))
    )
    return None if even else torch.from_numpy(index)
