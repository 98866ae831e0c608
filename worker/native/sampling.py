"""What sampling needs of rows of logits, by the native library: definitions in worker/sampling/."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


BEST, NOISY_BEST, TOP, TOP_AND_SUMS, WHOLE = range(5)
"""What can be wanted of a row of logits: its best one; the best one with noise, if the best is finite;
so many of its best ones; these and its softmax sums; or the logits as they are."""

_ROW = np.dtype([("what", "i4"), ("whole", "i4"), ("temperature", "f8"), ("key", "u8")])


@dataclass(frozen=True)
class Wanted:
    """What is wanted of each of B rows of logits: struct Wanted of program.h."""

    rows: npt.NDArray[np.void]
    """[B]"""
    whole: Sequence[int] = ()
    """Those whose logits are wanted, ascending."""
    count: int = 0
    """Of the best ones; 0 if no row wants them."""
    address: int = field(init=False)
    """Where the rows are."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", self.rows.ctypes.data)

    @classmethod
    def of(cls, rows: Sequence[tuple[int, float, int]], count: int = 0) -> "Wanted":
        """rows: what, the temperature of noise or sums, the key of noise."""
        filled: list[tuple[int, int, float, int]] = []
        whole: list[int] = []
        for row, (what, temperature, key) in enumerate(rows):
            filled.append((what, len(whole), temperature, key))
            if what == WHOLE:
                whole.append(row)
        return cls(np.array(filled, dtype=_ROW), whole, count)


@dataclass(frozen=True)
class HeadAnswer:
    """What was wanted of B rows of logits; where something was not, it is not there or anything."""

    best: Doubles
    """[B, 2]: the best logit, or the best with noise, and its column."""
    top: Doubles
    """[B, 2, count]: the best logits, -inf where there are no more, and their token ids, which ascend."""
    sums: Doubles
    """[B, virtual shards, 2]: the highest, and the sum of exp((logit - highest) / temperature)."""
    logits: Floats
    """[whole rows, columns]"""


class NativeRows:
    """Works on rows of logits [R, M] float32, whose elements stand side by side."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def top(self, logits: Floats, count: int) -> tuple[Floats, Ints]:
        """The `count` highest of each row and their columns, which ascend: [R, count] each.

        Without NaN and +inf; a row with fewer fills up with -inf.
        """
        rows, size = logits.shape
        values = np.empty((rows, count), dtype=np.float32)
        columns = np.empty((rows, count), dtype=np.int64)
        self._library.tps_top(
            *_addressed(logits), rows, size, count, values.ctypes.data, columns.ctypes.data
        )
        return values, columns

    def softmax_sums(
        self, logits: Floats, temperature: Doubles, starts: Ints, lengths: Ints
    ) -> Doubles:
        """Of each run of columns the highest and the sum of exp((logit - highest) / temperature).

        temperature: [R, 1]; starts, lengths: [S]. Returns [R, S, 2].
        """
        temperature = np.ascontiguousarray(temperature, dtype=np.float64)
        sums = np.empty((len(logits), len(starts), 2))
        self._library.tps_softmax_sums(
            *_addressed(logits),
            len(logits),
            temperature.ctypes.data,
            starts.ctypes.data,
            lengths.ctypes.data,
            len(starts),
            sums.ctypes.data,
        )
        return sums

    def gumbel_best(
        self,
        logits: Floats,
        temperature: Doubles,
        keys: npt.NDArray[np.uint64],
        first_id: int,
    ) -> Doubles:
        """The highest logit / temperature + noise of each row and its column: [R, 2].

        temperature, keys: [R, 1].
        """
        best = np.empty((len(logits), 2))
        temperature = np.ascontiguousarray(temperature, dtype=np.float64)
        keys = np.ascontiguousarray(keys)
        self._library.tps_gumbel_best(
            *_addressed(logits),
            *logits.shape,
            temperature.ctypes.data,
            keys.ctypes.data,
            first_id,
            best.ctypes.data,
        )
        return best


def _addressed(logits: Floats) -> tuple[int, int]:
    """Where rows begin, and how many floats further on the next one does."""
    assert logits.strides[1] == logits.itemsize, "the elements of a row stand side by side"
    return logits.ctypes.data, logits.strides[0] // logits.itemsize
