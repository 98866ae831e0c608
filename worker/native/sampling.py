"""What sampling needs of rows of logits, by the native library: definitions in worker/sampling/."""

import ctypes

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class NativeRows:
    """Works on rows of logits [R, M] float32, whose elements stand side by side."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def top(self, logits: Floats, count: int) -> tuple[Floats, Ints]:
        """The `count` highest of each row and their columns, which ascend: [R, count] each."""
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
        columns: Doubles,
    ) -> Doubles:
        """The highest logit / temperature + noise of each row and its column: [R, 2].

        temperature, keys: [R, 1]; columns [R]: of a high logit of each row, which speeds it up.
        """
        best = np.empty((len(logits), 2))
        best[:, 1] = columns
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
