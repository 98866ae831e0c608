"""How the vocabulary is cut over the ranks, and what the ranks tell each other about their parts.

Logits never leave a rank as they are, but for the few rows that `whole_rows` is asked for.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from worker.comm.base import Communicator, Floats
from worker.native.sampling import NativeRows

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

UNLIMITED = sys.maxsize
"""More tokens than any vocabulary has."""


@dataclass(frozen=True)
class StepLogits:
    """What a forward pass gives the sampler; valid until the next one."""

    logits: Floats
    """[W, own tokens]"""
    best: Doubles
    """[B, 2]: the highest of each row and its column, the first among equals; NaN is the highest. Of
    rows without logits the one that is wanted, which may be that with noise."""
    whole: Sequence[int]
    """W of the B rows, ascending: those whose logits are there."""
    top: Doubles = field(default_factory=lambda: np.empty((0, 0, 0)))
    """[B, 2, count]: what `candidates` gives, of rows without logits."""
    sums: Doubles = field(default_factory=lambda: np.empty((0, 0, 0)))
    """[B, virtual shards that hold tokens, 2]: what `partial_sums` gives, likewise."""
    again: Callable[[Sequence[int]], Floats] | None = None
    """Logits of rows that have none here, ascending."""

    def rows(self, rows: Sequence[int]) -> Floats:
        """Logits [R, own tokens] of some rows, ascending, that have them; no copy if it is all of these."""
        if len(rows) == len(self.whole):
            return self.logits
        return self.logits[np.searchsorted(self.whole, rows)]

    def made_whole(self, rows: Sequence[int]) -> Floats:
        """Logits [R, own tokens] of any rows, ascending."""
        missing = [row for row in rows if row not in self.whole]
        if not missing:
            return self.rows(rows)
        assert self.again is not None, "rows without logits can be computed again"
        if len(missing) == len(rows):
            return self.again(missing)
        logits = np.empty((len(rows), self.logits.shape[1]), dtype=np.float32)
        there = np.isin(rows, self.whole)
        logits[there] = self.rows([row for row in rows if row in self.whole])
        logits[~there] = self.again(missing)
        return logits


class Vocabulary:
    """Which token ids each rank holds, by virtual shard, and what works on rows of this rank's logits."""

    def __init__(
        self, rank: int, shards: Sequence[Sequence[range]], native: NativeRows | None = None
    ) -> None:
        """`shards`: token ids of each virtual shard of each rank; in order, together all ids.

        native: None works on rows in numpy; the same for all ranks.
        """
        self.native = native
        lengths = [[len(ids) for ids in of_rank if ids] for of_rank in shards]
        self.sizes = [sum(of_rank) for of_rank in lengths]
        """Tokens of each rank."""
        self.first_id = sum(self.sizes[:rank])
        """Token id of this rank's first logit."""
        self.size = self.sizes[rank]
        """Tokens of this rank."""
        self.shards_per_rank = [len(of_rank) for of_rank in lengths]
        """Virtual shards of each rank that hold tokens."""
        self.shard_lengths = np.array(lengths[rank], dtype=np.int64)
        """Tokens of each of this rank's virtual shards that hold any."""
        self.shard_starts = np.cumsum(self.shard_lengths) - self.shard_lengths
        """Where they begin among this rank's logits."""

    def holds(self, ids: Ints) -> Bools:
        """Which of these token ids are this rank's."""
        return (ids >= self.first_id) & (ids < self.first_id + self.size)

    def own_columns(self, ids: Ints) -> Ints:
        """Where this rank's logits have these token ids; other ranks' ids are left out."""
        return ids[self.holds(ids)] - self.first_id


def gather(comm: Communicator, *arrays: Doubles) -> list[Doubles]:
    """All-gather of several arrays in one collective: [world, *shape] of each."""
    if len(arrays) == 1:
        return [np.asarray(comm.exchange_small(arrays[0]), dtype=np.float64)]
    joined = np.concatenate([array.ravel() for array in arrays])
    every = np.asarray(comm.exchange_small(joined), dtype=np.float64)
    gathered, start = [], 0
    for array in arrays:
        piece = every[:, start : start + array.size]
        gathered.append(piece.reshape(comm.world, *array.shape))
        start += array.size
    return gathered


def whole_rows(comm: Communicator, vocabulary: Vocabulary, own: Floats) -> Floats:
    """Logits [R, own tokens] of every rank -> [R, vocabulary]."""
    padded = np.zeros((len(own), max(vocabulary.sizes)), dtype=np.float32)
    padded[:, : own.shape[1]] = own
    every = np.asarray(comm.exchange_small(padded), dtype=np.float32)
    return np.concatenate(
        [rows[:, :size] for rows, size in zip(every, vocabulary.sizes, strict=True)], axis=1
    )


def partial_sums(own: Floats, temperature: Doubles, vocabulary: Vocabulary) -> Doubles:
    """What `softmax_sums` needs to know of this rank: [R, virtual shards, 2].

    own: [R, own tokens] without NaN and +inf; temperature: [R, 1]. For each virtual shard it is the
    highest logit, and the sum of exp((logit - highest) / temperature). By virtual shard, because then
    the bits of the total do not depend on how many ranks there are.
    """
    sums = np.zeros((len(own), max(vocabulary.shards_per_rank), 2))
    sums[:, :, 0] = -np.inf
    if own.size and vocabulary.native is not None:
        starts, lengths = vocabulary.shard_starts, vocabulary.shard_lengths
        sums[:, : len(starts)] = vocabulary.native.softmax_sums(own, temperature, starts, lengths)
    elif own.size:
        highest = np.maximum.reduceat(own, vocabulary.shard_starts, axis=1)
        # Where there is nothing but -inf, -inf is to be taken off 0 and not off itself.
        anchors = np.where(highest == -np.inf, 0, highest)
        weights = np.repeat(anchors.astype(np.float64), vocabulary.shard_lengths, axis=1)
        np.subtract(own, weights, out=weights)
        weights /= temperature
        np.exp(weights, out=weights)
        count = highest.shape[1]
        sums[:, :count, 0] = highest
        sums[:, :count, 1] = np.add.reduceat(weights, vocabulary.shard_starts, axis=1)
    return sums


def softmax_sums(
    every: Doubles, temperature: Doubles, vocabulary: Vocabulary
) -> tuple[Doubles, Doubles]:
    """The partial sums of all ranks [world, R, virtual shards, 2] put together.

    Returns the highest logit and the sum of exp((logit - highest) / temperature) over the whole
    vocabulary, [R, 1] each; 0 and 0 where there is nothing but -inf.
    """
    in_order = [sums[:, :n] for sums, n in zip(every, vocabulary.shards_per_rank, strict=True)]
    shards = np.concatenate(in_order, axis=1)
    highest = shards[:, :, 0].max(axis=1, keepdims=True)
    highest[highest == -np.inf] = 0
    scales = np.exp((shards[:, :, 0] - highest) / temperature)
    return highest, (shards[:, :, 1] * scales).sum(axis=1, keepdims=True)


def best_of(logits: Floats) -> Doubles:
    """The highest of each row [B, M] and its column: [B, 2], as in StepLogits."""
    found = np.empty((len(logits), 2))
    if logits.size:
        columns = logits.argmax(axis=1)
        found[:, 0] = logits[np.arange(len(logits)), columns]
        found[:, 1] = columns
    else:
        found[:] = -np.inf, 0
    return found
