"""The library's functions with their types, and the objects that live in it.

Everything that the library makes belongs to a Python object here, which gives it back when it goes.
"""

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shared.errors import ConfigError
from shared.worker_messages import SequenceStep
from worker.native.library import load_library
from worker.native.sampling import HeadAnswer, Wanted

GROUP = 32
"""Consecutive inputs of a weight that share a scale; inputs are filled up to whole groups."""
ROW_BLOCK = 16
"""Consecutive outputs of a weight that are kept together; outputs are filled up to whole blocks."""
MAX_HEAD_DIM = 256
WEIGHTS_FOR_THREADS = 16 << 20
"""Bytes. A smaller model's step takes less than a millisecond, which one thread does best: two gain
little, and lose much when the coordinator takes the core of one of them."""

FORMATS = {"fp32": 0, "bf16": 1, "fp16": 2, "int8": 3, "int4": 4}
TORCH_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Int32s = npt.NDArray[np.int32]
Float64s = npt.NDArray[np.float64]

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "tps_isa": (ctypes.c_char_p, ()),
    "tps_isa_problem": (ctypes.c_char_p, ()),
    "tps_pool_new": (_POINTER, (_INT, _INT)),
    "tps_pool_free": (None, (_POINTER,)),
    "tps_arena_new": (_POINTER, ()),
    "tps_arena_free": (None, (_POINTER,)),
    "tps_weight_new": (_POINTER, (_POINTER, _INT, _INT, _INT, _POINTER, _POINTER, _POINTER, _INT)),
    "tps_weight_free": (None, (_POINTER,)),
    "tps_weight_data": (_POINTER, (_POINTER,)),
    "tps_weight_bytes": (ctypes.c_size_t, (_POINTER,)),
    "tps_weight_pack": (None, (_POINTER, _POINTER, _POINTER, _INT, _POINTER)),
    "tps_kv_new": (_POINTER, (_INT, _INT, _INT, _INT, _INT)),
    "tps_kv_free": (None, (_POINTER,)),
    "tps_kv_copy": (None, (_POINTER, _INT, _INT)),
    "tps_top": (None, (_POINTER, ctypes.c_size_t, _INT, _INT, _INT, _POINTER, _POINTER)),
    "tps_softmax_sums": (
        None,
        (_POINTER, ctypes.c_size_t, _INT, _POINTER, _POINTER, _POINTER, _INT, _POINTER),
    ),
    "tps_gumbel_best": (
        None,
        (_POINTER, ctypes.c_size_t, _INT, _INT, _POINTER, _POINTER, ctypes.c_uint64, _POINTER),
    ),
    "tps_program_new": (_POINTER, (_POINTER, _INT, _POINTER)),
    "tps_program_free": (None, (_POINTER,)),
    "tps_program_add_buffer": (_INT, (_POINTER, _INT)),
    "tps_program_add_activations": (_INT, (_POINTER, _INT, _INT)),
    "tps_program_embed": (None, (_POINTER, _POINTER, _INT, _INT, _INT)),
    "tps_program_add_norm": (
        None,
        (
            *(_POINTER, _INT, _INT, _INT, _POINTER, _INT, ctypes.c_float),
            *(_INT, _INT, _POINTER, _POINTER, _INT),
        ),
    ),
    "tps_program_sum_hidden": (
        None,
        (
            *(_POINTER, _INT, _INT, _POINTER, _INT, ctypes.c_float),
            *(_INT, _POINTER, _POINTER, _INT),
        ),
    ),
    "tps_program_linear": (None, (_POINTER, _INT, _INT, _POINTER, _INT)),
    "tps_program_head": (None, (_POINTER, _INT, _POINTER, ctypes.c_uint64, _POINTER, _INT)),
    "tps_program_add_bias": (None, (_POINTER, _INT, _POINTER)),
    "tps_program_rope_store": (
        None,
        (
            *(_POINTER, _INT, _INT, _INT, _POINTER, _POINTER, ctypes.c_float),
            *(_POINTER, _POINTER, _POINTER, _INT),
        ),
    ),
    "tps_program_attention": (
        None,
        (
            *(_POINTER, _INT, _INT, _POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _INT),
            ctypes.c_float,
        ),
    ),
    "tps_program_swiglu": (None, (_POINTER, _INT, _INT, _INT)),
    "tps_program_probe": (None, (_POINTER, _INT, _INT)),
    "tps_program_run": (_INT, (_POINTER, _POINTER, _INT)),
    "tps_program_floats": (_POINTER, (_POINTER, _INT)),
    "tps_program_comm_seconds": (ctypes.c_double, (_POINTER,)),
}


