"""The cut of a model: pieces re-join to the whole, whatever the sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.model_config import ModelConfig
from shared.rope import Rope
from shared.sharding import GROUP, ModelShards, aligned_subtrees, assign_shards


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    kv_heads = draw(st.integers(1, 16))
    head_dim = 2 * draw(st.integers(1, 64))
    heads = kv_heads * draw(st.integers(1, 8))
    return ModelConfig(
        model_type="llama",
        hidden_size=heads * head_dim,
        intermediate_size=draw(st.integers(1, 6000)),
        num_layers=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=draw(st.integers(1, 33000)),
        max_positions=128,
        rms_norm_eps=1e-6,
        rope=Rope(),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        head_norms=False,
        sliding_window=None,
        tie_word_embeddings=False,
        dtype="fp32",
        bos_id=None,
        eos_ids=(),
    )


shard_counts = st.sampled_from([1, 2, 4, 8, 16, 32])


@st.composite
def divisions(draw: st.DrawFn) -> tuple[int, int]:
    virtual_shards = draw(shard_counts)
    return draw(st.integers(1, virtual_shards)), virtual_shards


@given(configs(), divisions())
def test_the_pieces_of_all_workers_rejoin_to_the_whole(
    config: ModelConfig, division: tuple[int, int]
) -> None:
    world, virtual_shards = division
    shards = ModelShards(config, virtual_shards)
    owned = assign_shards(world, virtual_shards)
    for rows, total in (
        (shards.heads, config.num_heads),
        (shards.mlp_rows, config.intermediate_size),
        (shards.vocab_rows, config.vocab_size),
    ):
        assert [i for own in owned for i in rows(own)] == list(range(total))


@given(configs(), divisions())
def test_a_worker_holds_what_its_virtual_shards_hold(
    config: ModelConfig, division: tuple[int, int]
) -> None:
    world, virtual_shards = division
    shards = ModelShards(config, virtual_shards)
    for own in assign_shards(world, virtual_shards):
        each = [range(v, v + 1) for v in own]
        for rows in (shards.heads, shards.mlp_rows, shards.vocab_rows):
            assert [i for v in each for i in rows(v)] == list(rows(own))
        assert {h for v in each for h in shards.kv_heads(v)} == set(shards.kv_heads(own))


@given(configs(), shard_counts)
def test_a_shard_holds_the_kv_heads_that_its_query_heads_read(
    config: ModelConfig, virtual_shards: int
) -> None:
    shards = ModelShards(config, virtual_shards)
    queries_per_kv = config.num_heads // config.num_kv_heads
    for v in range(virtual_shards):
        shard = range(v, v + 1)
        needed = {h // queries_per_kv for h in shards.heads(shard)}
        assert set(shards.kv_heads(shard)) == needed


@given(configs(), shard_counts)
def test_rows_are_cut_between_whole_groups(config: ModelConfig, virtual_shards: int) -> None:
    shards = ModelShards(config, virtual_shards)
    for v in range(virtual_shards):
        shard = range(v, v + 1)
        assert shards.mlp_rows(shard).start in (
            *range(0, config.intermediate_size, GROUP),
            config.intermediate_size,
        )


@given(configs(), shard_counts)
def test_a_shard_is_empty_only_when_there_are_fewer_pieces_than_shards(
    config: ModelConfig, virtual_shards: int
) -> None:
    shards = ModelShards(config, virtual_shards)
    for rows, pieces in (
        (shards.heads, config.num_heads),
        (shards.mlp_rows, -(-config.intermediate_size // GROUP)),
        (shards.vocab_rows, -(-config.vocab_size // GROUP)),
    ):
        empty = [v for v in range(virtual_shards) if not rows(range(v, v + 1))]
        assert len(empty) == max(0, virtual_shards - pieces)


@given(divisions())
def test_workers_share_virtual_shards_evenly_and_in_order(division: tuple[int, int]) -> None:
    world, virtual_shards = division
    owned = assign_shards(world, virtual_shards)
    assert [v for own in owned for v in own] == list(range(virtual_shards))
    sizes = [len(own) for own in owned]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_eight_shards_over_three_workers_are_three_three_two() -> None:
    assert assign_shards(3, 8) == (range(0, 3), range(3, 6), range(6, 8))


@pytest.mark.parametrize(("world", "virtual_shards"), [(9, 8), (0, 8), (1, 6), (1, 0)])
def test_impossible_divisions_are_refused(world: int, virtual_shards: int) -> None:
    with pytest.raises(ValueError, match=r"virtual"):
        assign_shards(world, virtual_shards)


@given(st.integers(0, 63), st.integers(1, 64))
def test_aligned_subtrees_cover_a_run_with_the_largest_nodes(start: int, length: int) -> None:
    shards = range(start, min(start + length, 64))
    roots = aligned_subtrees(shards)
    assert [v for root in roots for v in root] == list(shards)
    for root in roots:
        size = len(root)
        assert size & (size - 1) == 0
        assert root.start % size == 0
        parent = range(
            root.start // (2 * size) * 2 * size, (root.start // (2 * size) + 1) * 2 * size
        )
        assert not (parent.start >= shards.start and parent.stop <= shards.stop)
