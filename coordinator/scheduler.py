"""Continuous batching for one model: which tokens of which sequences go into the next step.

Plans may be made before earlier ones have come back. Workers run plans in the order they were sent,
so a block that was released can be given away at once, and a block counts as filled as soon as the
plan that fills it has been made.
"""

from collections import deque
from dataclasses import dataclass

from coordinator.jobs import JobQueue
from coordinator.kv_blocks import BLOCK_TOKENS, BlockPool
from coordinator.sequence import Sequence
from shared.messages import SequenceStep


@dataclass(frozen=True)
class PlannedStep:
    """What goes to the workers, and who gets the tokens that come back, in order."""

    sequences: list[SequenceStep]
    sampled: list[Sequence]
    started: list[Sequence]
    """Sequences that run for the first time."""


class Scheduler:
    """Waiting and running sequences of one model, its slots and its KV blocks."""

    def __init__(self, queue: JobQueue, blocks: int, slots: int, max_batched_tokens: int) -> None:
        self.queue = queue
        self.pool = BlockPool(blocks)
        self.running: list[Sequence] = []  # oldest first
        self._preempted: deque[Sequence] = deque()  # oldest first
        self._free_slots = list(range(slots))
        self._max_batched_tokens = max_batched_tokens

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.pool.total * BLOCK_TOKENS

    def plan(self) -> PlannedStep | None:
        """The next step, or None when there is nothing to compute now."""
        budget = self._max_batched_tokens
        chunks: list[tuple[Sequence, int]] = []
        short = False
        # Sequences that write come before those that still read their prompt: a long prompt must
        # not make them wait.
        for sequence in sorted(self.running, key=lambda s: s.pending > 1):
            count = min(sequence.pending, budget)
            if sequence.slot < 0 or count == 0:
                continue  # preempted in this very loop, or everything it may need is under way
            short = not self._make_room(sequence, count) or short
            chunks.append((sequence, count))
            budget -= count
        # Who was preempted, perhaps after it had been given a chunk, does not run.
        chunks = [(s, n) for s, n in chunks if s.slot >= 0]
        steps = [self._step(sequence, count) for sequence, count in chunks]
        started = []
        # While memory is short nobody new comes in, least of all who has just been preempted.
        while budget and not short and (waiting := self._next_waiting()) is not None:
            count = self._admit(waiting, budget)
            if count == 0:
                break
            if not waiting.started_at:
                started.append(waiting)
            chunks.append((waiting, count))
            steps.append(self._step(waiting, count))  # at once: the next one may share its blocks
            budget -= count
        if not steps:
            return None
        sampled = [s for (s, _), step in zip(chunks, steps, strict=True) if step.sampling]
        return PlannedStep(steps, sampled, started)

    def end(self, sequence: Sequence) -> None:
        """A sequence is done, failed or cancelled, wherever it is: give back all it holds."""
        sequence.finished = True
        if sequence.slot >= 0:
            self.running.remove(sequence)
            self._give_back(sequence)
        elif sequence in self._preempted:
            self._preempted.remove(sequence)
        else:
            self.queue.remove(sequence)

    def everyone(self) -> list[Sequence]:
        """All sequences that have not ended."""
        return [*self.running, *self._preempted, *self.queue.waiting()]

    def _next_waiting(self) -> Sequence | None:
        if not self._free_slots:
            return None
        if self._preempted:
            # Its last token must be known before its history can be computed again.
            return self._preempted[0] if self._preempted[0].in_flight == 0 else None
        return self.queue.peek()

    def _admit(self, sequence: Sequence, budget: int) -> int:
        """Start a waiting sequence if its first chunk fits; how many tokens that chunk has."""
        found = self._cached_prefix(sequence)
        cached = len(found) * BLOCK_TOKENS
        count = min(len(sequence.tokens) - cached, budget)
        fresh = -(-(cached + count) // BLOCK_TOKENS) - len(found)
        # Room for the whole prompt is asked for, though only the first chunk's is taken.
        whole = len(sequence.tokens) // BLOCK_TOKENS + 1 - len(found)
        if whole + sum(self.pool.is_idle(block) for block in found) > self.pool.available:
            return 0
        if self._preempted:
            self._preempted.popleft()
        else:
            self.queue.pop()
            sequence.cached_tokens = cached
        for block in found:
            self.pool.share(block)
        sequence.blocks.extend(found)
        sequence.blocks.extend(self.pool.take() for _ in range(fresh))
        sequence.computed = cached
        sequence.slot = self._free_slots.pop()
        self.running.append(sequence)
        return count

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the beginning of the sequence; at least one token is left to compute."""
        found = []
        for index in range((len(sequence.tokens) - 1) // BLOCK_TOKENS):
            block = self.pool.find(sequence.digest(index))
            if block is None:
                break
            found.append(block)
        return found

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` more positions; False if somebody had to be preempted for them.

        The youngest is, which may be the sequence itself.
        """
        wanted = -(-(sequence.computed + count) // BLOCK_TOKENS) - len(sequence.blocks)
        enough = wanted <= self.pool.available
        while wanted > self.pool.available:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.blocks.extend(self.pool.take() for _ in range(wanted))
        return enough

    def _preempt(self, sequence: Sequence) -> None:
        """Stop a sequence for now; it is computed again later, and its tokens stay the same."""
        self.running.remove(sequence)
        self._give_back(sequence)
        self._preempted.appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        del sequence.blocks[:]
        self._free_slots.append(sequence.slot)
        sequence.slot, sequence.computed, sequence.published = -1, 0, 0

    def _step(self, sequence: Sequence, count: int) -> SequenceStep:
        """The message for a chunk; after it the sequence counts as computed so far."""
        start, end = sequence.computed, sequence.computed + count
        samples = end == len(sequence.tokens) + sequence.in_flight
        known = end <= len(sequence.tokens)
        step = SequenceStep(
            slot=sequence.slot,
            start=start,
            tokens=sequence.tokens[start:end] if known else [],
            blocks=sequence.blocks.tobytes(),
            sampling=sequence.sampling if samples else None,
        )
        sequence.computed = end
        sequence.in_flight += samples
        self._publish(sequence)
        return step

    def _publish(self, sequence: Sequence) -> None:
        """Make full blocks whose tokens are known findable."""
        full = min(sequence.computed, len(sequence.tokens)) // BLOCK_TOKENS
        for index in range(sequence.published, full):
            self.pool.publish(sequence.blocks[index], sequence.digest(index))
        sequence.published = full
