"""Chooses tokens when the vocabulary is cut over ranks: candidates are exchanged, not logits.

Randomness is a pure function of (seed, position, token id): token t gets the Gumbel noise g(t) and
argmax of logit / temperature + g is a draw from the softmax (Gumbel 1954; Maddison et al. 2014). So
every rank reaches the same token without a shared generator, whatever else runs in the batch, and
however the vocabulary is cut.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from shared.messages import Sampling
from worker.comm.base import Communicator

NOT_FINITE = -1
"""Returned instead of a token when a row's logits hold NaN or +inf, or nothing but -inf."""
CANDIDATES = 64
"""Best tokens of each rank that are exchanged for top-k and top-p before all logits are."""

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Sampler:
    """Samples one token for each row of sharded logits; the same one on every rank."""

    def __init__(self, comm: Communicator, first_id: int, vocab_rows: Sequence[int]) -> None:
        """`first_id`: token id of the own first logit. `vocab_rows`: logits of each rank."""
        self._comm = comm
        self._first_id = first_id
        self._first_ids = np.cumsum([0, *vocab_rows[:-1]])
        self._vocab_rows = list(vocab_rows)

    def __call__(
        self, logits: torch.Tensor, sampling: Sequence[Sampling], positions: Sequence[int]
    ) -> list[int]:
        """Token ids [B]; logits [B, own tokens] float32, positions of the sampled tokens [B]."""
        own = logits.numpy()
        tokens = self._pick_best(own, sampling, positions)
        cut = [
            row
            for row, s in enumerate(sampling)
            if s.temperature > 0 and (s.top_k or s.top_p < 1) and tokens[row] != NOT_FINITE
        ]
        if cut:
            chosen = self._pick_among_candidates(
                own[cut], [sampling[r] for r in cut], cut, positions
            )
            for row, token in zip(cut, chosen, strict=True):
                tokens[row] = token
        return tokens

    def _pick_best(
        self, own: npt.NDArray[np.float32], sampling: Sequence[Sampling], positions: Sequence[int]
    ) -> list[int]:
        """Greedy, and free sampling: the best score of each rank is all that is needed."""
        best = np.empty((len(own), 2))
        best[:, 0], best[:, 1] = -np.inf, self._first_id
        if own.shape[1]:
            ids = own.argmax(1)  # the lowest id among equals; a NaN wins over everything
            best[:, 0], best[:, 1] = own[np.arange(len(own)), ids], ids + self._first_id
            for row, s in enumerate(sampling):
                if s.temperature > 0 and not s.top_k and s.top_p == 1 and np.isfinite(best[row, 0]):
                    all_ids = np.arange(own.shape[1]) + self._first_id
                    scores = perturb(own[row], all_ids, s, positions[row])
                    choice = int(scores.argmax())
                    best[row] = scores[choice], choice + self._first_id
        every = self._comm.exchange_small(best)  # [world, B, 2]
        winner = every[:, :, 0].argmax(0)  # the lowest rank, so the lowest id, among equals
        rows = np.arange(len(own))
        finite = np.isfinite(every[winner, rows, 0])
        return [int(t) for t in np.where(finite, every[winner, rows, 1], NOT_FINITE)]

    def _pick_among_candidates(
        self,
        own: npt.NDArray[np.float32],
        sampling: Sequence[Sampling],
        rows: Sequence[int],
        positions: Sequence[int],
    ) -> list[int]:
        """Rows with top-k or top-p: from the best candidates of all ranks if they surely suffice."""
        count = min(CANDIDATES, max(self._vocab_rows))
        every = np.asarray(
            self._comm.exchange_small(self._candidates(own, sampling, count)), dtype=np.float64
        )
        tokens: list[int] = []
        unsure = []
        for i, s in enumerate(sampling):
            choice = self._choose(every[:, i], count, s, positions[rows[i]])
            tokens.append(NOT_FINITE if choice is None else choice)
            if choice is None:
                unsure.append(i)
        if unsure:
            full = self._gather_rows(own[unsure])
            all_ids = np.arange(full.shape[1])
            for i, logits in zip(unsure, full, strict=True):
                kept = np.lexsort((all_ids, -logits))
                kept = kept[: _nucleus(logits[kept], sampling[i], _mass(logits, sampling[i]))]
                tokens[i] = draw(logits[kept], kept, sampling[i], positions[rows[i]])
        return tokens

    def _candidates(
        self, own: npt.NDArray[np.float32], sampling: Sequence[Sampling], count: int
    ) -> Doubles:
        """[rows, 2 + 2 * count]: max, sum of exp((logit - max) / temperature), logits, ids."""
        out = np.zeros((len(own), 2 + 2 * count))
        out[:, 0], out[:, 2 : 2 + count] = -np.inf, -np.inf
        if own.shape[1]:
            kept = min(count, own.shape[1])
            values, ids = torch.from_numpy(own).topk(kept)
            out[:, 2 : 2 + kept], out[:, 2 + count : 2 + count + kept] = values, ids
            out[:, 2 + count :] += self._first_id
            out[:, 0] = out[:, 2]
            for i, s in enumerate(sampling):
                out[i, 1] = np.exp((own[i] - out[i, 0]) / s.temperature).sum()
        return out

    def _choose(self, every: Doubles, count: int, s: Sampling, position: int) -> int | None:
        """A token from every rank's candidates [world, 2 + 2 count]; None if they may not suffice."""
        values, ids = (
            every[:, 2 : 2 + count].ravel(),
            every[:, 2 + count :].ravel().astype(np.int64),
        )
        order = np.lexsort((ids, -values))
        values, ids = values[order], ids[order]
        # What a rank held back is at most its last candidate: above that, nothing is missing.
        held_back = [every[r, 1 + count] for r, n in enumerate(self._vocab_rows) if n > count]
        known = int((values > max(held_back, default=-np.inf)).sum())
        top = every[:, 0].max()
        mass = float((every[:, 1] * np.exp((every[:, 0] - top) / s.temperature)).sum())
        kept = _nucleus(values, s, mass)
        if kept > known and known < sum(self._vocab_rows):
            return None
        return draw(values[:kept], ids[:kept], s, position)

    def _gather_rows(self, own: npt.NDArray[np.float32]) -> Doubles:
        widest = max(self._vocab_rows)
        padded = np.full((len(own), widest), -np.inf, dtype=np.float32)
        padded[:, : own.shape[1]] = own
        every = self._comm.exchange_small(padded)
        pieces = [every[r, :, :n] for r, n in enumerate(self._vocab_rows)]
        return np.concatenate(pieces, axis=1).astype(np.float64)


