"""What the head tells of its logits without writing them, against the logits when it writes them.

A head alone is run here: rows x of a table, normed, times the vocabulary rows that each rank has.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch

from shared.messages import Precision
from shared.sharding import split_groups
from shared.worker_messages import Sampling, SequenceStep
from tests.worker.native_ranks import GREEDY
from tests.worker.rank_threads import VIRTUAL_SHARDS, run_ranks
from worker.comm.base import Communicator
from worker.native.api import Pool, native_library
from worker.native.sampling import (
    BEST,
    NOISY_BEST,
    TOP,
    TOP_AND_SUMS,
    WHOLE,
    NativeRows,
    Wanted,
)
from worker.ops.base import HeadLayout, Source, Value
from worker.ops.native import NativeOps
from worker.sampling.noise import perturb
from worker.sampling.sampler import Sampled, Sampler
from worker.sampling.vocabulary import StepLogits, Vocabulary

pytestmark = pytest.mark.skipif(
    native_library() is None, reason="there is no native library: no C++ compiler to build it"
)

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

NO_HEADS = HeadLayout(
    head_dim=16, heads=range(0), kv_heads=range(0), queries_per_kv=1, by_shard=(range(0),)
)
HIDDEN, ROWS, SPOILT = 64, 33, 7
"""The row SPOILT of x is NaN, and so are its logits."""
COUNT = 40
TEMPERATURES = (1.0, 0.2, 1e-200, 3.7)
VOCABULARIES = (1, 5, 40, 513, 2003, 12_011)
"""Of the fewest some virtual shards hold none; the last two end within a chunk of 512."""


def weights(vocab: int) -> torch.Tensor:
    """Vocabulary rows with equals, near and far, and with logits of every size."""
    generator = torch.Generator().manual_seed(vocab)
    rows = torch.randn(vocab, HIDDEN, generator=generator)
    rows[torch.randint(vocab, (vocab // 3,), generator=generator)] = rows[vocab // 2].clone()
    return rows.mul_(2 * HIDDEN**-0.5)


def inputs() -> torch.Tensor:
    rows = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(1))
    rows[SPOILT] = torch.nan
    return rows


class Head:
    """The head of one rank."""

    def __init__(
        self,
        comm: Communicator,
        owned: Sequence[range],
        head: torch.Tensor,
        threads: int,
        dtype: Precision = "fp32",
    ) -> None:
        library = native_library()
        assert library is not None
        vocab = len(head)
        self.token_ids = [[split_groups(vocab, VIRTUAL_SHARDS, v) for v in own] for own in owned]
        mine = self.token_ids[comm.rank]
        rows = head[mine[0].start : mine[-1].stop]
        pool = Pool(library, threads, crowded=True, from_bytes=0)
        self.ops = ops = NativeOps(comm, pool, owned, dtype, "fp32", None)
        self.vocabulary = Vocabulary(comm.rank, self.token_ids, NativeRows(library))

        def forward() -> Value:
            x = ops.embed(ops.table(inputs()))
            zeros = ops.embed(ops.table(torch.zeros(ROWS, HIDDEN)))
            normed = ops.final_norm(x, zeros, ops.vector(torch.ones(HIDDEN)), 1e-6)
            source = Source(len(rows), HIDDEN, lambda: rows)
            return ops.logits(normed, ops.weight(source, token_ids=mine))

        ops.allocate(forward, 1, NO_HEADS, 1, ROWS)

    def run(self, rows: Sequence[int], wanted: Wanted | None) -> StepLogits:
        """One step for these rows of x."""
        block = np.zeros(1, "<i4").tobytes()
        steps = [SequenceStep(0, 0, [row], block, GREEDY) for row in rows]
        return self.ops.run(steps, np.zeros(1, np.int64), wanted)


def on_ranks(world: int, job: Callable[[Communicator, list[range]], Any]) -> list[Any]:
    """What `job` returns on each rank."""
    found: dict[int, Any] = {}

    def keep(comm: Communicator, owned: list[range]) -> None:
        found[comm.rank] = job(comm, owned)

    run_ranks(world, keep)
    return [found[rank] for rank in range(world)]


def request(row: int) -> tuple[int, float, int]:
    """Every kind of row, several temperatures and keys."""
    kind = (BEST, NOISY_BEST, TOP, TOP_AND_SUMS, WHOLE)[row % 5]
    return kind, TEMPERATURES[row % 4], (row * 0x9E3779B97F4A7C15 + 5) % (1 << 64)


def check_row(head: Head, found: StepLogits, at: int, row: int, logits: Floats) -> None:
    """The answer at `at` to request(row), against the row's logits in numpy."""
    kind, temperature, key = request(row)
    ids = np.arange(len(logits)) + head.vocabulary.first_id
    column = int(logits.argmax())
    if kind == NOISY_BEST and np.isfinite(logits[column]):
        scores = logits[None] / np.array([[temperature]])
        perturb(scores, np.array([[key]], dtype=np.uint64), ids)
        column = int(scores.argmax())
        assert np.isclose(found.best[at, 0], scores[0, column], rtol=1e-12)
    else:
        assert np.array_equal(found.best[at, 0], logits[column], equal_nan=True)
    assert found.best[at, 1] == column
    if kind == WHOLE:
        assert np.array_equal(found.rows([at])[0], logits, equal_nan=True)
    if kind in (TOP, TOP_AND_SUMS):
        best = sorted(np.argsort(-logits, kind="stable")[:COUNT].tolist())
        best = [c for c in best if not np.isnan(logits[c])]
        assert found.top[at, 0, : len(best)].tolist() == logits[best].tolist()
        assert found.top[at, 1, : len(best)].tolist() == ids[best].tolist()
        assert (found.top[at, 0, len(best) :] == -np.inf).all()
    if kind == TOP_AND_SUMS:
        check_sums(head.vocabulary, found.sums[at], logits, temperature)


