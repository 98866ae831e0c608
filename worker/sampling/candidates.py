"""The best tokens of each rank, and what they say about the best of all.

Everything here works on R rows at once.
"""

from collections.abc import Sequence

import numpy as np

from worker.comm.base import Floats
from worker.sampling.vocabulary import UNLIMITED, Doubles, Ints, Vocabulary


def candidates(own: Floats, count: int, vocabulary: Vocabulary) -> Doubles:
    """This rank's best `count` tokens: logits [R, 0, count] and ids [R, 1, count], best first.

    own: [R, own tokens] without NaN and +inf. A rank with fewer tokens fills up with -inf.
    """
    out = np.zeros((len(own), 2, count))
    out[:, 0] = -np.inf
    held = min(count, vocabulary.size)
    if held:
        values, columns = best(own, held)
        out[:, 0, :held] = values
        out[:, 1, :held] = columns + vocabulary.first_id
    return out


def best(logits: Floats, count: int) -> tuple[Floats, Ints]:
    """The `count` highest of each row, best first, and their columns: [R, count] each.

    Among equals the lowest column comes first; where they are -inf, any. No NaN, no +inf.
    """
    rows = np.arange(len(logits))[:, None]
    next_best = logits.shape[1] - count - 1
    if next_best < 0:
        order = np.argsort(-logits, axis=1, kind="stable")
        return logits[rows, order], order
    parted = np.argpartition(logits, next_best, axis=1)[:, next_best:]
    columns = np.sort(parted[:, 1:], axis=1)
    values = logits[rows, columns]
    order = np.argsort(-values, axis=1, kind="stable")
    values, columns = values[rows, order], columns[rows, order]
    left_out = logits[rows, parted[:, :1]]
    # Of several that equal the last, partitioning takes any.
    tied = (values[:, -1:] == left_out) & (left_out > -np.inf)
    for row in np.flatnonzero(tied):
        last = values[row, -1]
        better = int((values[row] > last).sum())
        columns[row, better:] = np.flatnonzero(logits[row] == last)[: count - better]
    return values, columns


def merge(values: Doubles, ids: Ints, incomplete: Sequence[int]) -> tuple[Doubles, Ints, Ints]:
    """Candidates of all ranks [world, R, count] in one order: values and ids [R, world * count].

    Each rank's are in order, and ranks hold ascending ids; -inf fills up. Also returned is how many
    of each row [R] are surely its best: ranks that are `incomplete` hold more than what they gave.
    """
    world, rows, count = values.shape
    values = values.transpose(1, 0, 2).reshape(rows, world * count)
    ids = ids.transpose(1, 0, 2).reshape(rows, world * count)
    order = np.argsort(-values, axis=1, kind="stable")
    at = np.arange(rows)[:, None]
    values, ids = values[at, order], ids[at, order]
    if not incomplete:
        return values, ids, np.full(rows, UNLIMITED)
    last_given = np.zeros(world * count, dtype=bool)
    last_given[[rank * count + count - 1 for rank in incomplete]] = True
    # Behind the last one that a rank gave, one that it did not give may come, unless it is -inf.
    ends = last_given[order] & (values > -np.inf)
    return values, ids, np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, UNLIMITED)
