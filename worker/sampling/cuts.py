"""Top-k, top-p and min-p: each keeps some of the best tokens, so they are cuts of a sorted row.

Everything here works on R rows at once; arrays of one number for each row are [R, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.worker_messages import Sampling
from worker.sampling.noise import Keys, noise_keys, perturb
from worker.sampling.vocabulary import UNLIMITED, Bools, Doubles, Ints

_LOWEST_TEMPERATURE = 1e-200
"""Keeps the largest float32 divided by a temperature within float64."""


def is_cut(sampling: Sampling) -> bool:
    """Whether only some of the tokens may be drawn."""
    return sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0


def temperatures(sampling: Sequence[Sampling]) -> Doubles:
    """What logits are to be divided by: [R, 1]."""
    return np.array([[temperature_of(s)] for s in sampling])


def temperature_of(sampling: Sampling) -> float:
    """What logits are to be divided by."""
    return max(sampling.temperature, _LOWEST_TEMPERATURE)


@dataclass(frozen=True)
class Cuts:
    """How R rows are to be cut and drawn from; each array is [R, 1]."""

    temperature: Doubles
    top_k: Ints
    """UNLIMITED: no such cut."""
    top_p: Doubles
    """Infinite: no such cut."""
    min_p: Doubles
    """0: no such cut."""
    keys: Keys
    """Of the noise."""

    @classmethod
    def of(cls, sampling: Sequence[Sampling], positions: Sequence[int]) -> "Cuts":
        """From the parameters of each row and the positions of the tokens to draw."""
        return cls(
            temperature=temperatures(sampling),
            top_k=np.array([[s.top_k or UNLIMITED] for s in sampling]),
            top_p=np.array([[s.top_p if s.top_p < 1 else np.inf] for s in sampling]),
            min_p=np.array([[s.min_p] for s in sampling]),
            keys=noise_keys(sampling, positions),
        )

    def rows(self, index: slice) -> "Cuts":
        """Those of some rows."""
        return Cuts(
            self.temperature[index],
            self.top_k[index],
            self.top_p[index],
            self.min_p[index],
            self.keys[index],
        )


def keep(values: Doubles, known: Ints, cuts: Cuts, sums: Doubles) -> tuple[Ints, Bools]:
    """How many tokens of each row remain after all cuts, and whether that is certain: [R, 1] each.

    values: [R, M], best first, the first one finite; `known` of them are surely the best of all.
    sums: [R, 1], the sum of exp((logit - highest) / temperature) over all tokens; used for rows with
    top-p and without top-k. Top-p is of what top-k leaves, min-p relative to the best.
    """
    weights = np.exp((values - values[:, :1]) / cuts.temperature)
    running = weights.cumsum(axis=1)
    by_rank = np.minimum(cuts.top_k, values.shape[1])
    unlimited = cuts.top_k == UNLIMITED
    total = np.where(unlimited, sums, running[np.arange(len(values))[:, None], by_rank - 1])
    by_mass = (running < cuts.top_p * total).sum(axis=1, keepdims=True) + 1
    by_ratio = (weights >= cuts.min_p).sum(axis=1, keepdims=True)
    kept = np.minimum(np.minimum(by_rank, by_mass), by_ratio)
    # Min-p is seen to cut by the first token that it leaves out, and top-p needs all that top-k left.
    looked_at = np.minimum(np.minimum(cuts.top_k, by_mass), by_ratio + 1)
    return kept, (looked_at <= known) & (unlimited | (cuts.top_k <= known))


def draw(values: Doubles, ids: Ints, kept: Ints, cuts: Cuts) -> Ints:
    """One of the first `kept` ids of each row [R], with probability softmax(values / temperature)."""
    width = int(kept.max())
    ids = ids[:, :width]
    scores = values[:, :width] / cuts.temperature
    perturb(scores, cuts.keys, ids)
    scores[np.arange(width) >= kept] = -np.inf
    chosen: Ints = ids[np.arange(len(ids)), scores.argmax(axis=1)]
    return chosen
