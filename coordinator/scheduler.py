"""Continuous batching for one model: which tokens of which sequences go into the next step.

Plans may be made before earlier ones have come back. Workers run plans in the order they were sent,
so a block that was released can be given away at once, and a block counts as filled as soon as the
plan that fills it has been made.
"""

from collections import deque
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from coordinator.job import Job
from coordinator.jobs import JobQueue
from coordinator.kv_blocks import BlockPool
from coordinator.sequence import Sequence
from shared.messages import BLOCK_TOKENS
from shared.worker_messages import BlockCopy, SequenceStep


@dataclass(frozen=True)
class PlannedStep:
    """What goes to the workers, and who gets the tokens that come back, in order."""

    sequences: list[SequenceStep]
    copies: list[BlockCopy]
    """To be made before the step."""
    computed: list[Sequence]
    """Of `sequences`, in order."""
    sampled: list[Sequence]
    embedded: list[Sequence]
    """Whose mean hidden states come back, in order."""
    started: list[Job]
    """Jobs that run for the first time."""
    passes: int
    """Tokens that each of `sampled` gets."""


class Scheduler:
    """Waiting and running sequences of one model, its slots and its KV blocks."""

    def __init__(self, queue: JobQueue, blocks: int, slots: int, max_batched_tokens: int) -> None:
        self.queue = queue
        self.pool = BlockPool(blocks)
        self.running: list[Sequence] = []  # oldest first
        self._alone: deque[Sequence] = deque()
        """They get steps of their own, before anybody else: the last one first, until it is trusted."""
        self._returning: deque[Sequence] = deque()
        """Preempted ones, oldest first, and answers of started jobs that wait for the prompt's KV."""
        self._texts: deque[Sequence] = deque()
        """Of started embedding jobs, which take turns with jobs that have not started."""
        self._text_is_next = False
        self._copies: list[BlockCopy] = []
        self._slots = slots
        self._free_slots = list(range(slots))
        self._max_batched_tokens = max_batched_tokens

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.pool.total * BLOCK_TOKENS

    @property
    def doubts(self) -> bool:
        """Whether somebody has steps of its own: no other plan should be under way beside them."""
        return bool(self._alone)

    def test(self, sequence: Sequence) -> None:
        """Run a sequence of a started job before anybody else, in steps of its own."""
        sequence.trusted_at = len(sequence.tokens) + 1
        self._alone.append(sequence)

    def put_back(self) -> None:
        """The workers were lost, with all KV memory: every sequence waits to be computed again.

        Its tokens stay the same, as after a preemption. Those that are not trusted run alone at first.
        """
        waiting = dict.fromkeys((*self._alone, *self.running, *self._returning))
        for sequence in waiting:
            sequence.forget_computed()
            sequence.in_flight = 0
        self.running.clear()
        self.pool = BlockPool(self.pool.total)
        self._free_slots = list(range(self._slots))
        self._copies.clear()
        self._alone = deque(s for s in waiting if not s.trusted)
        self._returning = deque(s for s in waiting if s.trusted)

    def plan(self, most_passes: int) -> PlannedStep | None:
        """The next step, or None when there is nothing to compute now.

        While all sequences decode, it may have up to `most_passes` forward passes.
        """
        while self._alone and self._alone[-1].trusted:
            self._preempt(self._alone.pop())  # until all of them are
        if self._alone:
            return self._plan_alone(self._alone[-1])
        budget = self._max_batched_tokens
        chunks: list[tuple[Sequence, int]] = []
        readers = {s for s in self.running if s.computed < s.prompt_tokens}
        short = False
        # Sequences that write come before those that still read their prompt: a long prompt must
        # not make them wait.
        wanted = [(pending, s) for s in self.running if (pending := s.pending)]
        if readers:
            wanted.sort(key=lambda item: item[0] > 1)
        passes = self._passes(wanted, most_passes)
        for pending, sequence in wanted:
            count = min(pending, budget)
            if sequence.slot < 0 or count == 0:
                continue  # preempted in this very loop, or the budget is used up
            end = sequence.computed + count + passes - 1
            if end > len(sequence.blocks) * BLOCK_TOKENS:
                short = not self._make_room(sequence, end) or short
            chunks.append((sequence, count))
            budget -= count
        if short:  # who was preempted, perhaps after it had been given a chunk, does not run
            chunks = [(s, n) for s, n in chunks if s.slot >= 0]
        steps = [self._step(sequence, count, passes) for sequence, count in chunks]
        started: list[Job] = []
        # While memory is short nobody new comes in, least of all who has just been preempted.
        while budget and not short and self._free_slots:
            waiting, job = self._next_waiting(readers)
            count = self._admit(waiting, budget) if waiting is not None else 0
            if waiting is None or count == 0:
                break
            if job is None:
                self._wait_no_more(waiting)
            else:
                self.queue.pop()
                others = self._texts if waiting.pooled else self._returning
                others.extend(job.sequences[1:])
                started.append(job)
            self._text_is_next = job is not None
            readers.add(waiting)  # what it reads is in the cache from the next step on
            chunks.append((waiting, count))
            steps.append(self._step(waiting, count))  # at once: the next one may share its blocks
            budget -= count
        return self._planned([s for s, _ in chunks], steps, started, passes) if steps else None

    def _plan_alone(self, sequence: Sequence) -> PlannedStep | None:
        """A step of nobody else; None while its last one is under way."""
        if sequence.in_flight:
            return None
        if sequence.slot < 0:
            count = self._admit(sequence, self._max_batched_tokens)
        else:
            count = min(sequence.pending, self._max_batched_tokens)
            self._make_room(sequence, sequence.computed + count)
        assert count > 0, "all memory is its own, and it has not ended"
        return self._planned([sequence], [self._step(sequence, count)], [], 1)

    def _planned(
        self,
        computed: list[Sequence],
        steps: list[SequenceStep],
        started: list[Job],
        passes: int,
    ) -> PlannedStep:
        copies, self._copies = self._copies, []
        planned = list(zip(computed, steps, strict=True))
        sampled = [s for s, step in planned if step.sampling]
        embedded = [s for s, step in planned if step.mean_is_due]
        return PlannedStep(steps, copies, computed, sampled, embedded, started, passes)

    def end(self, sequence: Sequence) -> None:
        """A sequence of a started job is done, failed or cancelled: give back all it holds."""
        sequence.finished = True
        if sequence.slot < 0 or sequence in self._alone:
            self._wait_no_more(sequence)
        if sequence.slot >= 0:
            self.running.remove(sequence)
            self._give_back(sequence)

    def _wait_no_more(self, sequence: Sequence) -> None:
        """Take out a sequence of a started job wherever it waits."""
        for waiting in (self._alone, self._texts, self._returning):
            if sequence in waiting:
                waiting.remove(sequence)

    def _passes(self, wanted: list[tuple[int, Sequence]], most: int) -> int:
        """How many passes the next step has; those who wait to start or read should not wait longer."""
        newcomers = self._returning or self._texts or self.queue.peek() is not None
        if most == 1 or not wanted or (newcomers and self._free_slots):
            return 1
        if len(wanted) > self._max_batched_tokens or any(pending > 1 for pending, _ in wanted):
            return 1
        passes = min(most, *(s.remaining for _, s in wanted))
        blocks = sum(-(-(s.computed + passes) // BLOCK_TOKENS) - len(s.blocks) for _, s in wanted)
        return passes if blocks <= self.pool.available else 1

    def _next_waiting(self, readers: AbstractSet[Sequence]) -> tuple[Sequence | None, Job | None]:
        """Who may start now, and its job if that has not started yet.

        `readers` still read their prompt: those who want to share it wait.
        """
        for sequence in self._returning:
            # Its last token must be known before its history can be computed again.
            if sequence.in_flight == 0 and sequence.leader not in readers:
                return sequence, None
        if self._returning:
            return None, None
        job = self.queue.peek()
        if self._texts and (self._text_is_next or job is None):
            return self._texts[0], None
        return (job.sequences[0], job) if job is not None else (None, None)

    def _admit(self, sequence: Sequence, budget: int) -> int:
        """Start a waiting sequence if there is room; how many tokens its first chunk has."""
        found, cached = self._found_blocks(sequence)
        count = min(len(sequence.tokens) - cached, budget)
        # Room for the whole prompt is asked for, though only the first chunk's is taken; and for
        # the copy of a found block that will be written to.
        positions = len(sequence.tokens) + (not sequence.pooled)
        whole = -(-positions // BLOCK_TOKENS) - len(found)
        whole += cached < len(found) * BLOCK_TOKENS
        if whole + sum(self.pool.is_idle(block) for block in found) > self.pool.available:
            return 0
        for block in found:
            self.pool.share(block)
        fresh = -(-(cached + count) // BLOCK_TOKENS) - len(found)
        sequence.blocks.extend(found)
        sequence.blocks.extend(self.pool.take() for _ in range(fresh))
        sequence.computed = cached
        sequence.slot, sequence.fresh_in_slot = self._free_slots.pop(), True
        if not sequence.admitted:
            sequence.admitted, sequence.cached_tokens = True, cached
        self.running.append(sequence)
        self._own(sequence, cached // BLOCK_TOKENS)
        return count

    def _own(self, sequence: Sequence, index: int) -> None:
        """Copy on write: before block number `index` is written to, nobody else may hold it."""
        block = sequence.blocks[index]
        if self.pool.is_shared(block):
            sequence.blocks[index] = self.pool.take()
            self._copies.append(BlockCopy(block, sequence.blocks[index]))
            self.pool.release([block])

    def _found_blocks(self, sequence: Sequence) -> tuple[list[int], int]:
        """Blocks that hold the beginning of a sequence, and how many of its tokens they spare.

        At least one token is left to compute, for its logits; of a pooled one all, as the cache has no
        hidden states.
        """
        if sequence.pooled:
            return [], 0
        leader = sequence.leader
        if leader is not None and leader.slot >= 0 and not sequence.new_tokens:
            blocks = leader.blocks[: -(-leader.prompt_tokens // BLOCK_TOKENS)]
            return list(blocks), sequence.prompt_tokens - 1
        found = self._cached_prefix(sequence)
        return found, len(found) * BLOCK_TOKENS

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the beginning of the sequence; at least one token is left to compute."""
        found = []
        for index in range((len(sequence.tokens) - 1) // BLOCK_TOKENS):
            block = self.pool.find(sequence.digest(index))
            if block is None:
                break
            found.append(block)
        return found

    def _make_room(self, sequence: Sequence, end: int) -> bool:
        """Blocks for the positions up to `end`; False if somebody had to be preempted for them.

        The youngest is, which may be the sequence itself.
        """
        wanted = -(-end // BLOCK_TOKENS) - len(sequence.blocks)
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
        self._returning.appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        self._free_slots.append(sequence.slot)
        sequence.forget_computed()

    def _step(self, sequence: Sequence, count: int, passes: int = 1) -> SequenceStep:
        """The message for a chunk; after its passes the sequence counts as computed so far."""
        start, end = sequence.computed, sequence.computed + count
        samples = end == len(sequence.tokens) + sequence.in_flight
        known = end <= len(sequence.tokens)
        step = SequenceStep(
            slot=sequence.slot,
            start=start,
            tokens=sequence.tokens[start:end] if known else [],
            blocks=sequence.blocks.tobytes(),
            sampling=sequence.sampling if samples and not sequence.pooled else None,
            history=sequence.history()
            if sequence.fresh_in_slot and sequence.sampling.penalises
            else None,
            pooled=len(sequence.tokens) if sequence.pooled else 0,
            request=sequence.job_key[1] if sequence.fresh_in_slot else "",
        )
        sequence.fresh_in_slot = False
        sequence.computed = end + passes - 1
        sequence.in_flight += passes if samples else 0
        if sequence.computed // BLOCK_TOKENS > sequence.published:
            self._publish(sequence)
        return step

    def _publish(self, sequence: Sequence) -> None:
        """Make full blocks whose tokens are known findable."""
        full = min(sequence.computed, len(sequence.tokens)) // BLOCK_TOKENS
        for index in range(sequence.published, full):
            self.pool.publish(sequence.blocks[index], sequence.digest(index))
        sequence.published = full
