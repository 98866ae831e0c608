"""Tokens chosen where the logits are, against the sampler, which defines them."""

import numpy as np
import pytest
import torch

from shared.sharding import assign_shards, split
from shared.worker_messages import Sampling
from tests.worker.rank_threads import VIRTUAL_SHARDS, run_ranks
from worker.comm.base import Communicator
from worker.comm.device import Alone, ThroughHost
from worker.sampling.device import (
    DeviceSampler,
    Draws,
    Manner,
    is_choosable,
    manner_of,
    noise_keys,
    pack,
    uniform,
)
from worker.sampling.noise import noise_keys as host_keys
from worker.sampling.noise import uniform as host_uniform
from worker.sampling.sampler import NOT_FINITE, Sampler
from worker.sampling.vocabulary import StepLogits, Vocabulary, best_of

TOKENS = 1000
GREEDY = Sampling(temperature=0, top_k=0, top_p=1, seed=1)
WAYS = {
    "greedy": GREEDY,
    "plain": Sampling(temperature=0.8, top_k=0, top_p=1, seed=2),
    "top-k": Sampling(temperature=1.1, top_k=40, top_p=1, seed=(1 << 64) - 3),
    "top-k of one": Sampling(temperature=1.1, top_k=1, top_p=1, seed=3),
    "top-k of more than there are": Sampling(temperature=1.1, top_k=5000, top_p=1, seed=4),
    "top-p": Sampling(temperature=1.5, top_k=0, top_p=0.9, seed=5),
    "min-p": Sampling(temperature=1.5, top_k=0, top_p=1, seed=6, min_p=0.05),
    "all": Sampling(temperature=1.5, top_k=300, top_p=0.95, seed=7, min_p=0.001),
    "nearly cold": Sampling(temperature=1e-300, top_k=0, top_p=0.5, seed=8),
}


def packed(sampling: list[Sampling]) -> Draws:
    rows = [pack(s) for s in sampling]
    integers = torch.tensor([integers for integers, _ in rows])
    return Draws.of(integers, torch.tensor([n for _, n in rows], dtype=torch.float64))


def both(logits: torch.Tensor, sampling: list[Sampling], world: int = 1) -> None:
    """The sampler's tokens and the device's are the same, on every rank."""
    positions = list(range(7, 7 + len(sampling)))
    owned = assign_shards(world, VIRTUAL_SHARDS)
    ids = [[split(TOKENS, VIRTUAL_SHARDS, v) for v in shards] for shards in owned]

    def job(comm: Communicator, _: list[range]) -> None:
        vocabulary = Vocabulary(comm.rank, ids)
        mine = slice(vocabulary.first_id, vocabulary.first_id + vocabulary.size)
        own = logits[:, mine].contiguous()
        collectives = Alone() if world == 1 else ThroughHost(comm)
        device = DeviceSampler(collectives, vocabulary)
        tokens = device(own, torch.tensor(positions), packed(sampling), manner_of(sampling))
        rows = own.numpy().copy()
        step = StepLogits(rows, best_of(rows), range(len(rows)))
        theirs = Sampler(comm, vocabulary)(step, sampling, positions, [0] * len(sampling))
        assert tokens.tolist() == theirs.tokens

    run_ranks(world, job)


def random_logits(rows: int) -> torch.Tensor:
    return torch.randn((rows, TOKENS), generator=torch.Generator().manual_seed(0)) * 3


def test_the_noise_is_the_samplers() -> None:
    sampling = [Sampling(1.0, 0, 1.0, seed) for seed in (0, 1, 12345, (1 << 63) + 5, (1 << 64) - 1)]
    positions = [0, 1, 100, 4095, 131071]
    theirs = host_keys(sampling, positions)
    keys = noise_keys(packed(sampling).seeds, torch.tensor(positions))
    assert (keys.numpy().view(np.uint64) == theirs).all()
    ids = np.arange(TOKENS)
    assert (uniform(keys, torch.from_numpy(ids)).numpy() == host_uniform(theirs, ids)).all()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_seed_gives_the_samplers_tokens(way: str, world: int) -> None:
    both(random_logits(20), [WAYS[way]] * 20, world)


@pytest.mark.parametrize("world", [1, 2])
def test_rows_of_one_batch_are_chosen_each_in_its_own_way(world: int) -> None:
    sampling = [*WAYS.values()] * 2
    both(random_logits(len(sampling)), sampling, world)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("way", ["greedy", "plain", "all"])
def test_logits_that_are_no_numbers_give_no_token(way: str, world: int) -> None:
    logits = random_logits(5)
    logits[0, 3] = np.nan
    logits[1, 900] = np.inf
    logits[2] = -np.inf
    logits[3, :500] = -np.inf  # all of one rank's: the other has tokens
    both(logits, [WAYS[way]] * 5, world)


def test_among_equals_the_lowest_id_is_the_best() -> None:
    logits = torch.zeros((1, TOKENS))
    both(logits, [GREEDY], world=2)
    vocabulary = Vocabulary(0, [[range(TOKENS)]])
    sampler = DeviceSampler(Alone(), vocabulary)
    for manner in Manner:
        assert sampler(logits, torch.tensor([7]), packed([GREEDY]), manner).tolist() == [0]
    logits[0, 5] = np.nan
    for manner in Manner:
        chosen = sampler(logits, torch.tensor([7]), packed([GREEDY]), manner).tolist()
        assert chosen == [NOT_FINITE]


def test_what_changes_or_reports_logits_is_left_to_the_sampler() -> None:
    assert is_choosable(GREEDY, 0)
    for left in (
        Sampling(0, 0, 1, 0, repetition_penalty=1.1),
        Sampling(0, 0, 1, 0, logit_bias={3: 1.0}),
        Sampling(0, 0, 1, 0, logprobs=0),
        Sampling(0, 0, 1, 0, banned=[2], banned_before=9),
    ):
        assert not is_choosable(left, 8)
    assert is_choosable(Sampling(0, 0, 1, 0, banned=[2], banned_before=9), 9)
