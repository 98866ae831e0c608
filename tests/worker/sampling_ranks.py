"""Runs the sampler on every rank of a world, and says plainly what it should have chosen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shared.errors import CommError
from shared.sharding import split_groups
from shared.worker_messages import History, Sampling
from tests.worker.rank_threads import VIRTUAL_SHARDS, run_ranks
from worker.comm.base import Communicator, Floats
from worker.native.api import native_library
from worker.native.sampling import NativeRows
from worker.sampling.sampler import Sampled, Sampler
from worker.sampling.vocabulary import StepLogits, Vocabulary, best_of

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0)


@dataclass(frozen=True)
class Row:
    """One row of a batch."""

    logits: Floats
    """[vocabulary]"""
    sampling: Sampling
    position: int = 0
    slot: int = 0


@dataclass(frozen=True)
class Batch:
    """What is sampled in one step; sequences may take slots before."""

    rows: Sequence[Row]
    begin: dict[int, History] = field(default_factory=dict)


class CountingCommunicator:
    """A communicator that counts its collectives."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.rank, self.world, self.tree = comm.rank, comm.world, comm.tree
        self.native, self.buffer_bytes = comm.native, comm.buffer_bytes
        self.calls = 0

    def all_reduce_tree(self, partials: Floats) -> Floats:
        self.calls += 1
        return self._comm.all_reduce_tree(partials)

    def all_reduce_roots(self, roots: Floats) -> Floats:
        self.calls += 1
        return self._comm.all_reduce_roots(roots)

    def exchange_small(self, array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        self.calls += 1
        return self._comm.exchange_small(array)

    def barrier(self) -> None:
        self.calls += 1
        self._comm.barrier()

    def lost(self, rank: int, operation: str) -> CommError:
        return self._comm.lost(rank, operation)

    def close(self) -> None:
        self._comm.close()


@dataclass(frozen=True)
class Outcome:
    """Of one batch; the same on every rank."""

    sampled: Sampled
    collectives: int


def sample_on_ranks(world: int, batches: Sequence[Batch]) -> list[Outcome]:
    """Sample the batches on all ranks, each in a thread of its own; what all of them got.

    Where the native library is there, it and numpy must choose the same tokens.
    """
    plain = _sample(world, batches, None)
    library = native_library()
    if library is None:
        return plain
    outcomes = _sample(world, batches, NativeRows(library))
    for mine, theirs in zip(outcomes, plain, strict=True):
        assert mine.sampled.tokens == theirs.sampled.tokens, "native and numpy disagree"
    return outcomes


def _sample(world: int, batches: Sequence[Batch], native: NativeRows | None) -> list[Outcome]:
    outcomes: dict[int, list[Outcome]] = {}

    def job(comm: Communicator, owned: list[range]) -> None:
        outcomes[comm.rank] = _run_rank(CountingCommunicator(comm), owned, batches, native)

    run_ranks(world, job)
    for rank in range(1, world):
        assert outcomes[rank] == outcomes[0], f"ranks {rank} and 0 disagree"
    return outcomes[0]


def _run_rank(
    comm: CountingCommunicator,
    owned: Sequence[range],
    batches: Sequence[Batch],
    native: NativeRows | None,
) -> list[Outcome]:
    vocab = len(batches[0].rows[0].logits)
    token_ids = [[split_groups(vocab, VIRTUAL_SHARDS, v) for v in own] for own in owned]
    mine = slice(token_ids[comm.rank][0].start, token_ids[comm.rank][-1].stop)
    sampler = Sampler(comm, Vocabulary(comm.rank, token_ids, native))
    outcomes = []
    for batch in batches:
        for slot, history in batch.begin.items():
            sampler.begin(slot, history)
        before = comm.calls
        logits = np.stack([row.logits[mine] for row in batch.rows])
        sampled = sampler(
            StepLogits(logits, best_of(logits), range(len(logits))),
            [row.sampling for row in batch.rows],
            [row.position for row in batch.rows],
            [row.slot for row in batch.rows],
        )
        outcomes.append(Outcome(sampled, comm.calls - before))
    return outcomes


def tokens_of(world: int, rows: Sequence[Row]) -> list[int]:
    """What one batch of these rows gives."""
    return sample_on_ranks(world, [Batch(rows)])[0].sampled.tokens


# --- what should come out ------------------------------------------------------------------------


def expected_token(row: Row, prompt: Sequence[int] = (), output: Sequence[int] = ()) -> int:
    """The token to choose, worked out on the whole logits one step after the other."""
    s = row.sampling
    if not np.isfinite(row.logits[row.logits != -np.inf]).all():
        return -1
    logits = changed_logits(row, prompt, output)
    if logits.max() == -np.inf:
        return -1
    if s.temperature == 0:
        return int(np.flatnonzero(logits == logits.max())[0])
    scores = {
        token: float(logits[token]) / s.temperature + gumbel(s.seed, row.position, token)
        for token in kept_tokens(logits, s)
    }
    return max(scores, key=lambda token: scores[token])


def changed_logits(row: Row, prompt: Sequence[int], output: Sequence[int]) -> Floats:
    """After bias, penalties and bans."""
    s, logits = row.sampling, row.logits.copy()
    for token, bias in s.logit_bias.items():
        logits[token] += np.float32(bias)
    for token in {*prompt, *output}:
        if logits[token] > 0:
            logits[token] /= np.float32(s.repetition_penalty)
        else:
            logits[token] *= np.float32(s.repetition_penalty)
    for token in set(output):
        logits[token] -= np.float32(s.frequency_penalty) * np.float32(list(output).count(token))
        logits[token] -= np.float32(s.presence_penalty)
    if row.position < s.banned_before:
        logits[s.banned] = -np.inf
    return logits


def kept_tokens(logits: Floats, s: Sampling) -> list[int]:
    """The tokens that top-k, top-p and min-p leave, best first."""
    tokens = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if s.top_k:
        tokens = tokens[: s.top_k]
    highest = float(logits[tokens[0]])
    weights = [math.exp((float(logits[token]) - highest) / s.temperature) for token in tokens]
    if s.top_p < 1:
        total, reached = math.fsum(weights), 0.0
        for count, weight in enumerate(weights, start=1):
            reached += weight
            if reached >= s.top_p * total:
                tokens = tokens[:count]
                break
    return [t for t, w in zip(tokens, weights, strict=False) if w >= s.min_p]


def gumbel(seed: int, position: int, token: int) -> float:
    """The noise of one token, with plain integers."""
    word = (1 << 64) - 1

    def mix(z: int) -> int:
        z &= word
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & word
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & word
        return z ^ (z >> 31)

    gamma = 0x9E3779B97F4A7C15
    bits = mix(mix(mix(seed) + (position + 1) * gamma) + (token + 1) * gamma) >> 12
    return -math.log(-math.log((bits + 0.5) / 2**52))
