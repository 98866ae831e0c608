"""The sampler's draws follow the distribution they should, and its noise has no pattern."""

import math

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.worker.sampling_ranks import GREEDY, Batch, Row, kept_tokens, sample_on_ranks
from worker.sampling.noise import noise_keys, uniform
from worker.sampling.vocabulary import Doubles

DRAWS = 50_000
NUMBERS = 1_000_000
ENOUGH = 1e-3
"""Least p-value. Seeds are fixed, so a test passes always or never."""

Counts = npt.NDArray[np.int64] | npt.NDArray[np.float64]

replace = msgspec.structs.replace


def p_value(chi_square: float, degrees: int) -> float:
    """How likely a chi-square this large is."""
    half = torch.tensor([degrees / 2, chi_square / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def assert_follows(counts: Counts, expected: Doubles) -> None:
    assert expected.min() > 5, "too few to be compared"
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert p_value(chi_square, counts.size - 1) > ENOUGH


def assert_even(counts: Counts) -> None:
    assert_follows(counts, np.full(counts.shape, counts.sum() / counts.size))


@pytest.mark.parametrize(
    "cut",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.9},
        {"top_k": 12, "top_p": 0.95, "min_p": 0.08, "temperature": 1.4},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(cut: dict[str, float]) -> None:
    logits = np.random.default_rng(0).normal(size=24).astype(np.float32)
    s = replace(GREEDY, **{"temperature": 1.0, **cut})
    # Answers of 250 tokens, one seed each.
    rows = [Row(logits, replace(s, seed=i // 250), position=i % 250) for i in range(DRAWS)]
    outcomes = sample_on_ranks(1, [Batch(rows[i : i + 2000]) for i in range(0, DRAWS, 2000)])
    tokens = [token for outcome in outcomes for token in outcome.sampled.tokens]
    observed = np.bincount(tokens, minlength=len(logits))
    kept = kept_tokens(logits, s)
    assert set(np.flatnonzero(observed)) == set(kept)
    weights = np.array([math.exp(float(logits[token]) / s.temperature) for token in kept])
    expected = weights / weights.sum() * DRAWS
    assert_follows(observed[kept], expected)


def noise(seeds: range, positions: range, ids: range) -> Doubles:
    """The numbers behind the noise: [seeds * positions, ids]."""
    pairs = [(seed, position) for seed in seeds for position in positions]
    sampling = [replace(GREEDY, seed=seed) for seed, _ in pairs]
    keys = noise_keys(sampling, [position for _, position in pairs])
    return uniform(keys, np.array(ids))


@pytest.mark.parametrize(
    "numbers",
    [
        noise(range(1), range(1), range(NUMBERS)),
        noise(range(1), range(1000), range(1000)),
        noise(range(1000), range(1), range(1000)),
        noise(range(NUMBERS // 100, NUMBERS // 100 + 10_000), range(5, 6), range(7, 107)),
    ],
    ids=["ids", "positions", "seeds", "few ids"],
)
def test_the_numbers_behind_the_noise_are_uniform(numbers: Doubles) -> None:
    assert 0 < numbers.min() < 1e-5
    assert 1 - 1e-5 < numbers.max() < 1
    thousandths, _ = np.histogram(numbers, bins=1000, range=(0, 1))
    assert_even(thousandths)
    low_bits = (numbers * 2.0**52 - 0.5).astype(np.int64) & 1023
    assert_even(np.bincount(low_bits.ravel(), minlength=1024))


SEEDS, POSITIONS, IDS = range(100), range(100), range(100)


@pytest.mark.parametrize("distance", [1, 2, 3, 32, 64])
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["seeds", "positions", "ids"])
def test_neighbours_have_independent_noise(axis: int, distance: int) -> None:
    numbers = noise(SEEDS, POSITIONS, IDS).reshape(len(SEEDS), len(POSITIONS), len(IDS))
    left = np.take(numbers, range(100 - distance), axis).ravel()
    right = np.take(numbers, range(distance, 100), axis).ravel()
    correlation = float(np.corrcoef(left, right)[0, 1])
    assert abs(correlation) < 4 / math.sqrt(left.size)
    pairs, _, _ = np.histogram2d(left, right, bins=16, range=[[0, 1], [0, 1]])
    assert_even(pairs)


def test_swapping_seed_position_and_id_gives_other_noise() -> None:
    numbers = noise(SEEDS, POSITIONS, IDS)
    assert len(np.unique(numbers)) == numbers.size
