"""Plans carried out on the device from the plan's tokens to the chosen ones, which are read once, and
may be read after the next plan has been begun.

A pass in which all sequences decode works on tensors that stay where they are: it reads its input from
them and leaves there the input of the next pass, so a plan's passes follow each other without the
host, and a pass of a certain size can be captured in a CUDA graph.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch

from shared.messages import BLOCK_TOKENS
from shared.worker_messages import SequenceStep
from worker.comm.device import Collectives
from worker.ops.device_ops import DeviceOps
from worker.ops.graphs import StepGraphs
from worker.sampling.device import (
    INTEGERS,
    NUMBERS,
    DeviceSampler,
    Draws,
    Manner,
    is_choosable,
    manner_of,
    pack,
)
from worker.sampling.vocabulary import Doubles, Ints, Vocabulary

MOST_PASSES = 64
"""Of one plan: the limit of --steps-per-plan."""
_SMALL_BATCHES = (1, 2, 4, 8)
_BATCH_STEP = 16
_LEAST_BLOCKS = 8
_SLOT, _POSITION, _LAST, _DRAWS = range(4)
"""Columns of a row's integers; behind those of its draws is its block table."""
_TABLE = _DRAWS + INTEGERS
_AS_IT_IS = -2
"""For a row's last token: the device has it, from a plan that was not read yet."""


@dataclass(frozen=True)
class UnderWay:
    """A plan that the device may still be computing."""

    count: int
    """Sequences."""
    tokens: torch.Tensor
    """[passes, rows] int64, in the host's memory, for the first `count` rows."""
    done: torch.cuda.Event | None
    """None: the device was waited for."""

    def read(self) -> Ints:
        """Wait, and get its tokens [passes, count], or NOT_FINITE. To be read before the plan after next begins."""
        if self.done is not None:
            self.done.synchronize()
        tokens: Ints = self.tokens[:, : self.count].numpy().copy()
        return tokens


class _HostSide:
    """Where a plan's input and tokens lie in the host's memory; on a GPU pinned, for copies that nobody waits for."""

    def __init__(self, rows: int, width: int, pinned: bool) -> None:
        def zeros(size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, pin_memory=pinned)

        self.integers = zeros((rows, width), torch.int64)
        self.numbers = zeros((rows, NUMBERS), torch.float64)
        self.chosen = zeros((MOST_PASSES, rows), torch.int64)