def _mass(logits: Doubles, s: Sampling) -> float:
    return float(np.exp((logits - logits.max()) / s.temperature).sum())


def _nucleus(values: Doubles, s: Sampling, mass: float) -> int:
    """How many of the sorted `values` survive top-k, then top-p of what top-k left.

    `mass`: sum of exp((logit - max) / temperature) over the whole vocabulary. A result greater than
    len(values) means that more candidates are needed.
    """
    if s.top_k and (s.top_k > len(values) or s.top_p == 1):
        return s.top_k
    weights = np.exp((values - values[0]) / s.temperature)
    if s.top_k:
        weights = weights[: s.top_k]
        mass = float(weights.sum())
    if s.top_p == 1:
        return len(weights)
    reached = np.cumsum(weights) >= s.top_p * mass
    return int(reached.argmax()) + 1 if reached.any() else len(values) + 1


def draw(values: Doubles, ids: Ints, s: Sampling, position: int) -> int:
    """One of `ids` with probability softmax(values / temperature)."""
    return int(ids[perturb(values, ids, s, position).argmax()])


def perturb(values: npt.NDArray[np.floating], ids: Ints, s: Sampling, position: int) -> Doubles:
    """Logits / temperature + Gumbel noise that depends on (seed, position, id) only."""
    scores: Doubles = values.astype(np.float64) / s.temperature - np.log(
        -np.log(uniform(s.seed, position, ids))
    )
    return scores


def uniform(seed: int, position: int, ids: Ints) -> Doubles:
    """Numbers in (0, 1), one for each id: SplitMix64 (Steele et al. 2014) keyed by seed, position."""
    golden = 0x9E3779B97F4A7C15
    key = _mix_int(_mix_int(seed) + (position + 1) * golden)
    with np.errstate(over="ignore"):
        z = np.uint64(key) + (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(golden)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _mix_int(value: int) -> int:
    mask = (1 << 64) - 1
    z = value & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
