"""Randomness without a generator's state: noise that depends on (seed, position, token id) only.

Token t gets the Gumbel noise g(t), and argmax of logit / temperature + g is a draw from the softmax
(Gumbel 1954; Maddison et al. 2014). So every rank knows its own tokens' noise, and a draw depends
neither on what else runs in the batch nor on how the vocabulary is cut.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.worker_messages import Sampling
from worker.sampling.vocabulary import Doubles, Ints

Keys = npt.NDArray[np.uint64]

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
FIRST_FACTOR, SECOND_FACTOR = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def noise_keys(sampling: Sequence[Sampling], positions: Sequence[int]) -> Keys:
    """What the noise of each row depends on besides the token id: [R, 1]."""
    keys = [[noise_key(s, position)] for s, position in zip(sampling, positions, strict=True)]
    return np.array(keys, dtype=np.uint64)


def noise_key(sampling: Sampling, position: int) -> int:
    """What the noise of one row depends on besides the token id."""
    return mix(mix(sampling.seed) + (position + 1) * GOLDEN_GAMMA)


def perturb(scores: Doubles, keys: Keys, ids: Ints) -> None:
    """Add Gumbel noise to the scores [R, M] of the token ids [R, M] or [M], the same for all rows."""
    numbers = uniform(keys, ids)
    np.log(numbers, out=numbers)
    np.negative(numbers, out=numbers)
    np.log(numbers, out=numbers)
    scores -= numbers


def uniform(keys: Keys, ids: Ints) -> Doubles:
    """Numbers in (0, 1) [R, M]: the outputs of SplitMix64 (Steele et al. 2014) begun at `keys`."""
    z = ids.view(np.uint64) + 1
    z *= GOLDEN_GAMMA
    z = z + keys
    z ^= z >> 30
    z *= FIRST_FACTOR
    z ^= z >> 27
    z *= SECOND_FACTOR
    z ^= z >> 31
    z >>= 12  # 52 bits and a half are exact in float64; with 53, some would round up to 1
    numbers: Doubles = z.view(np.int64).astype(np.float64)  # faster than from unsigned ones
    numbers += 0.5
    numbers *= 2.0**-52
    return numbers


def mix(z: int) -> int:
    """SplitMix64's output function, as in `uniform`, for a plain integer."""
    z &= _WORD
    z = ((z ^ (z >> 30)) * FIRST_FACTOR) & _WORD
    z = ((z ^ (z >> 27)) * SECOND_FACTOR) & _WORD
    return z ^ (z >> 31)
