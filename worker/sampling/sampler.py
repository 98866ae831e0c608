"""Chooses the next token of each sequence, the same one on every rank.

Ranks hold the logits of their own tokens and tell each other no more than the choice needs: greedy
and plain sampling one score and id for each row, top-k, top-p and min-p some of the best tokens of
each rank. Only where those turn out not to suffice are the whole logits of a row exchanged. Which
collectives a batch takes follows from the batch and from what all ranks have been told.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.worker_messages import History, Sampling, TokenLogprobs
from worker.comm.base import Communicator, Floats
from worker.sampling.candidates import best, candidates, merge
from worker.sampling.cuts import Cuts, draw, is_cut, keep, temperatures
from worker.sampling.logprobs import logprobs_of
from worker.sampling.noise import noise_keys, perturb
from worker.sampling.penalties import TokenCounts, change_logits
from worker.sampling.vocabulary import (
    UNLIMITED,
    Bools,
    Doubles,
    Ints,
    StepLogits,
    Vocabulary,
    best_of,
    gather,
    partial_sums,
    softmax_sums,
    whole_rows,
)

NOT_FINITE = -1
"""Instead of a token, where logits hold NaN or +inf, or nothing but -inf."""
_CANDIDATES = 128
"""Tokens of each rank that are exchanged for top-p and min-p at first."""
_MOST_CANDIDATES = 256
"""For a top-k up to this, as many as it takes."""
_SCORES_AT_ONCE = 1 << 15
"""Of noisy scores of all tokens; several arrays of so many numbers fit into a core's cache."""


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
        step: StepLogits,
        sampling: Sequence[Sampling],
        positions: Sequence[int],
        slots: Sequence[int],
    ) -> Sampled:
        """A token for each row; its noise depends on its seed and position and nothing else.

        step: logits of B rows, overwritten. positions: of the tokens to choose. slots: whose sequences'
        counts penalties use, and add the token to.
        """
        if all(map(_is_plain, sampling)):
            return Sampled(self._agree(self._scores(step.best)).tolist(), [])
        own = step.logits
        reported = [row for row, s in enumerate(sampling) if s.logprobs >= 0]
        models_own = own[reported] if reported else own[:0]  # a copy, before any change
        changed = [
            row
            for row, s in enumerate(sampling)
            if s.logit_bias or s.banned_before > positions[row] or s.penalises
        ]
        for row in changed:
            s = sampling[row]
            counts = self._counts[slots[row]] if s.penalises else None
            change_logits(own[row], s, positions[row], counts, self._vocabulary)
        best = step.best.copy()
        if changed:
            best[changed] = best_of(own[changed])
        tokens = self._choose(own, self._scores(best), sampling, positions)
        for row in changed:
            if sampling[row].penalises:
                self._counts[slots[row]].add(int(tokens[row]))
        logprobs = self._logprobs(models_own, reported, tokens, sampling) if reported else []
        return Sampled(tokens.tolist(), logprobs)

    def _choose(
        self,
        own: Floats,
        scores: Doubles,
        sampling: Sequence[Sampling],
        positions: Sequence[int],
    ) -> Ints:
        """Tokens [B], from the logits [B, own tokens] as they are, and the best of each row."""
        random = [row for row, s in enumerate(sampling) if s.temperature > 0]
        cut = [row for row in random if is_cut(sampling[row])]
        if len(cut) < len(random):
            plain = [row for row in random if not is_cut(sampling[row])]
            self._perturb(scores, own, plain, sampling, positions)
        if not cut:
            return self._agree(scores)
        rows = np.array(cut)
        logits = own if len(cut) == len(own) else own[rows]
        logits[~(scores[rows, 0] < np.inf)] = 0  # these rows get no token, whatever is drawn
        cut_sampling = [sampling[row] for row in cut]
        cuts = Cuts.of(cut_sampling, [positions[row] for row in cut])
        ranks_scores, ranks_best, sums = self._exchange(scores, logits, cut_sampling, cuts)
        tokens = _winners(ranks_scores)
        valid = tokens[rows] != NOT_FINITE
        drawn = self._draw(logits, cuts, ranks_best, sums, valid)
        tokens[rows] = np.where(valid, drawn, NOT_FINITE)
        return tokens

    def _exchange(
        self, scores: Doubles, cut: Floats, sampling: Sequence[Sampling], cuts: Cuts
    ) -> tuple[Doubles, Doubles, Doubles]:
        """All ranks' scores [world, B, 2] and their candidates for the cut rows [world, R, 2, count].

        And the softmax sums of the cut rows [R, 1], as far as `keep` needs them. One collective.
        """
        count = _candidates_for(sampling, max(self._vocabulary.sizes))
        mine = candidates(cut, count, self._vocabulary)
        sums = np.ones((len(cut), 1))
        rows = [i for i, s in enumerate(sampling) if s.top_p < 1 and not s.top_k]
        if not rows:
            ranks_scores, ranks_best = gather(self._comm, scores, mine)
            return ranks_scores, ranks_best, sums
        temperature = cuts.temperature[rows]
        own_sums = partial_sums(cut[rows], temperature, self._vocabulary)
        ranks_scores, ranks_best, ranks_sums = gather(self._comm, scores, mine, own_sums)
        sums[rows] = softmax_sums(ranks_sums, temperature, self._vocabulary)[1]
        return ranks_scores, ranks_best, sums

    def _scores(self, best: Doubles) -> Doubles:
        """The best own logit of each row and its id [B, 2], from its column."""
        best[:, 1] += self._vocabulary.first_id
        return best

    def _agree(self, scores: Doubles) -> Ints:
        """The tokens [B] with the best scores [B, 2] of all ranks."""
        if self._comm.world == 1:
            return np.where(np.isfinite(scores[:, 0]), scores[:, 1], NOT_FINITE).astype(np.int64)
        return _winners(*gather(self._comm, scores))

    def _perturb(
        self,
        scores: Doubles,
        own: Floats,
        rows: Sequence[int],
        sampling: Sequence[Sampling],
        positions: Sequence[int],
    ) -> None:
        """Rows that sample from all tokens: the best of logit / temperature + noise instead.

        Scores that are not finite stay.
        """
        finite = np.isfinite(scores[:, 0]).tolist()
        rows = [row for row in rows if finite[row]]
        temperature = temperatures([sampling[row] for row in rows])
        keys = noise_keys([sampling[row] for row in rows], [positions[row] for row in rows])
        ids = self._vocabulary.first_id + np.arange(self._vocabulary.size)
        at_once = max(1, _SCORES_AT_ONCE // max(1, len(ids)))
        native = self._vocabulary.native
        if native is not None and len(ids):
            start_at = scores[rows, 1] - self._vocabulary.first_id
            logits = own if len(rows) == len(own) else own[rows]
            found = native.gumbel_best(
                logits, temperature, keys, self._vocabulary.first_id, start_at
            )
            scores[rows] = self._scores(found)
            return
        for start in range(0, len(rows), at_once):
            block = rows[start : start + at_once]
            noisy = own[block] / temperature[start : start + at_once]
            perturb(noisy, keys[start : start + at_once], ids)
            columns = noisy.argmax(axis=1)
            scores[block, 0] = noisy[np.arange(len(block)), columns]
            scores[block, 1] = ids[columns]

    def _draw(
        self, own: Floats, cuts: Cuts, ranks_best: Doubles, sums: Doubles, wanted: Bools
    ) -> Ints:
        """Tokens [R] from the best of all ranks; where those do not suffice, from whole rows."""
        count = ranks_best.shape[-1]
        incomplete = [rank for rank, size in enumerate(self._vocabulary.sizes) if size > count]
        values, ids, known = merge(ranks_best, incomplete)
        if not wanted.all():
            values[~wanted] = 0
        kept, certain = keep(values, known, cuts, sums)
        tokens = draw(values, ids, np.where(certain, kept, 1), cuts)
        unsure = np.flatnonzero(wanted & ~certain[:, 0])
        if len(unsure):
            rows = whole_rows(self._comm, self._vocabulary, own[unsure])
            for row, logits in zip(unsure, rows, strict=True):
                one = slice(row, row + 1)
                tokens[one] = _draw_from_whole(logits[None], cuts.rows(one), sums[one])
        return tokens

    def _logprobs(
        self,
        own: Floats,
        reported: Sequence[int],
        tokens: Ints,
        sampling: Sequence[Sampling],
    ) -> list[TokenLogprobs | None]:
        """Of the rows `reported`; `own` are their logits [R, own tokens]."""
        found: list[TokenLogprobs | None] = [None] * len(tokens)
        valid = tokens[reported] != NOT_FINITE
        if valid.any():
            rows = np.array(reported)[valid]
            top = [sampling[row].logprobs for row in rows]
            of_rows = logprobs_of(self._comm, self._vocabulary, own[valid], tokens[rows], top)
            for row, logprobs in zip(rows, of_rows, strict=True):
                found[row] = logprobs
        return found


def _is_plain(s: Sampling) -> bool:
    """Whether the row takes its best logit as it is, and reports nothing."""
    return (
        s.temperature == 0
        and s.logprobs < 0
        and not s.logit_bias
        and not s.banned
        and not s.penalises
    )


def _winners(every: Doubles) -> Ints:
    """The ids of the best scores [world, B, 2]: [B], NOT_FINITE where the best is no number."""
    # argmax: NaN counts as the highest; the lowest rank, so the lowest id, among equals.
    best_of_all = every[every[:, :, 0].argmax(axis=0), np.arange(every.shape[1])]
    finite = np.isfinite(best_of_all[:, 0])
    return np.where(finite, best_of_all[:, 1], NOT_FINITE).astype(np.int64)


def _candidates_for(sampling: Sequence[Sampling], most: int) -> int:
    """How many tokens each rank gives for rows that are cut so, at `most`."""
    return min(
        max(s.top_k if 0 < s.top_k <= _MOST_CANDIDATES else _CANDIDATES for s in sampling), most
    )


def _draw_from_whole(logits: Floats, cuts: Cuts, sums: Doubles) -> Ints:
    """A token [1] from whole logits [1, vocabulary]."""
    values = -np.sort(-logits, axis=1).astype(np.float64)
    kept, _ = keep(values, np.array([[UNLIMITED]]), cuts, sums)
    # Sorted without ids: with them, a stable sort takes 25 times as long.
    logits, ids = best(logits, int(kept[0, 0]))
    return draw(logits.astype(np.float64), ids, kept, cuts)
