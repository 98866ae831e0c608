"""Randomness without a generator's state: noise that depends on (seed, position, token id) only.

Token t gets the Gumbel noise g(t), and argmax of logit / temperature + g is a draw from the softmax
(Gumbel 1954; Maddison et al. 2014). So every rank knows its own tokens' noise, and a draw depends
neither on what else runs in the batch nor on how the vocabulary is cut.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.messages import Sampling
from worker.sampling.vocabulary import Doubles, Ints

Keys = npt.NDArray[np.uint64]

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def noise_keys(sampling: Sequence[Sampling], positions: Sequence[int]) -> Keys:
    """What the noise of each row depends on, apart from the token id: [R]."""
    seeds = np.array([s.seed for s in sampling], dtype=np.uint64)
    steps = np.array(positions, dtype=np.uint64) + 1
    return _mix(_mix(seeds) + steps * _GOLDEN_GAMMA)


def gumbel(keys: Keys, ids: Ints) -> Doubles:
    """Noise of the token ids [R, M] or [M], the same for all rows, in rows with these keys: [R, M]."""
    return -np.log(-np.log(uniform(keys, ids)))


def uniform(keys: Keys, ids: Ints) -> Doubles:
    """Numbers in (0, 1): the outputs of SplitMix64 (Steele et al. 2014) begun at `keys`, by id."""
    bits = _mix(keys[:, None] + (ids.astype(np.uint64) + 1) * _GOLDEN_GAMMA)
    bits >>= 11
    numbers: Doubles = bits.view(np.int64).astype(np.float64)  # faster than from unsigned ones
    numbers += 0.5
    numbers *= 2.0**-53
    return numbers


def _mix(z: Keys) -> Keys:
    """SplitMix64's output function, in place."""
    z ^= z >> 30
    z *= 0xBF58476D1CE4E5B9
    z ^= z >> 27
    z *= 0x94D049BB133111EB
    z ^= z >> 31
    return z
