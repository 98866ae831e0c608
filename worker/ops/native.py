"""The decoder's arithmetic in the native library: packs weights, records a forward pass, runs steps.

The model's operations are recorded as calls of the library, with values in place of buffers. When the
pass is complete, values get buffers (those that are never alive at the same time share one) and the
calls are made, once. A step is then one call of the library, collectives in shared memory included;
with another communicator it comes back at each collective.
"""

import ctypes
import dataclasses
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from shared.errors import ConfigError
from shared.messages import BLOCK_TOKENS
from shared.model_config import ModelConfig
from shared.sharding import ReductionTree, aligned_subtrees
from shared.worker_messages import SequenceStep
from worker.comm.base import Communicator, Floats
from worker.native.api import (
    FORMATS,
    GROUP,
    MAX_HEAD_DIM,
    ROW_BLOCK,
    TORCH_FORMATS,
    Arena,
    Int32s,
    Matrix,
    Pool,
    StepArrays,
    filled_up,
    groups_of,
    int32s,
    made,
)
from worker.native.sampling import BEST, WHOLE, HeadAnswer, Wanted
from worker.ops.base import NO_SUMS, HeadLayout, HeadNorms, RopeTable, Source
from worker.sampling.vocabulary import Doubles, Ints, StepLogits
from worker.shard_cache import ShardCache

_KV_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
_INT8_SCALE_BYTES = 4
_TO_BUFFER, _TO_PEERS, _TO_HOST = range(3)
_DONE = -1


def why_not_native(config: ModelConfig) -> str | None:
    """What keeps the native kernels from computing this model; None: nothing."""
    if config.head_dim > MAX_HEAD_DIM:
        return f"head_dim {config.head_dim} is more than {MAX_HEAD_DIM}"
    return None


@dataclasses.dataclass(eq=False)
class Value:
    """What an operation writes: a row of floats for each token of the step."""

    width: int
    """Floats of a row, filled up to what the next operation wants."""
    columns: int
    """Those that mean something."""
    weight_offset: int | None = None
    """Of the weight it is multiplied with, and quantised for; None: it is no linear's input."""
    in_buffer: bool = True
    """Otherwise it is in the communicator's shared memory, or looked at and forgotten."""


class Recorder:
    """Calls of the library, made when it is known which values may share a buffer."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._calls: list[tuple[str, tuple[Any, ...]]] = []
        self._kept: list[object] = []

    def call(self, name: str, *arguments: Any) -> None:
        """tps_program_<name>(program, *arguments), each value replaced by its buffer's number."""
        self._calls.append((name, arguments))

    def keep(self, *things: object) -> None:
        """The library points into these as long as the program is used."""
        self._kept += things

    def make(self, program: int) -> dict[Value, int]:
        """Make all calls. Returns the buffer of each value."""
        last_use = {
            argument: index
            for index, (_, arguments) in enumerate(self._calls)
            for argument in arguments
            if isinstance(argument, Value)
        }
        buffers: dict[Value, int] = {}
        free: dict[tuple[int, int | None], list[int]] = {}
        for index, (name, arguments) in enumerate(self._calls):
            values = [a for a in arguments if isinstance(a, Value)]
            for value in values:
                if value not in buffers:
                    unused = free.get((value.width, value.weight_offset))
                    buffers[value] = unused.pop() if unused else self._add(program, value)
            function = getattr(self._library, f"tps_program_{name}")
            function(program, *[buffers[a] if isinstance(a, Value) else a for a in arguments])
            for value in dict.fromkeys(values):
                if last_use[value] == index:
                    key = (value.width, value.weight_offset)
                    free.setdefault(key, []).append(buffers[value])
        self._calls.clear()
        return buffers

    def _add(self, program: int, value: Value) -> int:
        if value.weight_offset is None:
            number = self._library.tps_program_add_buffer(program, value.width)
        else:
            number = self._library.tps_program_add_activations(
                program, value.width // GROUP, value.weight_offset
            )
        return int(number)


