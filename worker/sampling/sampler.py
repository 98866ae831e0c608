"""Chooses the next token of each sequence, the same one on every rank.

Ranks hold the logits of their own tokens and tell each other no more than the choice needs: greedy
and plain sampling one score and id for each row, top-k, top-p and min-p some of the best tokens of
each rank. Only where those turn out not to suffice are the whole logits of a row exchanged. Which
collectives a batch takes follows from the batch and from what all ranks have been told.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shared.messages import History, Sampling, TokenLogprobs
from worker.comm.base import Communicator, Floats
from worker.sampling.candidates import best, candidates, merge
from worker.sampling.cuts import Cuts, draw, is_cut, keep, temperatures
from worker.sampling.logprobs import logprobs_of
from worker.sampling.noise import gumbel, noise_keys
from worker.sampling.penalties import TokenCounts, change_logits, changes_logits
from worker.sampling.vocabulary import (
    UNLIMITED,
    Doubles,
    Ints,
    Vocabulary,
    gather,
    partial_sums,
    softmax_sums,
    whole_rows,
)

NOT_FINITE = -1
"""Instead of a token, where logits hold NaN or +inf, or nothing but -inf."""
_CANDIDATES = 64
"""Tokens of each rank that are exchanged for top-p and min-p at first."""
_MOST_CANDIDATES = 256
"""For a top-k up to this, as many as it takes."""
_BLOCK = 1 << 15
"""Scores computed at once, which so stay in the cache."""


@dataclass(frozen=True)
class Sampled:
    """What was chosen for the rows of a batch."""

    tokens: list[int]
    """Token ids, or NOT_FINITE."""
    logprobs: list[TokenLogprobs | None]
    """Of the rows that want them and have a token; empty if no row wants them."""


class Sampler:
    """Samples from sharded logits; keeps what its slots' sequences have had, for penalties."""

    def __init__(self, comm: Communicator, vocabulary: Vocabulary) -> None:
        self._comm = comm
        self._vocabulary = vocabulary
        self._counts: dict[int, TokenCounts] = {}

    def begin(self, slot: int, history: History) -> None:
        """A sequence with penalties takes a slot."""
        self._counts[slot] = TokenCounts(history, self._vocabulary)

    def __call__(
        self,
        logits: torch.Tensor,
        sampling: Sequence[Sampling],
        positions: Sequence[int],
        slots: Sequence[int],
    ) -> Sampled:
        """A token for each row; its noise depends on its seed and position and nothing else.

        logits: [B, own tokens] float32, overwritten. positions: of the tokens to choose. slots: whose
        sequences' counts penalties use, and add the token to.
        """
        own: Floats = logits.numpy()
        plain, cut, changed, reported = [], [], [], []
        for row, s in enumerate(sampling):
            if s.temperature > 0:
                (cut if is_cut(s) else plain).append(row)
            if changes_logits(s, positions[row]):
                changed.append(row)
            if s.logprobs >= 0:
                reported.append(row)
        unchanged = own[reported] if reported else own[:0]
        for row in changed:
            s = sampling[row]
            counts = self._counts[slots[row]] if s.penalises else None
            change_logits(own[row], s, positions[row], counts, self._vocabulary)
        scores = self._best(own)
        if plain:
            self._perturb(scores, own, plain, sampling, positions)
        tokens = self._choose(...)
