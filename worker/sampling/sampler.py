"""Chooses the next token of each sequence, the same one on every rank.

Ranks hold the logits of their own tokens and tell each other no more than the choice needs: greedy
and plain sampling one score and id for each row, top-k, top-p and min-p some of the best tokens of
each rank. Only where those turn out not to suffice are the whole logits of a row exchanged. Which
collectives a batch takes follows from the batch and from what all ranks have been told.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from shared.worker_messages import History, Sampling, TokenLogprobs
from worker.comm.base import Communicator, Floats
from worker.native.sampling import BEST, NOISY_BEST, TOP, TOP_AND_SUMS, WHOLE, Wanted
from worker.sampling.candidates import best, candidates, merge
from worker.sampling.cuts import Cuts, draw, is_cut, keep, temperature_of, temperatures
from worker.sampling.logprobs import logprobs_of
from worker.sampling.noise import noise_key, noise_keys, perturb
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
        self._unsettled: set[int] = set()
        """Slots whose last token was drawn from whole logits, as the best ones did not suffice."""

    def begin(self, slot: int, history: History) -> None:
        """A sequence with penalties takes a slot."""
        self._counts[slot] = TokenCounts(history, self._vocabulary)

    def wanted(
        self, sampling: Sequence[Sampling], positions: Sequence[int], slots: Sequence[int]
    ) -> Wanted:
        """What a forward pass is to tell of its rows of logits; see the call for the parameters."""
        if all(map(_is_plain, sampling)):
            return _best_only(len(sampling))
        rows, cut = [], []
        for s, position, slot in zip(sampling, positions, slots, strict=True):
            what, key = WHOLE, 0
            if s.logprobs >= 0 or _is_changed(s, position):
                pass
            elif s.temperature == 0:
                what = BEST
            elif not is_cut(s):
                what, key = NOISY_BEST, noise_key(s, position)
            elif slot not in self._unsettled:
                what = TOP_AND_SUMS if _needs_sums(s) else TOP
            if s.temperature > 0 and is_cut(s):
                cut.append(s)
            rows.append((what, temperature_of(s), key))
        return Wanted.of(rows, self._candidates_for(cut) if cut else 0)

    def __call__(
        self,
        step: StepLogits,
        sampling: Sequence[Sampling],
        positions: Sequence[int],
        slots: Sequence[int],
    ) -> Sampled:
        """A token for each row; its noise depends on its seed and position and nothing else.

        step: of B rows, what `wanted` says or more; logits are overwritten. positions: of the tokens to choose. slots: whose sequences'
        counts penalties use, and add the token to.
        """
        if all(map(_is_plain, sampling)):
            return Sampled(self._agree(self._scores(step.best)).tolist(), [])
        reported = [row for row, s in enumerate(sampling) if s.logprobs >= 0]
        models_own = step.rows(reported).copy()  # before any change
        changed = [row for row, s in enumerate(sampling) if _is_changed(s, positions[row])]
        for row in changed:
            s = sampling[row]
            counts = self._counts[slots[row]] if s.penalises else None
            logits = step.logits[step.whole.index(row)]
            change_logits(logits, s, positions[row], counts, self._vocabulary)
        best = step.best.copy()
        if changed:
            best[changed] = best_of(step.rows(changed))
        tokens = self._choose(step, self._scores(best), sampling, positions, slots)
        for row in changed:
            if sampling[row].penalises:
                self._counts[slots[row]].add(int(tokens[row]))
        logprobs = self._logprobs(models_own, reported, tokens, sampling) if reported else []
        return Sampled(tokens.tolist(), logprobs)

    def _choose(
        self,
        step: StepLogits,
        scores: Doubles,
        sampling: Sequence[Sampling],
        positions: Sequence[int],
        slots: Sequence[int],
    ) -> Ints:
        """Tokens [B], from the logits as they are, and the best of each row."""
        random = [row for row, s in enumerate(sampling) if s.temperature > 0]
        cut = [row for row in random if is_cut(sampling[row])]
        plain = [row for row in random if not is_cut(sampling[row]) and row in step.whole]
        if plain:
            self._perturb(scores, step, plain, sampling, positions)
        if not cut:
            return self._agree(scores)
        step.logits[~(scores[list(step.whole), 0] < np.inf)] = 0  # these rows get no token
        rows = np.array(cut)
        cuts = Cuts.of([sampling[row] for row in cut], [positions[row] for row in cut])
        ranks_scores, ranks_best, sums = self._exchange(scores, step, cut, sampling, cuts)
        tokens = _winners(ranks_scores)
        valid = tokens[rows] != NOT_FINITE
        drawn = self._draw(step, cut, cuts, ranks_best, sums, valid, slots)
        tokens[rows] = np.where(valid, drawn, NOT_FINITE)
        return tokens

    def _exchange(
        self,
        scores: Doubles,
        step: StepLogits,
        cut: Sequence[int],
        sampling: Sequence[Sampling],
        cuts: Cuts,
    ) -> tuple[Doubles, Doubles, Doubles]:
        """All ranks' scores [world, B, 2] and their candidates for the cut rows [world, R, 2, count].

        And the softmax sums of the cut rows [R, 1], as far as `keep` needs them. One collective.
        """
        mine = self._candidates(step, cut, self._candidates_for([sampling[row] for row in cut]))
        sums = np.ones((len(cut), 1))
        summed = [i for i, row in enumerate(cut) if _needs_sums(sampling[row])]
        if not summed:
            ranks_scores, ranks_best = gather(self._comm, scores, mine)
            return ranks_scores, ranks_best, sums
        temperature = cuts.temperature[summed]
        own_sums = self._partial_sums(step, [cut[i] for i in summed], temperature)
        ranks_scores, ranks_best, ranks_sums = gather(self._comm, scores, mine, own_sums)
        sums[summed] = softmax_sums(ranks_sums, temperature, self._vocabulary)[1]
        return ranks_scores, ranks_best, sums

    def _candidates(self, step: StepLogits, rows: Sequence[int], count: int) -> Doubles:
        """What `candidates` gives for these rows, from their logits or from the head."""
        whole = [row for row in rows if row in step.whole]
        if not whole:
            return step.top[rows]
        found = candidates(step.rows(whole), count, self._vocabulary)
        if len(whole) < len(rows):
            mixed = step.top[rows]
            mixed[[row in step.whole for row in rows]] = found
            return mixed
        return found

    def _partial_sums(self, step: StepLogits, rows: Sequence[int], temperature: Doubles) -> Doubles:
        """What `partial_sums` gives for these rows, likewise."""
        there = [row in step.whole for row in rows]
        whole = [row for row in rows if row in step.whole]
        found = partial_sums(step.rows(whole), temperature[there], self._vocabulary)
        if len(whole) == len(rows):
            return found
        mixed = np.zeros((len(rows), *found.shape[1:]))
        mixed[:, :, 0] = -np.inf
        mixed[:, : step.sums.shape[1]] = step.sums[rows]
        mixed[there] = found
        return mixed

    def _candidates_for(self, cut: Sequence[Sampling]) -> int:
        """How many tokens each rank gives for rows that are cut so."""
        wanted = [s.top_k if 0 < s.top_k <= _MOST_CANDIDATES else _CANDIDATES for s in cut]
        return min(max(wanted), max(self._vocabulary.sizes))

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
        step: StepLogits,
        rows: Sequence[int],
        sampling: Sequence[Sampling],
        positions: Sequence[int],
    ) -> None:
        """Rows with logits that sample from all tokens: the best of logit / temperature + noise instead.

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
            first_id = self._vocabulary.first_id
            found = native.gumbel_best(step.rows(rows), temperature, keys, first_id)
            scores[rows] = self._scores(found)
            return
        for start in range(0, len(rows), at_once):
            block = rows[start : start + at_once]
            noisy = step.rows(block) / temperature[start : start + at_once]
            perturb(noisy, keys[start : start + at_once], ids)
            columns = noisy.argmax(axis=1)
            scores[block, 0] = noisy[np.arange(len(block)), columns]
            scores[block, 1] = ids[columns]

    def _draw(
        self,
        step: StepLogits,
        cut: Sequence[int],
        cuts: Cuts,
        ranks_best: Doubles,
        sums: Doubles,
        wanted: Bools,
        slots: Sequence[int],
    ) -> Ints:
        """Tokens [R] from the best of all ranks; where those do not suffice, from whole rows."""
        count = ranks_best.shape[-1]
        incomplete = [rank for rank, size in enumerate(self._vocabulary.sizes) if size > count]
        values, ids, known = merge(ranks_best, incomplete)
        if not wanted.all():
            values[~wanted] = 0
        kept, certain = keep(values, known, cuts, sums)
        tokens = draw(values, ids, np.where(certain, kept, 1), cuts)
        unsure = np.flatnonzero(wanted & ~certain[:, 0]).tolist()
        self._unsettled.difference_update(slots[row] for row in cut)
        if unsure:
            self._unsettled.update(slots[cut[i]] for i in unsure)
            own = step.made_whole([cut[i] for i in unsure])
            rows = whole_rows(self._comm, self._vocabulary, own)
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


