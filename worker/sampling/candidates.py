"""The best tokens of each rank, and what they say about the best of all.

Everything here works on R rows at once.
"""

from collections.abc import Sequence

import numpy as np

from worker.comm.base import Floats
from worker.sampling.vocabulary import UNLIMITED, Doubles, Ints, Vocabulary

_SMALLEST_GROUP, _LARGEST_GROUP = 8, 32


def candidates(own: Floats, count: int, vocabulary: Vocabulary) -> Doubles:
    """This rank's `count` best tokens: logits [R, 0, :] and ids [R, 1, :], ids ascending.

    own: [R, own tokens] without NaN and +inf. A rank with fewer tokens fills up with -inf.
    """
    out = np.zeros((len(own), 2, count))
    out[:, 0] = -np.inf
    held = min(count, vocabulary.size)
    if held:
        native = vocabulary.native
        values, columns = best(own, held) if native is None else native.top(own, held)
        out[:, 0, :held] = values
        np.add(columns, vocabulary.first_id, out=out[:, 1, :held])
    return out


def best(logits: Floats, count: int) -> tuple[Floats, Ints]:
    """The `count` highest logits of each row and their columns, which ascend: [R, count] each.

    Among equals the lowest columns are taken; where they are -inf, any. No NaN, no +inf.
    """
    if count == logits.shape[1]:
        return logits, np.broadcast_to(np.arange(count), logits.shape)
    rows = np.arange(len(logits))[:, None]
    pool = _pool(logits, count + 1)
    narrowed = logits if pool is None else logits[rows, pool]
    next_best = narrowed.shape[1] - count - 1
    parted = narrowed.argpartition(next_best, axis=1)[:, next_best:]
    columns = parted[:, 1:].copy() if pool is None else pool[rows, parted[:, 1:]]
    columns.sort(axis=1)
    # Of several that equal the last one taken, any may have been.
    values = logits[rows, columns]
    last = values.min(axis=1)
    left_out = narrowed[rows[:, 0], parted[:, 0]]
    for row in np.flatnonzero((left_out == last) & (last > -np.inf)):
        better = np.flatnonzero(logits[row] > last[row])
        equal = np.flatnonzero(logits[row] == last[row])
        columns[row] = np.sort(np.concatenate([better, equal[: count - len(better)]]))
        values[row] = logits[row, columns[row]]
    return values, columns


def _pool(logits: Floats, count: int) -> Ints | None:
    """Columns [R, M] among which are `count` with the row's highest logits; None: all columns.

    Groups of columns are compared by their maxima, which are quick to find: what is among the best
    `count` of the row, or as good, is in the best `count` groups. Takes a third of the time for
    32 rows of 32,000; narrow rows would not gain.
    """
    width, size = logits.shape[1], 1
    while size < _LARGEST_GROUP and (2 * size) ** 2 * count <= width:
        size *= 2
    if size < _SMALLEST_GROUP:
        return None
    groups = width // size  # group g: columns g, g + groups, g + 2 * groups, ...
    maxima = logits[:, : size * groups].reshape(-1, size, groups).max(axis=1)
    chosen = maxima.argpartition(groups - count, axis=1)[:, groups - count :]
    pool = (chosen[:, None] + groups * np.arange(size)[:, None]).reshape(len(logits), -1)
    rest = np.arange(size * groups, width)
    return np.concatenate([pool, np.broadcast_to(rest, (len(pool), len(rest)))], axis=1)


def merge(every: Doubles, incomplete: Sequence[int]) -> tuple[Doubles, Ints, Ints]:
    """The candidates of all ranks [world, R, 2, count], best first: logits, ids [R, world * count].

    Among equals the lowest id comes first. Also how many of each row are surely the best of all
    tokens: [R, 1]. The ranks `incomplete` hold more tokens than they gave.
    """
    world, rows, _, count = every.shape
    values, ids = every.transpose(2, 1, 0, 3).reshape(2, rows, world * count)
    order = (-values).argsort(axis=1, kind="stable")  # ids ascend: within a rank, and by rank
    at = np.arange(rows)[:, None]
    values, in_order = values[at, order], ids[at, order].astype(np.int64)
    known = np.full((rows, 1), UNLIMITED)
    if count:
        for rank in incomplete:
            # After the last one that a rank gave may come one that it did not give.
            given = order // count == rank
            last = world * count - given[:, ::-1].argmax(axis=1, keepdims=True)
            known = np.minimum(known, np.where(values[at, last - 1] > -np.inf, last, UNLIMITED))
    return values, in_order, known
