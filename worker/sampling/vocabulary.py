"""How the vocabulary is cut over the ranks, and what the ranks tell each other about their parts.

Logits never leave a rank as they are, but for the few rows that `whole_rows` is asked for.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from worker.comm.base import Communicator, Floats

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Vocabulary:
    """Which token ids each rank holds, by virtual shard."""

    def __init__(self, rank: int, shards: Sequence[Sequence[range]]) -> None:
        """`shards`: token ids of each virtual shard of each rank; in order, together all ids."""
        held = [[run for run in runs if run] for runs in shards]
        lengths = [[len(run) for run in runs] for runs in held]
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

    def own(self, ids: Ints) -> npt.NDArray[np.bool_]:
        """Which of these token ids are this rank's."""
        return (ids >= self.first_id) & (ids < self.first_id + self.size)


def gather(comm: Communicator, *arrays: Doubles) -> list[Doubles]:
    """All-gather of several arrays in one collective: [world, *shape] of each."""
    joined = arrays[0] if len(arrays) == 1 else np.concatenate([a.ravel() for a in arrays])
    every = np.asarray(comm.exchange_small(joined), dtype=np.float64)
    if len(arrays) == 1:
        return [every]
    ends = np.cumsum([a.size for a in arrays])
    pieces = np.split(every, ends[:-1], axis=1)
    return [p.reshape(comm.world, *a.shape) for p, a in zip(pieces, arrays, strict=True)]


def whole_rows(comm: Communicator, vocabulary: Vocabulary, own: Floats) -> Floats:
    """Logits [R, own tokens] of every rank -> [R, vocabulary]."""
    padded = np.zeros((len(own), max(vocabulary.sizes)), dtype=np.float32)
    padded[:, : own.shape[1]] = own
    every = np.asarray(comm.exchange_small(padded), dtype=np.float32)
    return np.concatenate(
        [rows[:, :size] for rows, size in zip(every, vocabulary.sizes, strict=True)], axis=1
    )


def partial_sums(own: Floats, temperature: Doubles, vocabulary: Vocabulary) -> Doubles:
    """What `softmax_sums` needs of this rank: [R, virtual shards, 2].

    own: [R, own tokens], no NaN and no +inf. For each virtual shard its highest logit, and the sum
    of exp((logit - highest) / temperature). By virtual shard, so that the bits of the total do not
    depend on how many ranks there are.
    """
    sums = np.zeros((len(own), max(vocabulary.shards_per_rank), 2))
    sums[:, :, 0] = -np.inf
    if own.size:
        highest = np.maximum.reduceat(own, vocabulary.shard_starts, axis=1)
        offsets = np.repeat(finite(highest), vocabulary.shard_lengths, axis=1)
        weights = np.subtract(own, offsets, dtype=np.float64)
        weights /= temperature[:, None]
        np.exp(weights, weights)
        count = highest.shape[1]
        sums[:, :count, 0] = highest
        sums[:, :count, 1] = np.add.reduceat(weights, vocabulary.shard_starts, axis=1)
    return sums


def softmax_sums(
    every: Doubles, temperature: Doubles, vocabulary: Vocabulary
) -> tuple[Doubles, Doubles]:
    """The partial sums of all ranks [world, R, virtual shards, 2] put together.

    Returns the highest logit [R] and the sum of exp((logit - highest) / temperature) [R]. Where a
    row has no finite logit, the first is 0 and the second too.
    """
    in_order = [of_rank[:, :n] for of_rank, n in zip(every, vocabulary.shards_per_rank, strict=True)]
    shards = np.concatenate(in_order, axis=1)
    highest = finite(shards[:, :, 0].max(axis=1))
    scales = np.exp((shards[:, :, 0] - highest[:, None]) / temperature[:, None])
    return highest, (shards[:, :, 1] * scales).sum(axis=1)


def finite[T: np.floating](values: npt.NDArray[T]) -> npt.NDArray[T]:
    return values
