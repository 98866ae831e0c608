"""The collectives a sharded forward pass needs, whatever carries them.

`Communicator` is what the rest of the worker sees. `TreeCommunicator` implements it, the reduction
tree included, on top of the one thing a transport has to provide: an all-gather of blocks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shared.errors import CommError
from shared.sharding import ReductionTree
from shared.worker_messages import CommSetup

Floats = npt.NDArray[np.float32]
Row = npt.NDArray[Any]
"""One-dimensional and contiguous."""
_SLICED_FLOATS = 1 << 15
"""From this length on, three and more ranks share the work of finishing the tree. Measured on two
cores at 131,072 floats: 25 % faster with 4 ranks, twice as fast with 8. With 2 each rank would read
as much as before."""


class Communicator(Protocol):
    """Collectives among the workers of one epoch; every rank makes the same calls in the same order.

    A peer that stays silent for longer than the deadline, or is found gone, raises CommError naming
    its rank; after that the communicator is unusable. Over sockets, a peer that goes away between its
    sends to two others may make one of these name the other, which is then waiting in vain as well.
    """

    rank: int
    world: int
    tree: ReductionTree
    """Who owns which virtual shards, and in which order partial sums are added."""
    native: int | None
    """Address of the native library's Collective that exchanges this communicator's rounds, for
    programs of the library, which so share its count of rounds; None: there is none. Good until
    `close`."""
    buffer_bytes: int
    """What a rank may post there in one round; 0 without one."""

    def all_reduce_tree(self, partials: Floats) -> Floats:
        """Sum over all virtual shards of all ranks in the fixed binary tree.

        partials: [S, n] C-contiguous, one row for each virtual shard that this rank owns, in order;
        overwritten. Returns [n], the same bits on every rank for every division of the shards. The
        result may share memory with `partials`, and is the caller's to change.
        """

    def all_reduce_roots(self, roots: Floats) -> Floats:
        """The second half of all_reduce_tree, for a caller that has done `tree.local_additions`.

        roots: [R, n] C-contiguous, the sums that then stand at `tree.local_roots`; overwritten.
        Returns [n], as all_reduce_tree.
        """

    def exchange_small(self, array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """All-gather: the same shape and dtype from every rank -> [world, *shape], rank by rank."""

    def barrier(self) -> None:
        """Return when every rank has called it."""

    def lost(self, rank: int, operation: str) -> CommError:
        """The error for a peer that stayed silent, said by who has waited at `native` for it.

        From then on every call raises it.
        """

    def close(self) -> None:
        """Release sockets and memory. Does not wait for peers. May be called twice."""


class TreeCommunicator(ABC):
    """A Communicator over any transport that can all-gather.

    Blocks longer than `block_bytes` are exchanged piece by piece, so a transport may have buffers
    of a fixed size. Elementwise sums do not mix columns, so the pieces change no bits.
    """

    def __init__(self, setup: CommSetup, block_bytes: int) -> None:
        tree = ReductionTree.build([range(*shards) for shards in setup.owned], setup.rank)
        self.rank = setup.rank
        self.world = len(setup.owned)
        self.tree = tree
        self.native: int | None = None
        self.buffer_bytes = 0
        self._deadline_s = setup.deadline_s
        self._failure: CommError | None = None
        self._global_additions = _assign_slots(tree.global_additions)
        self._one_row_each = (1,) * self.world
        self._block_bytes = block_bytes
        self._columns = block_bytes // (4 * max(tree.roots_per_rank))
        slots = 1 + max((slot for _, _, slot in self._global_additions), default=0)
        self._scratch: list[Floats] = [np.empty(0, np.float32)] * (slots - 1)

    @abstractmethod
    def _all_gather(
        self,
        operation: str,
        rows: Sequence[Row],
        rows_per_rank: tuple[int, ...],
        parts: Sequence[slice] | None = None,
    ) -> Sequence[Row]:
        """The rows of every rank, rank by rank.

        rows: this rank's `rows_per_rank[rank]` rows, all of one dtype and length, which are those of
        the other ranks' rows too; together at most `block_bytes`. With `parts`, rank r receives only
        the columns `parts[r]` of every row; parts are of one length.

        Returned rows are read-only, stay valid until the next call, and in a world of several ranks
        share no memory with `rows`. Raises CommError (made by `_fail`) that says in which `operation`
        a peer was lost.
        """

    @abstractmethod
    def close(self) -> None:
        """Release sockets and memory. Does not wait for peers. May be called twice."""

    def all_reduce_tree(self, partials: Floats) -> Floats:
        """See Communicator."""
        for rows in self._pieces(partials):
            for i, j in self.tree.local_additions:
                np.add(rows[i], rows[j], rows[i])
            self._finish([rows[i] for i in self.tree.local_roots])
        total: Floats = partials[0]
        return total

    def all_reduce_roots(self, roots: Floats) -> Floats:
        """See Communicator."""
        for rows in self._pieces(roots):
            self._finish(rows)
        total: Floats = roots[0]
        return total

    def exchange_small(self, array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """See Communicator."""
        self._refuse_if_failed()
        mine = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        gathered = np.empty((self.world, mine.size), np.uint8)
        for start in range(0, mine.size, self._block_bytes):
            piece = slice(start, start + self._block_bytes)
            pieces = self._all_gather("exchange", [mine[piece]], self._one_row_each)
            for rank, row in enumerate(pieces):
                gathered[rank, piece] = row
        return gathered.view(array.dtype).reshape(self.world, *array.shape)

    def barrier(self) -> None:
        """See Communicator."""
        self._refuse_if_failed()
        self._all_gather("barrier", [np.zeros(1, np.uint8)], self._one_row_each)

    def lost(self, rank: int, operation: str) -> CommError:
        """See Communicator."""
        return self._fail(rank, operation, f"did not answer within {self._deadline_s:g} s")

    def _pieces(self, vectors: Floats) -> Iterator[list[Floats]]:
        """The rows of `vectors`, cut into columns that fit into one block."""
        length = vectors.shape[1]
        if length <= self._columns:
            yield list(vectors)
            return
        for start in range(0, length, self._columns):
            yield list(vectors[:, start : start + self._columns])

    def _finish(self, roots: list[Floats]) -> None:
        """From the roots of this rank to the total of all, which is left in roots[0]."""
        self._refuse_if_failed()
        total = roots[0]
        if self.world > 2 and total.size >= _SLICED_FLOATS:
            self._finish_in_slices(roots, total)
        else:
            self._finish_tree(
                self._all_gather("all-reduce", roots, self.tree.roots_per_rank), total
            )

    def _finish_tree(self, gathered: Sequence[Floats], total: Floats) -> None:
        """Add up all ranks' roots, which are read-only, into `total`."""
        values = [*gathered]
        slots = [total, *self._scratch_rows(total)] if self._scratch else (total,)
        for i, j, slot in self._global_additions:
            values[i] = np.add(values[i], values[j], slots[slot])

    def _finish_in_slices(self, roots: Sequence[Floats], total: Floats) -> None:
        """The same sums in two phases, for long rows: each rank finishes the tree for a slice of the
        columns, then all gather the slices. A rank so reads two rows or less, not one of each rank.
        """
        width = -(-total.size // self.world)
        # Slices of one width: where they do not fit, the last ones overlap, with the same bits.
        starts = [min(rank * width, total.size - width) for rank in range(self.world)]
        parts = [slice(start, start + width) for start in starts]
        mine = total[parts[self.rank]]
        self._finish_tree(
            self._all_gather("all-reduce", roots, self.tree.roots_per_rank, parts), mine
        )
        for part, finished in zip(
            parts, self._all_gather("all-reduce", [mine], self._one_row_each), strict=True
        ):
            total[part] = finished

    def _scratch_rows(self, like: Floats) -> list[Floats]:
        length = like.size
        if self._scratch[0].size < length:
            self._scratch = [np.empty_like(like) for _ in self._scratch]
        return [row[:length] for row in self._scratch]

    def _refuse_if_failed(self) -> None:
        # Ranks may be in different rounds now, so going on could mix up their data in silence.
        if self._failure is not None:
            raise self._failure

    def _fail(self, rank: int, operation: str, reason: str) -> CommError:
        """The error for a lost peer, which is also what every later call raises."""
        self._failure = CommError(rank, f"{reason} in {operation}")
        return self._failure


def _assign_slots(additions: Sequence[tuple[int, int]]) -> tuple[tuple[int, int, int], ...]:
    """Where each sum of `tree_additions` goes when the values themselves are read-only.

    Returned are (i, j, slot), meaning `value[i] = slot = value[i] + value[j]`. Slots are reused as
    soon as their content has been added up, so at most log2 of the values are needed; the total
    ends in slot 0.
    """
    slot_of: dict[int, int] = {}
    assigned = []
    for i, j in additions:
        taken = set(slot_of.values())
        free = next(slot for slot in range(len(taken) + 1) if slot not in taken)
        right = slot_of.pop(j, free)
        slot_of.setdefault(i, right)
        assigned.append((i, j, slot_of[i]))
    return tuple(assigned)