def _is_changed(s: Sampling, position: int) -> bool:
    """Whether the logits for this position are not taken as they are."""
    return bool(s.logit_bias) or s.banned_before > position or s.penalises


def _needs_sums(s: Sampling) -> bool:
    """Whether a cut row's probabilities are shares of all tokens together."""
    return s.top_p < 1 and not s.top_k


@cache
def _best_only(rows: int) -> Wanted:
    return Wanted.of([(BEST, 1.0, 0)] * rows)


def _winners(every: Doubles) -> Ints:
    """The ids of the best scores [world, B, 2]: [B], NOT_FINITE where the best is no number."""
    # argmax: NaN counts as the highest; the lowest rank, so the lowest id, among equals.
    best_of_all = every[every[:, :, 0].argmax(axis=0), np.arange(every.shape[1])]
    finite = np.isfinite(best_of_all[:, 0])
    return np.where(finite, best_of_all[:, 1], NOT_FINITE).astype(np.int64)


def _draw_from_whole(logits: Floats, cuts: Cuts, sums: Doubles) -> Ints:
    """A token [1] from whole logits [1, vocabulary]."""
    values = -np.sort(-logits, axis=1).astype(np.float64)
    kept, _ = keep(values, np.array([[UNLIMITED]]), cuts, sums)
    # Sorted without ids: with them, a stable sort takes 25 times as long.
    logits, ids = best(logits, int(kept[0, 0]))
    return draw(logits.astype(np.float64), ids, kept, cuts)