@cache
def native_library() -> ctypes.CDLL | None:
    """The library, its functions' types declared. Raises ConfigError if it cannot be used."""
    library = load_library()
    if library is None:
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if library.tps_isa() is None:
        raise ConfigError(library.tps_isa_problem().decode())
    return library


def isa_of(library: ctypes.CDLL) -> str:
    """The instruction set in use."""
    name: bytes = library.tps_isa()
    return name.decode()


def made(handle: int | None) -> int:
    """An object of the library. Raises MemoryError where it could not be made."""
    if handle is None:
        raise MemoryError("the native library got no memory from the system")
    return handle


def int32s(numbers: Sequence[int]) -> Int32s:
    """As the library reads them."""
    return np.array(numbers, dtype=np.int32)


def filled_up(count: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-count // unit) * unit


def groups_of(columns: int) -> int:
    """Groups that so many inputs take."""
    return -(-columns // GROUP)


class Pool:
    """The threads of this worker."""

    def __init__(
        self,
        library: ctypes.CDLL,
        threads: int,
        *,
        crowded: bool,
        from_bytes: int = WEIGHTS_FOR_THREADS,
    ) -> None:
        """`crowded`: with other workers', more threads compute on this host than it has cores.

        Who waits then gives way sooner. Models with less than `from_bytes` of weights use one thread.
        """
        self.library, self.from_bytes = library, from_bytes
        self.handle = made(library.tps_pool_new(threads, crowded))
        weakref.finalize(self, library.tps_pool_free, self.handle)


class Arena:
    """Memory for the weights of one model."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.handle = made(library.tps_arena_new())
        weakref.finalize(self, library.tps_arena_free, self.handle)


class Matrix:
    """A packed weight: struct Weight of tensors.h."""

    def __init__(
        self,
        library: ctypes.CDLL,
        arena: Arena,
        rows: int,
        dtype: str,
        widths: Sequence[int],
        additions: Sequence[int],
        roots: Sequence[int],
    ) -> None:
        """[rows, sum of widths], zeros; of each of its segments the rest says what is summed."""
        # Held by names, because the library gets nothing but addresses.
        columns, to_add, to_root = int32s(widths), int32s(additions), int32s(roots)
        self._library, self._columns = library, columns
        self.dtype, self.rows, self.roots = dtype, rows, 1 + max(roots)
        self._arena = arena  # must live as long as this does
        self.handle = made(
            library.tps_weight_new(
                arena.handle,
                FORMATS[dtype],
                self.rows,
                len(widths),
                columns.ctypes.data,
                to_add.ctypes.data,
                to_root.ctypes.data,
                self.roots,
            )
        )
        weakref.finalize(self, library.tps_weight_free, self.handle)
        self.bytes: int = library.tps_weight_bytes(self.handle)
        self.address: int = library.tps_weight_data(self.handle) or 0
        """Where they are, once packed."""

    def pack(self, pool: Pool, source: torch.Tensor) -> None:
        """Fill it with source [rows, sum of widths]."""
        source = source.contiguous()
        self._library.tps_weight_pack(
            pool.handle,
            self.handle,
            source.data_ptr(),
            TORCH_FORMATS[source.dtype],
            self._columns.ctypes.data,
        )

    @property
    def padded_rows(self) -> int:
        """Its outputs, filled up to whole blocks."""
        return filled_up(self.rows, ROW_BLOCK)

    @property
    def weight_offset(self) -> int:
        """What was added to its numbers to make them unsigned; 0: they are floats."""
        return {"int8": 128, "int4": 8}.get(self.dtype, 0)


class _Step(ctypes.Structure):
    _fields_ = (
        ("tokens", ctypes.c_int32),
        ("sequence_count", ctypes.c_int32),
        ("logit_count", ctypes.c_int32),
        ("ids", ctypes.c_void_p),
        ("sequences", ctypes.c_void_p),
        ("logit_rows", ctypes.c_void_p),
        ("wanted", ctypes.c_void_p),
        ("best", ctypes.c_void_p),
        ("top_count", ctypes.c_int32),
        ("top", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("logit_stride", ctypes.c_size_t),
        ("pooled", ctypes.c_void_p),
        ("pooled_count", ctypes.c_int32),
    )


_SEQUENCE = np.dtype(
    [("first", "i4"), ("count", "i4"), ("start", "i4"), ("padding", "i4"), ("blocks", "u8")]
)
_POOLED = np.dtype([("first", "i4"), ("count", "i4"), ("sum", "u8")])


_NOTHING: npt.NDArray[np.float64] = np.empty((0, 0, 0))
_NO_LOGITS: npt.NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)


class StepArrays:
    """One step as the library reads it: struct Step of program.h. Its arrays are used again."""

    def __init__(self) -> None:
        self._struct = _Step()
        self.address = ctypes.addressof(self._struct)
        self.tokens = 0
        """Of the step that was filled in last."""
        self._capacity = self._sequences = 0
        self._table = np.empty(0, dtype=np.int32)
        self._table_address = 0
        self._logit_rows = np.empty(0, dtype=np.int32)
        self._best = np.empty((0, 2))

    def fill(
        self,
        sequences: Sequence[SequenceStep],
        last_tokens: npt.NDArray[np.int64],
        sums: Mapping[int, Float64s],
        *,
        every_token: bool = False,
    ) -> int:
        """Describes a step. Returns B, how many rows of logits it has.

        sums: by slot, where hidden states of sequences whose mean is wanted are added.
        every_token: B are all tokens of the step, not the last ones of sequences that want a token.
        """
        ids: list[int] = []
        rows: list[tuple[int, int, int, int, int]] = []
        logit_rows: list[int] = []
        pooled: list[tuple[int, int, int]] = []
        table = b"".join([s.blocks for s in sequences])
        self._reserve(len(sequences), len(table) // 4)
        at = self._table_address
        for s in sequences:
            first = len(ids)
            if s.tokens:
                ids += s.tokens
            else:
                ids.append(int(last_tokens[s.slot]))
            rows.append((first, len(ids) - first, s.start, 0, at))
            at += len(s.blocks)
            if s.sampling is not None:
                logit_rows.append(len(ids) - 1)
            if s.pooled:
                pooled.append((first, len(ids) - first, sums[s.slot].ctypes.data))
        if every_token:
            logit_rows = list(range(len(ids)))
        tokens, wanted = len(ids), len(logit_rows)
        self._reserve_tokens(tokens)
        if wanted > len(self._logit_rows):
            self._logit_rows = np.empty(2 * wanted, dtype=np.int32)
            self._struct.logit_rows = self._logit_rows.ctypes.data
        self._table[: len(table) // 4] = np.frombuffer(table, dtype="<i4")
        self._ids[:tokens] = ids
        self._rows[: len(rows)] = rows
        self._logit_rows[:wanted] = logit_rows
        step = self._struct
        self.tokens = step.tokens = tokens
        step.sequence_count, step.logit_count = len(rows), wanted
        self._pooled = np.array(pooled, dtype=_POOLED)
        step.pooled, step.pooled_count = self._pooled.ctypes.data, len(pooled)
        return wanted

    def ask(self, wanted: Wanted, shards: int, columns: int) -> HeadAnswer:
        """Says what is wanted of the rows of logits, and where the library is to put it.

        shards: virtual shards that hold tokens. columns: of a whole row.
        """
        step, rows, whole = self._struct, len(wanted.rows), wanted.whole
        if rows > len(self._best):
            self._best = np.empty((2 * rows, 2))
            self._struct.best = self._best.ctypes.data
        top = sums = _NOTHING
        if wanted.count:
            top, sums = np.empty((rows, 2, wanted.count)), np.empty((rows, shards, 2))
            step.top, step.sums = top.ctypes.data, sums.ctypes.data
        logits = _NO_LOGITS
        if whole:
            logits = np.empty((len(whole), columns), dtype=np.float32)
            step.logits, step.logit_stride = logits.ctypes.data, columns
        step.wanted, step.top_count = wanted.address, wanted.count
        return HeadAnswer(self._best[:rows], top, sums, logits)

    def _reserve_tokens(self, tokens: int) -> None:
        if tokens > self._capacity:
            self._capacity = 2 * tokens
            self._ids = np.empty(self._capacity, dtype=np.int32)
            self._struct.ids = self._ids.ctypes.data

    def _reserve(self, sequences: int, blocks: int) -> None:
        if sequences > self._sequences:
            self._sequences = 2 * sequences
            self._rows = np.empty(self._sequences, dtype=_SEQUENCE)
            self._struct.sequences = self._rows.ctypes.data
        if blocks > len(self._table):
            self._table = np.empty(2 * blocks, dtype=np.int32)
            self._table_address = self._table.ctypes.data
