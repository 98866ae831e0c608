"""The order of additions: the same bits however the virtual shards are divided among ranks."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.sharding import ReductionTree, assign_shards, tree_additions

Sums = npt.NDArray[np.float32]


@st.composite
def divisions(draw: st.DrawFn) -> list[range]:
    """Contiguous runs, of any lengths, that together are 1, 2, 4 ... 64 virtual shards."""
    virtual_shards = 1 << draw(st.integers(0, 6))
    cuts = draw(st.sets(st.integers(1, virtual_shards - 1))) if virtual_shards > 1 else set()
    bounds = [0, *sorted(cuts), virtual_shards]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def leaves(count: int) -> list[Sums]:
    """One vector for each virtual shard, of mixed magnitudes, so that the order of sums matters."""
    rng = np.random.default_rng(count)
    values = rng.standard_normal((count, 33)) * 10.0 ** rng.integers(-6, 7, (count, 33))
    return list(values.astype(np.float32))


def tree_sum(values: Sequence[Sums]) -> Sums:
    if len(values) == 1:
        return values[0]
    middle = len(values) // 2
    return tree_sum(values[:middle]) + tree_sum(values[middle:])


def reduce_over(owned: Sequence[range]) -> Sums:
    """What the ranks do together, by their trees."""
    partials = leaves(owned[-1].stop)
    roots: list[Sums] = []
    for rank, shards in enumerate(owned):
        tree = ReductionTree.build(owned, rank)
        mine = [partials[shard].copy() for shard in shards]
        for i, j in tree.local_additions:
            mine[i] += mine[j]
        roots += [mine[i] for i in tree.local_roots]
        assert len(tree.local_roots) == tree.roots_per_rank[rank]
    for i, j in tree.global_additions:
        roots[i] += roots[j]
    return roots[0]


@given(divisions())
def test_every_division_gives_the_bits_of_the_whole_tree(owned: list[range]) -> None:
    expected = tree_sum(leaves(owned[-1].stop))
    assert reduce_over(owned).tobytes() == expected.tobytes()


@given(divisions())
def test_each_pair_of_shards_is_joined_once_and_no_rank_sends_more_than_it_must(
    owned: list[range],
) -> None:
    trees = [ReductionTree.build(owned, rank) for rank in range(len(owned))]
    additions = sum(len(tree.local_additions) for tree in trees) + len(trees[0].global_additions)
    assert additions == owned[-1].stop - 1
    for tree, shards in zip(trees, owned, strict=True):
        assert len(tree.local_additions) == len(shards) - len(tree.local_roots)
        assert len(tree.local_roots) <= max(1, 2 * (len(shards).bit_length() - 1))


@given(divisions())
def test_all_ranks_agree_about_the_roots_and_the_order_of_the_global_additions(
    owned: list[range],
) -> None:
    trees = [ReductionTree.build(owned, rank) for rank in range(len(owned))]
    assert len({(tree.roots_per_rank, tree.global_additions) for tree in trees}) == 1


@pytest.mark.parametrize("virtual_shards", [8, 16, 32, 64])
@pytest.mark.parametrize("world", range(1, 9))
def test_even_divisions_give_the_bits_of_the_whole_tree(world: int, virtual_shards: int) -> None:
    expected = tree_sum(leaves(virtual_shards))
    assert reduce_over(assign_shards(world, virtual_shards)).tobytes() == expected.tobytes()


def test_eight_leaves_are_added_in_pairs_of_pairs() -> None:
    additions = tree_additions([range(leaf, leaf + 1) for leaf in range(8)])
    assert additions == ((0, 1), (2, 3), (0, 2), (4, 5), (6, 7), (4, 6), (0, 4))


def test_a_rank_with_an_aligned_power_of_two_sends_one_vector() -> None:
    tree = ReductionTree.build(assign_shards(4, 8), 2)
    assert (tree.local_additions, tree.local_roots) == (((0, 1),), (0,))
    assert tree.roots_per_rank == (1, 1, 1, 1)
    assert tree.global_additions == ((0, 1), (2, 3), (0, 2))


def test_a_rank_with_an_odd_run_sends_its_largest_subtrees() -> None:
    tree = ReductionTree.build([range(0, 3), range(3, 6), range(6, 8)], 1)
    assert tree.roots_per_rank == (2, 2, 1)
    assert (tree.local_additions, tree.local_roots) == (((1, 2),), (0, 1))
