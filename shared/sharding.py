"""Virtual shards: how a model is cut, who owns what, and in which order partial sums are added.

Pure integer arithmetic. A model is always cut into the same `V` virtual shards (a power of two); the
cut depends on the model and `V` only, never on how many workers there are. A worker owns a
contiguous run of virtual shards. Every run is a `range`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from shared.model_config import ModelConfig

GROUP = 32  # rows of the MLP and of the vocabulary are cut in whole groups of this many


def split(count: int, parts: int, index: int) -> range:
    """Run `index` of `count` items cut into `parts` contiguous runs whose sizes differ by at most 1."""
    return range(index * count // parts, (index + 1) * count // parts)


def split_groups(rows: int, parts: int, index: int) -> range:
    """Run `index` of `rows` rows cut into `parts` runs of whole groups of 32; the last may be short."""
    groups = split(-(-rows // GROUP), parts, index)
    return range(min(groups.start * GROUP, rows), min(groups.stop * GROUP, rows))


def assign_shards(world: int, virtual_shards: int) -> tuple[range, ...]:
    """The virtual shards of each of `world` workers, as even as it goes, larger runs first (3+3+2).

    Raises ValueError unless 1 <= world <= virtual_shards and virtual_shards is a power of two.
    """
    if virtual_shards < 1 or virtual_shards & (virtual_shards - 1):
        raise ValueError(f"virtual_shards is {virtual_shards}, it must be a power of two")
    if not 1 <= world <= virtual_shards:
        raise ValueError(f"{world} workers cannot share {virtual_shards} virtual shards")
    bounds = [-(-rank * virtual_shards // world) for rank in range(world + 1)]
    return tuple(range(a, b) for a, b in itertools.pairwise(bounds))


@dataclass(frozen=True)
class ModelShards:
    """Which heads and rows each virtual shard of a model holds.

    Methods take a run of virtual shards and return the run of heads or rows it covers, which is
    contiguous because the shards are. `heads(range(v, v + 1))` is what shard `v` alone holds; it may
    be empty when there are fewer heads or groups than virtual shards.
    """

    config: ModelConfig
    virtual_shards: int

    def heads(self, shards: range) -> range:
        """Query heads."""
        return self._cover(self.config.num_heads, shards)

    def kv_heads(self, shards: range) -> range:
        """KV heads that the query heads of `shards` read.

        Two neighbouring shards may need the same KV head; a worker that owns both keeps it once.
        """
        heads = self.heads(shards)
        if not heads:
            return range(0)
        queries_per_kv = self.config.num_heads // self.config.num_kv_heads
        return range(heads.start // queries_per_kv, (heads.stop - 1) // queries_per_kv + 1)

    def mlp_rows(self, shards: range) -> range:
        """Rows of gate_proj and up_proj, columns of down_proj."""
        return self._cover_groups(self.config.intermediate_size, shards)

    def vocab_rows(self, shards: range) -> range:
        """Rows of lm_head."""
        return self._cover_groups(self.config.vocab_size, shards)

    def _cover(self, count: int, shards: range) -> range:
        parts = self.virtual_shards
        return range(
            split(count, parts, shards.start).start, split(count, parts, shards.stop - 1).stop
        )

    def _cover_groups(self, rows: int, shards: range) -> range:
        parts = self.virtual_shards
        first = split_groups(rows, parts, shards.start)
        return range(first.start, split_groups(rows, parts, shards.stop - 1).stop)


def aligned_subtrees(shards: range) -> tuple[range, ...]:
    """The largest subtrees of the binary tree over all virtual shards that lie inside `shards`.

    In order, disjoint, together exactly `shards`. A node of size 2^k starts at a multiple of 2^k.
    """
    roots = []
    start = shards.start
    while start < shards.stop:
        size = start & -start or 1 << (shards.stop.bit_length())
        while start + size > shards.stop:
            size //= 2
        roots.append(range(start, start + size))
        start += size
    return tuple(roots)


def tree_additions(nodes: Sequence[range]) -> tuple[tuple[int, int], ...]:
    """The additions that join neighbouring tree nodes into their common root, in a fixed order.

    `nodes` are aligned subtrees, in order, that together are one aligned subtree. Returned are pairs
    (i, j), meaning `value[i] += value[j]`; after the last one `value[0]` is the sum of the root, as
    ((p0+p1)+(p2+p3))+((p4+p5)+(p6+p7)) for eight leaves, however the leaves were grouped before.
    """
    additions: list[tuple[int, int]] = []

    def join(first: int, last: int) -> None:
        if first == last:
            return
        start, stop = nodes[first].start, nodes[last].stop
        middle = start + (stop - start) // 2
        split_at = next(i for i in range(first + 1, last + 1) if nodes[i].start == middle)
        join(first, split_at - 1)
        join(split_at, last)
        additions.append((first, split_at))

    join(0, len(nodes) - 1)
    return tuple(additions)


@dataclass(frozen=True)
class ReductionTree:
    """The fixed binary tree over all virtual shards, as one rank sees it.

    `local_additions` reduce the rank's own partial sums, one per owned virtual shard, to its roots,
    which then stand at the indices `local_roots`. The roots of all ranks, rank by rank, are joined by
    `global_additions`; the total then stands at index 0.
    """

    owned: tuple[range, ...]
    rank: int
    local_additions: tuple[tuple[int, int], ...]
    local_roots: tuple[int, ...]
    roots_per_rank: tuple[int, ...]
    global_additions: tuple[tuple[int, int], ...]

    @classmethod
    def build(cls, owned: Sequence[range], rank: int) -> "ReductionTree":
        """From the virtual shards of every rank (in rank order, together all of them)."""
        mine = owned[rank]
        roots = [aligned_subtrees(shards) for shards in owned]
        local: list[tuple[int, int]] = []
        for root in roots[rank]:
            offset = root.start - mine.start
            leaves = [range(leaf, leaf + 1) for leaf in root]
            local += [(i + offset, j + offset) for i, j in tree_additions(leaves)]
        return cls(
            owned=tuple(owned),
            rank=rank,
            local_additions=tuple(local),
            local_roots=tuple(root.start - mine.start for root in roots[rank]),
            roots_per_rank=tuple(len(r) for r in roots),
            global_additions=tree_additions([root for r in roots for root in r]),
        )