def padded_batch(rows: int) -> int:
    """The captured batch size for so many sequences: 1, 2, 4, 8, then every 16."""
    for size in _SMALL_BATCHES:
        if rows <= size:
            return size
    return -(-rows // _BATCH_STEP) * _BATCH_STEP


def padded_blocks(blocks: int) -> int:
    """The captured length of block tables: a power of two, 8 at least."""
    return max(_LEAST_BLOCKS, 1 << (blocks - 1).bit_length())


class DeviceChooser:
    """Carries out plans whose tokens follow from the logits as they are."""

    def __init__(
        self,
        ops: DeviceOps,
        collectives: Collectives,
        vocabulary: Vocabulary,
        *,
        slots: int,
        blocks: int,
        max_positions: int,
    ) -> None:
        """slots: sequences at most; blocks: of the KV cache, whose next one `ops` has for padding."""
        self._ops, self._sampler = ops, DeviceSampler(collectives, vocabulary)
        self._graphs = StepGraphs(ops.device, collectives.capturable)
        rows = padded_batch(slots)
        most_blocks = padded_blocks(-(-max_positions // BLOCK_TOKENS))
        padding = np.full(_TABLE + most_blocks, blocks, dtype=np.int64)
        padding[:_TABLE] = 0
        padding[_SLOT] = slots
        self._padding = padding
        device = ops.device
        self._integers = torch.zeros((rows, len(padding)), dtype=torch.int64, device=device)
        self._numbers = torch.zeros((rows, NUMBERS), dtype=torch.float64, device=device)
        self._last_tokens = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._chosen = torch.zeros((MOST_PASSES, rows), dtype=torch.int64, device=device)
        self._passed = torch.zeros(1, dtype=torch.int64, device=device)
        # Two, in turns: one plan may be under way while the next is begun.
        pinned = device.type == "cuda"
        self._host_sides = [_HostSide(rows, len(padding), pinned) for _ in range(2)]

    def can(self, sequences: Sequence[SequenceStep]) -> bool:
        """Whether it knows how to choose for these; the others are the sampler's."""
        return all(
            s.sampling is None or is_choosable(s.sampling, s.start + max(len(s.tokens), 1))
            for s in sequences
        )

    @torch.inference_mode()
    def __call__(
        self,
        sequences: Sequence[SequenceStep],
        passes: int,
        last_tokens: Ints,
        sums: Mapping[int, Doubles],
    ) -> Ints:
        """Tokens [passes, B] of the sequences that want one, or NOT_FINITE. Raises CommError.

        last_tokens and sums as for `Ops.run`. Several passes: all sequences decode, want a token, and
        go on from the tokens of the pass before.
        """
        if self.only_decodes(sequences):
            return self.begin(sequences, passes, last_tokens).read()
        logits = self._ops.forward(self._ops.prepared(sequences, last_tokens, sums))
        sampled = [s for s in sequences if s.sampling is not None]
        if not sampled:
            return np.zeros((1, 0), dtype=np.int64)
        rows = [pack(s.sampling) for s in sampled if s.sampling is not None]
        draws = Draws.of(
            torch.tensor([integers for integers, _ in rows]).to(self._ops.device),
            torch.tensor([numbers for _, numbers in rows], dtype=torch.float64).to(
                self._ops.device
            ),
        )
        positions = torch.tensor([s.start + max(len(s.tokens), 1) for s in sampled])
        manner = manner_of([s.sampling for s in sampled if s.sampling is not None])
        chosen = self._sampler(logits, positions.to(self._ops.device), draws, manner)
        tokens: Ints = chosen[None].numpy(force=True)
        return tokens

    @staticmethod
    def only_decodes(sequences: Sequence[SequenceStep]) -> bool:
        """Whether all sequences go on from their last tokens and want one: those can be begun."""
        return all(s.sampling is not None and not s.tokens for s in sequences)

    @torch.inference_mode()
    def begin(
        self,
        sequences: Sequence[SequenceStep],
        passes: int,
        last_tokens: Ints,
        unread: Set[int] = frozenset(),
    ) -> UnderWay:
        """Have the device carry out a plan that only decodes. Raises CommError.

        unread: slots whose last tokens are those of the plan before, which nobody has read yet.
        """
        count, batch = len(sequences), padded_batch(len(sequences))
        furthest = max(s.start for s in sequences) + passes
        blocks = padded_blocks(-(-furthest // BLOCK_TOKENS))
        manner = manner_of([s.sampling for s in sequences if s.sampling is not None])
        self._host_sides.reverse()
        host = self._host_sides[0]
        self._fill(host, sequences, batch, last_tokens, unread)
        for _ in range(passes):
            self._graphs.run((batch, blocks, manner), lambda: self._pass(batch, blocks, manner))
        host.chosen[:passes].copy_(self._chosen[:passes], non_blocking=True)
        done = None
        if self._ops.device.type == "cuda":
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return UnderWay(count, host.chosen[:passes], done)

    def _fill(
        self,
        host: _HostSide,
        sequences: Sequence[SequenceStep],
        batch: int,
        last_tokens: Ints,
        unread: Set[int],
    ) -> None:
        """The input of the first pass. All of it in two copies."""
        integers, numbers = host.integers[:batch].numpy(), host.numbers[:batch].numpy()
        integers[:], numbers[:] = self._padding, 1
        for row, of_row, s in zip(integers, numbers, sequences, strict=False):
            assert s.sampling is not None, "sequences that decode want a token"
            row[_DRAWS:_TABLE], of_row[:] = pack(s.sampling)
            last = _AS_IT_IS if s.slot in unread else last_tokens[s.slot]
            row[_SLOT], row[_POSITION], row[_LAST] = s.slot, s.start, last
            table = np.frombuffer(s.blocks, dtype="<i4")[: len(row) - _TABLE]
            row[_TABLE : _TABLE + len(table)] = table
        self._integers[:batch].copy_(host.integers[:batch], non_blocking=True)
        self._numbers[:batch].copy_(host.numbers[:batch], non_blocking=True)
        rows = self._integers[:batch]
        slots, last = rows[:, _SLOT], rows[:, _LAST]
        last = torch.where(last == _AS_IT_IS, self._last_tokens[slots], last)
        self._last_tokens.index_copy_(0, slots, last)
        self._passed.zero_()

    def _pass(self, batch: int, blocks: int, manner: Manner) -> None:
        """One token for each row, from and into the tensors that stay."""
        rows = self._integers[:batch]
        slots, positions = rows[:, _SLOT], rows[:, _POSITION]
        # After a token that is NOT_FINITE any may come, as long as there is one.
        ids = self._last_tokens[slots].clamp(min=0)
        table = rows[:, _TABLE : _TABLE + blocks]
        logits = self._ops.forward(self._ops.prepared_decode(ids, positions, table))
        draws = Draws.of(rows[:, _DRAWS:_TABLE], self._numbers[:batch])
        positions += 1
        tokens = self._sampler(logits, positions, draws, manner)
        self._last_tokens.index_copy_(0, slots, tokens)
        self._chosen[:, :batch].index_copy_(0, self._passed, tokens[None])
        self._passed += 1