class NativeOps:
    """See Ops."""

    def __init__(
        self,
        comm: Communicator,
        pool: Pool,
        owned: Sequence[range],
        dtype: str,
        kv_dtype: str,
        sliding_window: int | None,
        packers: Pool | None = None,
        progress: Callable[[int], None] = lambda _: None,
        cache: ShardCache | None = None,
    ) -> None:
        """`owned`: the virtual shards of every rank. dtype, kv_dtype: keys of FORMATS.

        pool: computes steps. packers: pack weights, else `pool` does. progress: is told the weight
        bytes so far with every weight. cache: of packed weights.
        """
        self._cache = cache
        self._packers = packers or pool
        self._progress = progress
        self._library, self._comm, self._pool = pool.library, comm, pool
        self._dtype, self._kv_dtype, self._window = dtype, kv_dtype, sliding_window or 0
        self._mine = owned[comm.rank]
        tree = ReductionTree.build(owned, comm.rank)
        self._roots_per_rank = int32s(tree.roots_per_rank)
        self._additions = int32s([i for pair in tree.global_additions for i in pair])
        self.weight_bytes = 0
        self._arena = Arena(self._library)
        self._recorder = Recorder(self._library)
        self._operations = 0
        self._largest_sum = 0
        self._kv = 0
        self._program = 0
        self._roots_after: dict[int, tuple[Value, int]] = {}
        self._probed_after: dict[int, tuple[Value, Value]] = {}
        self._take: Callable[[Floats], None] | None = None
        self._buffers: dict[Value, int] = {}
        self._arrays = StepArrays()
        self._token_ids: dict[Matrix, list[range]] = {}
        self._head: Matrix | None = None
        self._head_operation = 0

    # --- loading ---

    def vector(self, values: torch.Tensor, *, head_dim: int | None = None) -> torch.Tensor:
        """See Ops."""
        values = values.float()
        if head_dim is not None:
            heads = values.view(-1, head_dim)
            values = _zeros_behind(heads, _filled_head(head_dim), 1).flatten()
        return _zeros_behind(values, filled_up(len(values), GROUP))

    def table(self, rows: torch.Tensor) -> torch.Tensor:
        """See Ops."""
        return rows

    def weight(
        self,
        source: Source,
        *,
        head_dim: int | None = None,
        token_ids: Sequence[range] | None = None,
    ) -> Matrix:
        """See Ops."""

        def read() -> torch.Tensor:
            rows = source.read()
            if head_dim is None:
                return rows
            # A head's outputs are whole vectors, zeros where it has no more.
            heads = rows.view(-1, head_dim, source.columns)
            return _zeros_behind(heads, _filled_head(head_dim), 1).reshape(-1, source.columns)

        rows = source.rows
        if head_dim is not None:
            rows = rows // head_dim * _filled_head(head_dim)
        # Sixteen levels are few for logits, which decide between tokens of like probability.
        head = token_ids is not None
        dtype = "int8" if head and self._dtype == "int4" else self._dtype
        matrix = self._pack(read, rows, dtype, [source.columns], [0], [0])
        if token_ids is not None:
            self._token_ids[matrix] = [ids for ids in token_ids if ids]
        return matrix

    def row_weight(
        self, source: Source, widths: Sequence[int], *, head_dim: int | None = None
    ) -> Matrix:
        """See Ops."""
        rows = filled_up(source.rows, GROUP)

        def read() -> torch.Tensor:
            columns = _zeros_behind(source.read(), rows)
            if head_dim is None:
                return columns
            heads = columns.view(rows, -1, head_dim)
            return _zeros_behind(heads, _filled_head(head_dim), 2).reshape(rows, -1)

        if head_dim is not None:
            widths = [width // head_dim * _filled_head(head_dim) for width in widths]
        additions, roots = [], []
        for root, subtree in enumerate(aligned_subtrees(self._mine)):
            for leaf in range(len(subtree)):
                # As many sums end with a leaf as its number ends in ones.
                additions.append((~leaf & (leaf + 1)).bit_length() - 1)
                roots.append(root if leaf == len(subtree) - 1 else -1)
        return self._pack(read, rows, self._dtype, widths, additions, roots)

    def _pack(
        self,
        read: Callable[[], torch.Tensor],
        rows: int,
        dtype: str,
        widths: Sequence[int],
        additions: Sequence[int],
        roots: Sequence[int],
    ) -> Matrix:
        matrix = Matrix(self._library, self._arena, rows, dtype, widths, additions, roots)
        cache = self._cache if matrix.weight_offset else None
        if cache is None or not cache.read(matrix.address, matrix.bytes):
            matrix.pack(self._packers, read())
            if cache is not None:
                cache.write(matrix.address, matrix.bytes)
        self.weight_bytes += matrix.bytes
        self._progress(self.weight_bytes)
        return matrix

    def block_bytes(self, layers: int, layout: HeadLayout) -> int:
        """See Ops."""
        scale = _INT8_SCALE_BYTES if self._kv_dtype == "int8" else 0
        row = _filled_head(layout.head_dim) * _KV_BYTES[self._kv_dtype] + scale
        return 2 * layers * len(layout.kv_heads) * BLOCK_TOKENS * row

    def observe(self, take: Callable[[Floats], None]) -> None:
        """See Ops."""
        assert self._comm.world == 1, "other ranks' sums are not in a buffer"
        self._take = take

    def allocate(
        self,
        forward: Callable[[], Value],
        layers: int,
        layout: HeadLayout,
        blocks: int,
        tokens: int,
    ) -> None:
        """See Ops."""
        # What was needed for loading is not any more.
        library, self._packers, self._cache = self._library, self._pool, None
        self._kv = made(
            library.tps_kv_new(
                FORMATS[self._kv_dtype],
                layers,
                len(layout.kv_heads),
                _filled_head(layout.head_dim),
                blocks,
            )
        )
        weakref.finalize(self, library.tps_kv_free, self._kv)
        forward()
        if self._largest_sum * tokens > self._comm.buffer_bytes:
            most = self._comm.buffer_bytes // self._largest_sum
            raise ConfigError(
                f"the partial sums of {tokens} tokens do not fit into the shared memory of"
                f" {self._comm.buffer_bytes} bytes; --max-batched-tokens can be {most} at most"
            )
        alone = self.weight_bytes < self._pool.from_bytes
        self._program = made(library.tps_program_new(self._pool.handle, alone, self._comm.native))
        weakref.finalize(self, library.tps_program_free, self._program)
        self._buffers = self._recorder.make(self._program)

    # --- recording a forward pass ---

    def embed(self, table: torch.Tensor) -> Value:
        """See Ops."""
        size = table.shape[1]
        out = Value(filled_up(size, GROUP), size)
        self._call("embed", table.data_ptr(), TORCH_FORMATS[table.dtype], size, out, keep=[table])
        return out

    def add_norm(
        self, x: Value, delta: Value | None, weight: torch.Tensor, eps: float
    ) -> tuple[Value, Value]:
        """See Ops."""
        return x, self._norm(x, delta, weight, eps, of_logits=False)

    def final_norm(self, x: Value, delta: Value, weight: torch.Tensor, eps: float) -> Value:
        """See Ops."""
        out = self._norm(x, delta, weight, eps, of_logits=True)
        self._call(
            "sum_hidden",
            x,
            delta if delta.in_buffer else -1,
            weight.data_ptr(),
            x.columns,
            eps,
            not delta.in_buffer,
            *self._roots,
        )
        return out

    def _norm(
        self, x: Value, delta: Value | None, weight: torch.Tensor, eps: float, *, of_logits: bool
    ) -> Value:
        out = Value(x.width, x.columns)
        self._call(
            "add_norm",
            x,
            delta if delta is not None and delta.in_buffer else -1,
            out,
            weight.data_ptr(),
            x.columns,
            eps,
            of_logits,
            delta is not None and not delta.in_buffer,
            *self._roots,
            keep=[weight],
        )
        return out

    @property
    def _roots(self) -> tuple[int, int, int]:
        """How many each rank posts, and which are added to which: addresses, and the number of pairs."""
        return (
            self._roots_per_rank.ctypes.data,
            self._additions.ctypes.data,
            len(self._additions) // 2,
        )

    def linear(self, x: Value, weight: Matrix) -> Value:
        """See Ops."""
        return self._linear(_TO_BUFFER, x, weight, Value(weight.padded_rows, weight.rows))

    def add_bias(self, x: Value, bias: torch.Tensor) -> Value:
        """See Ops."""
        self._call("add_bias", x, bias.data_ptr(), keep=[bias])
        return x

    def linear_all_reduce(self, x: Value, weight: Matrix) -> Value:
        """See Ops."""
        if self._comm.world == 1:
            return self.linear(x, weight)
        if self._comm.native is not None:
            out = Value(weight.padded_rows, weight.rows, in_buffer=False)
            bytes_per_token = 4 * weight.roots * weight.padded_rows
            self._largest_sum = max(self._largest_sum, bytes_per_token)
            return self._linear(_TO_PEERS, x, weight, out)
        out = Value(weight.roots * weight.padded_rows, weight.rows)
        self._linear(_TO_HOST, x, weight, out)
        self._roots_after[self._operations] = (out, weight.roots)
        return out

    def attention(
        self,
        qkv: Value,
        rope: RopeTable,
        layer: int,
        layout: HeadLayout,
        norms: HeadNorms | None = None,
    ) -> Value:
        """See Ops."""
        heads, groups = len(layout.heads), _head_groups(layout)
        columns, width = _head_columns(layout)
        angles = (rope.cos.data_ptr(), rope.sin.data_ptr())
        d = layout.head_dim
        normed = (None, None, 0.0)
        if norms is not None:
            normed = (norms.query.data_ptr(), norms.key.data_ptr(), norms.eps)
        self._call(
            *("rope_store", qkv, heads, d, *normed, *angles, self._kv, layer),
            keep=[rope, norms],
        )
        out = Value(width, heads * d)
        self._call(
            "attention",
            qkv,
            out,
            self._kv,
            layer,
            groups.ctypes.data,
            len(groups),
            columns.ctypes.data,
            heads,
            self._window,
            1 / math.sqrt(d),
            keep=[groups, columns],
        )
        return out

    def swiglu(self, gate_up: Value) -> Value:
        """See Ops."""
        count = gate_up.columns // 2
        out = Value(groups_of(count) * GROUP, count)
        self._call("swiglu", gate_up, out, count)
        return out

    def probe(self, x: Value, delta: Value) -> None:
        """See Ops."""
        if self._take is not None:
            self._call("probe", x, delta)
            self._probed_after[self._operations] = (x, delta)

    def logits(self, x: Value, head: Matrix) -> Value:
        """See Ops."""
        self._head, self._head_operation = head, self._operations
        self._multiply(x, head)
        ids = self._token_ids[head]
        first_id, lengths = ids[0].start if ids else 0, int32s([len(shard) for shard in ids])
        self._call(
            *("head", x, head.handle, first_id, lengths.ctypes.data, len(lengths)),
            keep=[head, lengths],
        )
        return Value(head.padded_rows, head.rows, in_buffer=False)

    def _multiply(self, x: Value, weight: Matrix) -> None:
        """The value becomes a weight's input."""
        assert x.weight_offset in (None, weight.weight_offset), "quantised for one kind of weight"
        x.weight_offset = weight.weight_offset

    def _linear(self, target: int, x: Value, weight: Matrix, out: Value) -> Value:
        self._multiply(x, weight)
        buffer = out if out.in_buffer else -1
        self._call("linear", target, x, weight.handle, buffer, keep=[weight])
        return out

    def _call(self, name: str, *arguments: Any, keep: Sequence[object] = ()) -> None:
        self._recorder.call(name, *arguments)
        self._recorder.keep(*keep)
        self._operations += 1

    # --- steps ---

    def copy_block(self, source: int, target: int) -> None:
        """See Ops."""
        self._library.tps_kv_copy(self._kv, source, target)

    def run(
        self,
        sequences: Sequence[SequenceStep],
        last_tokens: Ints,
        wanted: Wanted | None = None,
        sums: Mapping[int, Doubles] = NO_SUMS,
        *,
        every_token: bool = False,
    ) -> StepLogits:
        """See Ops."""
        assert self._head is not None, "allocate comes before steps"
        rows = self._arrays.fill(sequences, last_tokens, sums, every_token=every_token)
        if wanted is None:
            wanted = Wanted.of([(WHOLE, 1, 0)] * rows)
        assert len(wanted.rows) == rows, "one for each row of logits"
        found = self._run(wanted, 0)
        columns = self._head.rows

        def again(whole: Sequence[int]) -> Floats:
            # What the head works on is there until the next step.
            what = [(WHOLE if row in whole else BEST, 1.0, 0) for row in range(rows)]
            return self._run(Wanted.of(what), self._head_operation).logits[:, :columns]

        logits = found.logits[:, :columns]
        return StepLogits(logits, found.best, wanted.whole, found.top, found.sums, again)

    def _run(self, wanted: Wanted, at: int) -> HeadAnswer:
        """The operations from `at` on."""
        assert self._head is not None, "allocate comes before steps"
        arrays, head = self._arrays, self._head
        found = arrays.ask(wanted, len(self._token_ids[head]), head.padded_rows)
        while (at := self._library.tps_program_run(self._program, arrays.address, at)) != _DONE:
            if at < _DONE:
                raise self._comm.lost(-2 - at, "all-reduce")
            if at in self._probed_after:
                self._hand_out(*self._probed_after[at], arrays.tokens)
            else:
                self._reduce_on_host(*self._roots_after[at], arrays.tokens)
        return found

    def _reduce_on_host(self, value: Value, roots: int, tokens: int) -> None:
        """The rest of an all-reduce: the total takes the place of the first root."""
        rows = self._floats(value, roots, tokens * value.width // roots)
        rows[0] = self._comm.all_reduce_roots(rows)

    def _hand_out(self, x: Value, delta: Value, tokens: int) -> None:
        assert self._take is not None, "who observes comes before probes"
        total = self._floats(x, tokens, x.width) + self._floats(delta, tokens, delta.width)
        self._take(total[:, : x.columns])

    def _floats(self, value: Value, rows: int, columns: int) -> Floats:
        """The beginning of a value's buffer, [rows, columns]; of this step only."""
        address = self._library.tps_program_floats(self._program, self._buffers[value])
        floats = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(floats, (rows, columns))

    @property
    def comm_seconds(self) -> float:
        """See Ops."""
        if not self._program:
            return 0.0
        return float(self._library.tps_program_comm_seconds(self._program))


def _filled_head(head_dim: int) -> int:
    """Numbers that a head takes in buffers, weights and the KV memory."""
    return filled_up(head_dim, ROW_BLOCK)


def _zeros_behind(tensor: torch.Tensor, size: int, dim: int = 0) -> torch.Tensor:
    """The tensor with zeros behind it in one dimension, which then has `size` elements."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor.contiguous()
    shape = [*tensor.shape]
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _head_columns(layout: HeadLayout) -> tuple[Int32s, int]:
    """Where the output of each head stands in a row of o_proj's input, and how long that row is.

    Every virtual shard begins with a new group.
    """
    columns, group, d = [], 0, _filled_head(layout.head_dim)
    for heads in layout.by_shard:
        columns += [group * GROUP + i * d for i in range(len(heads))]
        group += groups_of(len(heads) * d)
    return int32s(columns), group * GROUP


def _head_groups(layout: HeadLayout) -> Int32s:
    """Runs of query heads with one KV head: KV head, first query head, number; [runs, 3]."""
    groups: list[list[int]] = []
    for head, kv_head in enumerate(layout.kv_of_head):
        if groups and groups[-1][0] == kv_head:
            groups[-1][2] += 1
        else:
            groups.append([kv_head, head, 1])
    return np.array(groups, dtype=np.int32).reshape(-1, 3)
