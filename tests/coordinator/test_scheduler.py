"""Plans, carried out by a model of a worker: each sequence sees exactly its own history.

The "worker" here writes token ids into blocks instead of keys and values. When it samples, it reads
the whole context back through the block table and derives the next token from it, so a wrong block,
position, slot, copy or order changes the output.
"""

import random
from array import array
from collections import deque
from hashlib import sha256

import pytest
from tokenizers import Tokenizer, models

from coordinator.job import Job
from coordinator.jobs import JobQueue
from coordinator.pace import Pace
from coordinator.scheduler import PlannedStep, Scheduler
from coordinator.sequence import Sequence
from coordinator.text import Detokenizer
from shared.embedding_messages import Embed
from shared.messages import BLOCK_TOKENS, Generate, Kind
from shared.worker_messages import Sampling

VOCABULARY = 50
EOS = 7
MAX_TOKENS = 64
_tokenizer = Tokenizer(models.BPE())


def next_token(context: list[int], seed: int) -> int:
    return sha256(array("q", [*context, seed]).tobytes()).digest()[0] % VOCABULARY


class PaperWorker:
    """Does to block memory what the real workers do."""

    def __init__(self, blocks: int, slots: int) -> None:
        self.memory = [-1] * (blocks * BLOCK_TOKENS)
        self.last = [-1] * slots
        self.sums: dict[int, list[int]] = {}
        """By slot: the tokens of a text that have been computed."""

    def run(self, plan: PlannedStep) -> list[int]:
        for copy in plan.copies:
            a, b = copy.source * BLOCK_TOKENS, copy.target * BLOCK_TOKENS
            self.memory[b : b + BLOCK_TOKENS] = self.memory[a : a + BLOCK_TOKENS]
        sampled = []
        for number in range(plan.passes):
            sampled += self._pass(plan, number)
        return sampled

    def _pass(self, plan: PlannedStep, number: int) -> list[int]:
        tables = []
        for step in plan.sequences:
            tokens = [self.last[step.slot]] if number or not step.tokens else step.tokens
            table, start = array("i", step.blocks), step.start + number
            tables.append((table, start + len(tokens)))
            for at, token in enumerate(tokens, start):
                self.memory[table[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS] = token
            if step.pooled:
                read = [] if step.start == 0 else self.sums[step.slot]
                assert len(read) == step.start, "every position is computed once"
                self.sums[step.slot] = read + tokens
        sampled = []
        for step, (table, length) in zip(plan.sequences, tables, strict=True):
            if step.sampling is not None:
                context = [
                    self.memory[table[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS]
                    for at in range(length)
                ]
                token = next_token(context, step.sampling.seed)
                self.last[step.slot] = token
                sampled.append(token)
        return sampled

    def means(self, plan: PlannedStep) -> list[list[int]]:
        """Of the texts that end with a plan; here their tokens."""
        return [self.sums.pop(step.slot) for step in plan.sequences if step.mean_is_due]


def job(
    name: str,
    prompt: list[int],
    new: int,
    eos: int = EOS,
    n: int = 1,
    kind: Kind = "story",
    client: bytes = b"c",
    priority: int = 0,
) -> Job:
    request = Generate(id=name, kind="story", prompt="", priority=priority)
    if kind == "chat":
        request = Generate(id=name, kind="chat", messages=[], priority=priority)
    made = Job(client, request, "m", [])
    for i in range(n):
        made.sequences.append(
            Sequence(
                job_key=made.key,
                tokens=list(prompt),
                prompt_tokens=len(prompt),
                max_new_tokens=new,
                sampling=Sampling(0.0, 0, 1.0, seed=i),
                detokenizer=Detokenizer(_tokenizer, []),
                root_digest=b"",
                end_ids=frozenset([eos]),
                index=i,
                leader=made.sequences[0] if i else None,
            )
        )
    return made


def embedding(name: str, texts: list[list[int]]) -> Job:
    made = Job(b"e", Embed(id=name, texts=[*texts]), "m", [])
    for index, text in enumerate(texts):
        (sequence,) = job(name, text, 1).sequences
        sequence.job_key, sequence.index, sequence.pooled = made.key, index, True
        made.sequences.append(sequence)
    return made


def alone(prompt: list[int], new: int, seed: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(next_token(tokens, seed))
        if tokens[-1] == EOS:
            break
    return tokens


def queue() -> JobQueue:
    return JobQueue({"story": 1, "chat": 1, "embedding": 1})


class Desk:
    """What the engine does around a scheduler, step by step."""

    def __init__(
        self, blocks: int, slots: int, depth: int = 1, budget: int = MAX_TOKENS, passes: int = 1
    ) -> None:
        self.passes = passes
        self.queue = queue()
        self.scheduler = Scheduler(self.queue, blocks, slots, budget)
        self.blocks, self.slots = blocks, slots
        self.worker = PaperWorker(blocks, slots)
        self.depth = depth
        self.sent: deque[tuple[PlannedStep, list[int], list[list[int]]]] = deque()
        self.started: list[Job] = []

    def step(self) -> PlannedStep | None:
        """Plan as far ahead as allowed, then take the oldest result; its plan."""
        while len(self.sent) < (1 if self.scheduler.doubts else self.depth):
            plan = self.scheduler.plan(self.passes)
            if plan is None:
                break
            self.started += plan.started
            self.sent.append((plan, self.worker.run(plan), self.worker.means(plan)))
        if not self.sent:
            return None
        plan, tokens, means = self.sent.popleft()
        assert len(tokens) == plan.passes * len(plan.sampled)
        for sequence, token in zip(plan.sampled * plan.passes, tokens, strict=True):
            if not sequence.finished:
                sequence.append(token)
                if sequence.finish_reason is not None:
                    self.scheduler.end(sequence)
        for sequence, mean in zip(plan.embedded, means, strict=True):
            if not sequence.finished:
                assert mean == sequence.tokens
                self.scheduler.end(sequence)
        return plan

    def lose(self) -> list[Sequence]:
        """The worker is lost, and another one is there; whom it has been computing."""
        under_way = dict.fromkeys(s for plan, *_ in self.sent for s in plan.computed)
        suspects = [sequence for sequence in under_way if not sequence.finished]
        for sequence in suspects:
            sequence.suspect()
        self.scheduler.put_back()
        self.sent.clear()
        self.worker = PaperWorker(self.blocks, self.slots)
        return suspects

    def plan_ahead(self) -> None:
        """Have plans under way."""
        first = self.step()
        assert first is not None
        while len(self.sent) < self.depth and (plan := self.scheduler.plan(self.passes)):
            self.started += plan.started
            self.sent.append((plan, self.worker.run(plan), self.worker.means(plan)))

    def cancel(self, victim: Job) -> None:
        if victim not in self.started:
            self.queue.remove(victim)
        for sequence in victim.sequences:
            if victim in self.started and not sequence.finished:
                self.scheduler.end(sequence)


@pytest.mark.parametrize("loss", [0.0, 0.1])
@pytest.mark.parametrize("passes", [1, 3, 8])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("blocks", [12, 20, 200])
def test_every_sequence_gets_what_it_gets_alone(
    blocks: int, depth: int, passes: int, loss: float
) -> None:
    """Mixed lengths, shared prefixes, several answers, some cancelled, too little memory for all,
    and workers that are lost again and again with plans under way.
    """
    random.seed(blocks * 100 + depth * 10 + passes)
    common = [random.randrange(VOCABULARY) for _ in range(40)]
    jobs = []
    for i in range(40):
        tail = [random.randrange(VOCABULARY)] * random.randrange(60)
        prompt = common[: random.randrange(1, 40)] + tail
        n = random.choice([1, 1, 2, 4])
        kind: Kind = random.choice(["story", "chat"])
        jobs.append(job(str(i), prompt, random.randrange(1, 60), n=n, kind=kind))
        if i % 4 == 0:
            jobs.append(
                embedding(f"e{i}", [prompt[: 1 + k % len(prompt)] for k in range(5, 50, n)])
            )
    desk = Desk(blocks, slots=8, depth=depth, passes=passes)
    arrivals: deque[Job] = deque(jobs)
    cancelled: list[Job] = []
    while arrivals or not all(j.finished for j in jobs if j not in cancelled):
        if arrivals and random.random() < 0.5:
            desk.queue.add(arrivals.popleft())
        plan = desk.step()
        if plan is not None:
            assert sum(max(1, len(s.tokens)) for s in plan.sequences) <= MAX_TOKENS
            assert all(s.trusted for s in plan.computed) or len(plan.sequences) == 1
        if random.random() < loss:
            desk.lose()
            assert desk.scheduler.pool.used == 0
        unfinished = [j for j in jobs if not j.finished and j not in [*arrivals, *cancelled]]
        if len(cancelled) < 5 and unfinished and random.random() < 0.05:
            cancelled.append(random.choice(unfinished))
            desk.cancel(cancelled[-1])
    while desk.sent:
        desk.step()
    for j in jobs:
        for sequence in j.sequences if j not in cancelled else []:
            prompt = sequence.tokens[: sequence.prompt_tokens]
            expected = alone(prompt, sequence.max_new_tokens, sequence.sampling.seed)
            assert sequence.tokens == (prompt if sequence.pooled else expected)
    assert desk.scheduler.pool.used == 0
    assert not desk.scheduler.running
    assert len(desk.queue) == 0
    assert desk.queue.tokens == 0
    assert sorted(desk.scheduler._free_slots) == list(range(8))


@pytest.mark.parametrize("passes", [1, 8])
def test_after_a_loss_those_who_were_under_way_go_on_one_by_one_and_then_together(
    passes: int,
) -> None:
    desk = Desk(200, slots=3, depth=2, passes=passes)
    jobs = [job(str(i), [i] * 20, 40, eos=-1) for i in range(4)]
    for one in jobs:
        desk.queue.add(one)
    while not desk.scheduler.running or desk.scheduler.running[-1].new_tokens < 3:
        desk.step()
    desk.plan_ahead()
    first = [j.sequences[0] for j in jobs[:3]]
    reached = {s: len(s.tokens) + s.in_flight for s in first}
    assert desk.lose() == first
    order: list[Sequence] = []
    while desk.scheduler.doubts:
        plan = desk.scheduler.plan(passes)
        assert plan is not None
        (alone,) = plan.computed if desk.scheduler.doubts else [None]
        if alone is None:
            assert plan.computed == first, "the oldest is first again; who waits goes on waiting"
            break
        assert desk.scheduler.running == [alone]
        assert desk.scheduler.plan(passes) is None, "no other plan is under way"
        order += [alone] if alone not in order else []
        (token,) = desk.worker.run(plan)
        alone.append(token)
        assert alone.trusted is (len(alone.tokens) > reached[alone])
    assert order == first[::-1]


def test_one_that_is_under_way_in_losses_one_after_the_other_counts_them() -> None:
    desk = Desk(200, slots=4)
    jobs = [job(str(i), [i] * 20, 40, eos=-1) for i in range(3)]
    for one in jobs:
        desk.queue.add(one)
    a, b, c = (one.sequences[0] for one in jobs)
    desk.plan_ahead()
    assert desk.lose() == [a, b, c]
    assert [s.losses for s in (a, b, c)] == [1, 1, 1]
    while not c.trusted:
        desk.step()
    desk.plan_ahead()
    assert desk.lose() == [b], "c is trusted, and it is b's turn"
    assert [s.losses for s in (a, b, c)] == [1, 2, 1]
    while not all(s.trusted for s in (a, b, c)):
        desk.step()
    desk.step()
    desk.plan_ahead()
    assert desk.lose() == [a, b, c]
    assert [s.losses for s in (a, b, c)] == [1, 1, 1], "they were trusted between"


def test_one_that_runs_alone_may_be_cancelled() -> None:
    desk = Desk(200, slots=4)
    jobs = [job(str(i), [i] * 20, 10, eos=-1) for i in range(3)]
    for one in jobs:
        desk.queue.add(one)
    desk.plan_ahead()
    desk.lose()
    desk.step()
    running, waiting = jobs[2], jobs[0]
    assert desk.scheduler.running == running.sequences
    desk.cancel(running)
    desk.cancel(waiting)
    while desk.step() is not None:
        pass
    assert jobs[1].finished
    assert desk.scheduler.pool.used == 0


def test_a_text_to_embed_is_computed_whole_and_leaves_its_prefix_to_others() -> None:
    desk = Desk(40, slots=8)
    prompt = list(range(2, 40))
    for first, then in (
        (job("a", prompt, 1), embedding("b", [prompt])),
        (embedding("c", [[*prompt, 1] * 2]), job("d", [*prompt, 1] * 2, 1)),
    ):
        for one in (first, then):
            desk.queue.add(one)
            while not one.finished:
                assert desk.step() is not None
        assert first.sequences[0].cached_tokens == 0
        # The worker has checked that every position of a text was computed.
        cached = 0 if then.sequences[0].pooled else 64
        assert then.sequences[0].cached_tokens == cached


def test_a_text_may_fill_the_whole_cache() -> None:
    desk = Desk(4, slots=2)
    text = embedding("a", [[1] * 4 * BLOCK_TOKENS])
    desk.queue.add(text)
    assert desk.step() is not None
    assert text.finished


def test_texts_of_a_request_take_turns_with_jobs_that_start() -> None:
    desk = Desk(400, slots=20, budget=8)
    many = embedding("many", [[i] * 8 for i in range(20)])
    desk.queue.add(many)
    desk.step()
    for i in range(3):
        desk.queue.add(job(str(i), [i] * 8, 1))
    order = []
    while not many.finished:
        plan = desk.step()
        assert plan is not None
        order += ["text"] * len(plan.embedded) + [s.job_key[1] for s in plan.sampled]
    assert order[:6] == ["text", "0", "text", "1", "text", "2"]
    assert order.count("text") == 19


def test_a_long_prompt_does_not_stop_those_who_write() -> None:
    desk = Desk(400, slots=8)
    writers = [job(str(i), [i], 100, eos=-1) for i in range(4)]
    for writer in writers:
        desk.queue.add(writer)
    desk.step()
    reader = job("long", [1] * 1000, 1)
    desk.queue.add(reader)
    steps = 0
    while reader.sequences[0].new_tokens == 0:
        plan = desk.step()
        assert plan is not None
        assert all(w.sequences[0] in plan.sampled for w in writers), "all advance in every step"
        steps += 1
    assert steps == -(-1000 // (MAX_TOKENS - 4)), "the prompt gets all of the budget that is left"


def test_a_second_turn_computes_only_what_is_new() -> None:
    desk = Desk(100, slots=4, budget=512)
    first = job("first", list(range(40)) * 3, 30, eos=-1)
    desk.queue.add(first)
    while not first.finished:
        desk.step()
    history = first.sequences[0].tokens
    second = job("second", [*history, 1, 2, 3], 5, eos=-1)
    desk.queue.add(second)
    plan = desk.step()
    assert plan is not None
    known = (len(history) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert second.sequences[0].cached_tokens == known
    assert len(plan.sequences[0].tokens) == len(history) + 3 - known


def test_two_users_share_the_blocks_of_a_common_prefix() -> None:
    desk = Desk(100, slots=4, budget=512)
    prefix = list(range(48))
    for name in "ab":
        desk.queue.add(job(name, [*prefix, ord(name)], 5, eos=-1))
    desk.step()
    a, b = desk.scheduler.running
    assert list(a.blocks[:3]) == list(b.blocks[:3])
    assert desk.scheduler.pool.used == 5


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40, 64])
def test_answers_to_one_prompt_share_its_blocks_and_copy_the_one_they_write_to(length: int) -> None:
    desk = Desk(100, slots=8, budget=512)
    asked = job("n", list(range(length)), 20, eos=-1, n=4)
    desk.queue.add(asked)
    first = desk.step()
    assert first is not None
    assert [len(s.tokens) for s in first.sequences] == [length], "the first answer reads the prompt"
    second = desk.step()
    assert second is not None
    assert [len(s.tokens) for s in second.sequences] == [1, 1, 1, 1]
    assert len(second.copies) == 3
    full = (length - 1) // BLOCK_TOKENS
    assert len({tuple(s.blocks[:full]) for s in asked.sequences}) == 1
    assert len({s.blocks[full] for s in asked.sequences}) == 4
    while not asked.finished:
        desk.step()
    for sequence in asked.sequences:
        assert sequence.tokens == [
            *range(length),
            *alone_without_end(list(range(length)), 20, sequence.sampling.seed),
        ]


def alone_without_end(prompt: list[int], new: int, seed: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(next_token(tokens, seed))
    return tokens[len(prompt) :]


def order(waiting: JobQueue) -> list[str]:
    expected = {j.id: position for j, position in waiting.positions()}
    served: list[str] = []
    counts = {"story": 0, "chat": 0, "embedding": 0}
    while waiting.peek() is not None:
        popped = waiting.pop()
        assert expected[popped.id] == counts[popped.kind], "positions tell the order"
        counts[popped.kind] += 1
        served.append(popped.id)
    return served


def test_story_and_chat_take_turns() -> None:
    waiting = queue()
    for i in range(6):
        waiting.add(job(str(i), [1], 1, kind="story" if i < 4 else "chat"))
    assert order(waiting) == ["0", "4", "1", "5", "2", "3"]


def test_kinds_are_served_by_weight() -> None:
    waiting = JobQueue({"story": 1, "chat": 3})
    for i in range(8):
        waiting.add(job(f"s{i}", [1], 1, kind="story"))
        waiting.add(job(f"c{i}", [1], 1, kind="chat"))
    assert sum(name.startswith("c") for name in order(waiting)[:8]) == 6


def test_a_busy_client_does_not_keep_others_waiting() -> None:
    waiting = queue()
    for i in range(5):
        waiting.add(job(f"busy{i}", [1], 1, client=b"busy"))
    assert waiting.add(job("other0", [1], 1, client=b"other")) == 1
    waiting.add(job("other1", [1], 1, client=b"other"))
    assert order(waiting) == ["busy0", "other0", "busy1", "other1", "busy2", "busy3", "busy4"]


def test_a_lower_priority_number_goes_first() -> None:
    waiting = queue()
    waiting.add(job("later", [1], 1, priority=5))
    waiting.add(job("normal", [1], 1))
    waiting.add(job("urgent", [1], 1, priority=-1, kind="chat"))
    assert order(waiting) == ["urgent", "normal", "later"]


def test_a_cancelled_job_leaves_the_queue_and_its_turn_to_the_next() -> None:
    waiting = queue()
    jobs = [job(str(i), [1, 2], 1) for i in range(3)]
    for j in jobs:
        waiting.add(j)
    assert waiting.peek() is jobs[0]
    waiting.remove(jobs[0])
    assert waiting.peek() is jobs[1]
    assert waiting.tokens == 4


def test_steps_share_a_plan_only_while_nobody_waits_for_them() -> None:
    desk = Desk(200, slots=2, passes=8)
    desk.queue.add(job("first", [1, 2, 3], 20, eos=-1))
    plans = [desk.step(), desk.step()]
    assert [plan.passes for plan in plans if plan] == [1, 8], "the prompt, then tokens"
    desk.queue.add(job("second", [4] * 70, 20, eos=-1))
    plan = desk.step()
    assert plan is not None
    assert plan.passes == 1, "the second one comes in"
    plan = desk.step()
    assert plan is not None
    assert plan.passes == 1, "and reads the rest of its prompt"
    desk.queue.add(job("third", [5], 20, eos=-1))
    plan = desk.step()
    assert plan is not None
    assert plan.passes == 8, "without a free slot the third one waits anyway"


def test_no_sequence_is_computed_beyond_its_last_token() -> None:
    desk = Desk(200, slots=2, passes=8)
    desk.queue.add(job("a", [1], 5, eos=-1))
    desk.queue.add(job("b", [1], 30, eos=-1))
    passes = []
    while (plan := desk.step()) is not None:
        passes.append(plan.passes)
    assert passes == [1, 4, 8, 8, 8, 1]


def test_short_steps_share_a_plan_and_long_ones_do_not() -> None:
    pace = Pace(8)
    assert pace.passes == 1, "nothing has been measured yet"
    for _ in range(100):
        pace.took(0.0004 * pace.passes, pace.passes)
    assert pace.passes == 5
    for _ in range(100):
        pace.took(0.0001 * pace.passes, pace.passes)
    assert pace.passes == 8
    for _ in range(100):
        pace.took(0.03 * pace.passes, pace.passes)
    assert pace.passes == 1