def check_sums(vocabulary: Vocabulary, sums: Doubles, logits: Floats, temperature: float) -> None:
    for shard, (start, length) in enumerate(
        zip(vocabulary.shard_starts, vocabulary.shard_lengths, strict=True)
    ):
        part = logits[start : start + length].astype(np.float64)
        if np.isnan(logits).any():
            assert sums[shard].tolist() == [-np.inf, 0]
            continue
        assert sums[shard, 0] == part.max()
        assert np.isclose(sums[shard, 1], np.exp((part - part.max()) / temperature).sum(), 1e-5)
    if np.isnan(logits).any() or not len(logits):
        return
    assert vocabulary.native is not None
    starts, lengths = vocabulary.shard_starts, vocabulary.shard_lengths
    of_whole = vocabulary.native.softmax_sums(
        np.ascontiguousarray(logits[None]), np.array([[temperature]]), starts, lengths
    )
    assert np.array_equal(sums, of_whole[0]), "the same bits, with and without written logits"


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("world", [1, 3])
def test_what_the_head_tells_is_what_its_logits_say(world: int, vocab: int) -> None:
    def job(comm: Communicator, owned: list[range]) -> None:
        head = Head(comm, owned, weights(vocab), threads=2)
        rows = list(range(ROWS))
        logits = head.run(rows, None).logits
        assert logits.shape == (ROWS, head.vocabulary.size)
        if not head.vocabulary.size:
            return
        assert np.isnan(logits[SPOILT]).all()
        found = head.run(rows, Wanted.of([request(row) for row in rows], COUNT))
        assert found.whole == [row for row in rows if request(row)[0] == WHOLE]
        for row in rows:
            check_row(head, found, row, row, logits[row])

    on_ranks(world, job)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_what_the_head_tells_is_the_same_alone_in_a_batch_and_with_any_threads(
    dtype: Precision,
) -> None:
    def answers(threads: int, batches: Sequence[Sequence[int]]) -> list[tuple[bytes, ...]]:
        def job(comm: Communicator, owned: list[range]) -> list[tuple[bytes, ...]]:
            head = Head(comm, owned, weights(12_011), threads, dtype)
            by_row = {}
            for batch in batches:
                found = head.run(batch, Wanted.of([request(row) for row in batch], COUNT))
                for at, row in enumerate(batch):
                    kind = request(row)[0]
                    told = [found.best[at].tobytes()]
                    if kind in (TOP, TOP_AND_SUMS):
                        told.append(found.top[at].tobytes())
                    if kind == TOP_AND_SUMS:
                        told.append(found.sums[at].tobytes())
                    by_row[row] = tuple(told)
            return [by_row[row] for row in range(ROWS)]

        (told,) = on_ranks(1, job)
        return list(told)

    together = answers(1, [range(ROWS)])
    assert answers(2, [[row] for row in range(ROWS)]) == together
    assert answers(3, [range(ROWS - 1, -1, -1)]) == together
    assert answers(40, [range(5), range(5, ROWS)]) == together, "more threads than chunks"


