"""Top-k, top-p and min-p: each keeps a run of the best tokens, so they are cuts of a sorted row.

Everything here works on R rows at once, and knows of ranks only that candidates come from several.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.messages import Sampling
from worker.sampling.noise import Keys, gumbel, noise_keys
from worker.sampling.vocabulary import UNLIMITED, Doubles, Ints

_LOWEST_TEMPERATURE = 1e-200
"""Keeps the largest float32 divided by a temperature within float64."""


def is_cut(sampling: Sampling) -> bool:
    """Whether only some of the tokens may be drawn."""
    return sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0


def temperatures(sampling: Sequence[Sampling]) -> Doubles:
    """[R], to divide by."""
    return np.array([max(s.temperature, _LOWEST_TEMPERATURE) for s in sampling])


@dataclass(frozen=True)
class Cuts:
    """How R rows are to be cut and drawn from."""

    temperature: Doubles
    top_k: Ints
    """UNLIMITED: no such cut."""
    top_p: Doubles
    """1: no such cut."""
    min_p: Doubles
    """0: no such cut."""
    keys: Keys
    """Of the noise."""

    @classmethod
    def of(cls, sampling: Sequence[Sampling], positions: Sequence[int]) -> "Cuts":
        """From the parameters of each row and the positions of the tokens to draw."""
        return cls(
            temperature=temperatures(sampling),
            top_k=np.array([s.top_k or UNLIMITED for s in sampling]),
            top_p=np.array([s.top_p for s in sampling]),
            min_p=np.array([s.min_p for s in sampling]),
            keys=noise_keys(sampling, positions),
        )

    def rows(self, index: Ints) -> "Cuts":
        """Those of some rows."""
        return Cuts(
            self.temperature[index],
            self.top_k[index],
            self.top_p[index],
            self.min_p[index],
            self.keys[index],
        )

    @property
    def of_all_tokens(self) -> Ints:
        """The rows whose top-p is of all tokens, not of what top-k leaves."""
        return np.flatnonzero((self.top_p < 1) & (self.top_k == UNLIMITED))


def keep(
    values: Doubles, known: Ints, cuts: Cuts, sums: Doubles
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """How many of each row's tokens remain after all cuts, and whether that is certain: [R] each.

    values: [R, M], best first, of which `known` are surely the best of all. sums: [R], the sum of
    exp((logit - highest) / temperature) over all tokens; used for `cuts.of_all_tokens` only.
    Top-k is applied first, then top-p to what it leaves, then min-p relative to the best.
    """
    highest = values[:, :1]
    anchors = np.where(highest == -np.inf, 0, highest)
    weights = np.exp((values - anchors) / cuts.temperature[:, None])
    running = np.cumsum(weights, axis=1)
    by_rank = np.minimum(cuts.top_k, values.shape[1])
    unlimited = cuts.top_k == UNLIMITED
    total = np.where(unlimited, sums, running[np.arange(len(values)), by_rank - 1])
    by_mass = np.where(
        cuts.top_p < 1, (running < (cuts.top_p * total)[:, None]).sum(axis=1) + 1, UNLIMITED
    )
    by_ratio = np.where(cuts.min_p > 0, (weights >= cuts.min_p[:, None]).sum(axis=1), UNLIMITED - 1)
    kept = np.minimum(np.minimum(by_rank, by_mass), by_ratio)
    # That min-p cuts somewhere shows in the first token it leaves out, top-p's total in all k.
    looked_at = np.minimum(np.minimum(cuts.top_k, by_mass), by_ratio + 1)
    total_known = unlimited | (cuts.top_p == 1) | (cuts.top_k <= known)
    return kept, (looked_at <= known) & total_known


def draw(values: Doubles, ids: Ints, kept: Ints, cuts: Cuts) -> Ints:
    """One of the first `kept` ids of each row, with probability softmax(values / temperature)."""
    width = int(kept.max())
    ids = ids[:, :width]
    scores = values[:, :width] / cuts.temperature[:, None] + gumbel(cuts.keys, ids)
    scores[np.arange(width) >= kept[:, None]] = -np.inf
    chosen: Ints = ids[np.arange(len(ids)), scores.argmax(axis=1)]
    return chosen