def test_the_head_tells_of_logits_that_are_not_finite() -> None:
    spoilt = weights(1500)
    rows = [0, 1, 2, 3]
    wanted = Wanted.of([request(row) for row in rows], COUNT)

    def job(comm: Communicator, owned: list[range]) -> None:
        for place, bad in ((0, torch.inf), (700, torch.inf), (1499, torch.nan)):
            changed = spoilt.clone()
            changed[place] = bad  # in some rows inf - inf, which is NaN
            head = Head(comm, owned, changed, threads=2)
            logits = head.run(rows, None).logits
            found = head.run(rows, wanted)
            for row in rows:
                assert not np.isfinite(logits[row, place])
                highest = logits[row].max()
                column = int(logits[row].argmax())
                assert np.array_equal(found.best[row, 0], highest, equal_nan=True)
                assert found.best[row, 1] == column

    on_ranks(1, job)


# --- through the sampler --------------------------------------------------------------------------

replace = msgspec.structs.replace
PLAIN = Sampling(temperature=0.9, top_k=0, top_p=1.0, seed=3)
KINDS = (
    GREEDY,
    PLAIN,
    replace(PLAIN, top_k=20),
    replace(PLAIN, top_k=20, top_p=0.8),
    replace(PLAIN, top_p=0.5),
    replace(PLAIN, top_p=0.99, temperature=50.0),  # the best tokens do not suffice
    replace(PLAIN, min_p=0.1),
    replace(PLAIN, logprobs=3, top_p=0.9),
    replace(GREEDY, logit_bias={3: 4.0}),
    replace(PLAIN, logit_bias={3: 4.0, 1999: -100.0}, top_p=0.99, temperature=50.0),
    replace(PLAIN, banned=[5, 6], banned_before=9),
    replace(GREEDY, logprobs=0),
)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_sampler_chooses_what_it_chooses_from_all_logits(world: int) -> None:
    rows = list(range(ROWS))
    sampling = [replace(KINDS[row % len(KINDS)], seed=row) for row in rows]

    def job(comm: Communicator, owned: list[range]) -> tuple[list[Sampled], list[Sampled]]:
        head = Head(comm, owned, weights(4003), threads=2)
        frugal, lavish = (Sampler(comm, head.vocabulary) for _ in range(2))
        theirs, ours = [], []
        for position in range(4):
            at = [position] * ROWS
            theirs.append(lavish(head.run(rows, None), sampling, at, rows))
            step = head.run(rows, frugal.wanted(sampling, at, rows))
            written = len(step.whole)
            ours.append(frugal(step, sampling, at, rows))
            assert written < 0.7 * ROWS
        return ours, theirs

    for ours, theirs in on_ranks(world, job):
        assert ours == theirs
        assert ours[0].tokens[SPOILT] == -1
        assert len({tuple(sampled.tokens) for sampled in ours}) > 1


def test_a_row_that_needs_all_its_logits_gets_them_at_once_the_next_time() -> None:
    flat = [replace(PLAIN, top_p=0.99, temperature=50.0)]
    peaked = [replace(PLAIN, top_p=0.5, temperature=0.01)]

    def job(comm: Communicator, owned: list[range]) -> None:
        head = Head(comm, owned, weights(4003), threads=1)
        sampler = Sampler(comm, head.vocabulary)
        written = []
        for position, sampling in enumerate([flat, flat, peaked, peaked]):
            step = head.run([1], sampler.wanted(sampling, [position], [0]))
            written.append(list(step.whole))
            sampler(step, sampling, [position], [0])
        assert written == [[], [0], [0], []]

    on_ranks(1, job)
