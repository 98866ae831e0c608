"""Plans, carried out by a model of a worker: each sequence sees exactly its own history.

The "worker" here writes token ids into blocks instead of keys and values. When it samples, it reads
the whole context back through the block table and derives the next token from it, so a wrong block,
position, slot or order changes the output.
"""

import random
from array import array
from collections import deque
from hashlib import sha256

import pytest
from tokenizers import Tokenizer, models

from coordinator.jobs import JobQueue
from coordinator.kv_blocks import BLOCK_TOKENS
from coordinator.scheduler import PlannedStep, Scheduler
from coordinator.sequence import Sequence
from coordinator.text import Detokenizer
from shared.messages import Sampling, SequenceStep

GREEDY = Sampling(0.0, 0, 1.0, 0)
VOCABULARY = 50
EOS = 7
_tokenizer = Tokenizer(models.BPE())


def next_token(context: list[int]) -> int:
    return sha256(array("i", context).tobytes()).digest()[0] % VOCABULARY


class PaperWorker:
    """Does to block memory what the real workers do."""

    def __init__(self, blocks: int, slots: int) -> None:
        self.memory = [-1] * (blocks * BLOCK_TOKENS)
        self.last = [-1] * slots

    def run(self, steps: list[SequenceStep]) -> list[int]:
        tables = []
        for step in steps:
            tokens = step.tokens or [self.last[step.slot]]
            table = array("i", step.blocks)
            tables.append((table, step.start + len(tokens)))
            for at, token in enumerate(tokens, step.start):
                self.memory[table[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS] = token
        sampled = []
        for step, (table, length) in zip(steps, tables, strict=True):
            if step.sampling is not None:
                context = [
                    self.memory[table[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS]
                    for at in range(length)
                ]
                token = next_token(context)
                self.last[step.slot] = token
                sampled.append(token)
        return sampled


def sequence(name: str, prompt: list[int], new: int, eos: int = EOS) -> Sequence:
    return Sequence(
        client=b"c",
        request_id=name,
        kind=random.choice(["story", "chat"]),
        model="m",
        stream=True,
        tokens=list(prompt),
        prompt_tokens=len(prompt),
        max_new_tokens=new,
        eos_ids=frozenset([eos]),
        sampling=GREEDY,
        detokenizer=Detokenizer(_tokenizer, []),
    )


def alone(prompt: list[int], new: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS:
            break
    return tokens


def run_all(
    scheduler: Scheduler,
    worker: PaperWorker,
    depth: int,
    arrivals: deque[Sequence],
    cancel: int = 0,
) -> int:
    """Serve everything; how many steps it took."""
    sent: deque[tuple[PlannedStep, list[int]]] = deque()
    steps = 0
    while True:
        if arrivals and random.random() < 0.5:
            scheduler.queue.add(arrivals.popleft())
        while len(sent) < depth and (plan := scheduler.plan()) is not None:
            steps += 1
            assert sum(max(1, len(s.tokens)) for s in plan.sequences) <= 64
            sent.append((plan, worker.run(plan.sequences)))
        if sent:
            plan, tokens = sent.popleft()
            for seq, token in zip(plan.sampled, tokens, strict=True):
                if not seq.finished and seq.append(token) is not None:
                    scheduler.end(seq)
        elif not arrivals and not scheduler.everyone():
            return steps
        if cancel and random.random() < 0.05 and scheduler.everyone():
            victim = random.choice(scheduler.everyone())
            victim.max_new_tokens = -1  # marks it for the test
            scheduler.end(victim)
            cancel -= 1


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("blocks", [12, 20, 200])
def test_every_sequence_gets_what_it_gets_alone(blocks: int, depth: int) -> None:
    """Mixed lengths, shared prefixes, some cancelled, memory for a part of them only."""
    random.seed(blocks * 10 + depth)
    common = [random.randrange(VOCABULARY) for _ in range(40)]
    prompts = [
        common[: random.randrange(1, 40)] + [random.randrange(VOCABULARY)] * random.randrange(60)
        for _ in range(40)
    ]
    wanted = [random.randrange(1, 60) for _ in prompts]
    everyone = [
        sequence(str(i), p, n) for i, (p, n) in enumerate(zip(prompts, wanted, strict=True))
    ]
    scheduler = Scheduler(JobQueue(), blocks, slots=8, max_batched_tokens=64)
    run_all(scheduler, PaperWorker(blocks, 8), depth, deque(everyone), cancel=5)
    finished = 0
    for seq, prompt, new in zip(everyone, prompts, wanted, strict=True):
        if seq.max_new_tokens == -1:
            continue
        assert seq.tokens == alone(prompt, new)
        finished += 1
    assert finished >= 35
    assert scheduler.pool.used == 0
    assert not scheduler.running
    assert sorted(scheduler._free_slots) == list(range(8))


def test_a_long_prompt_does_not_stop_those_who_write() -> None:
    scheduler = Scheduler(JobQueue(), 400, slots=8, max_batched_tokens=64)
    worker = PaperWorker(400, 8)
    writers = [sequence(str(i), [i], 100, eos=-1) for i in range(4)]
    for writer in writers:
        scheduler.queue.add(writer)
    plan = scheduler.plan()
    assert plan is not None
    for seq, token in zip(plan.sampled, worker.run(plan.sequences), strict=True):
        seq.append(token)
    reader = sequence("long", [1] * 1000, 1)
    scheduler.queue.add(reader)
    steps = 0
    while reader.new_tokens == 0:
        plan = scheduler.plan()
        assert plan is not None
        assert all(w in plan.sampled for w in writers), "every writer advances in every step"
        for seq, token in zip(plan.sampled, worker.run(plan.sequences), strict=True):
            seq.append(token)
        steps += 1
    assert steps == -(-1000 // 60), "the prompt gets all of the budget that is left"


def test_a_second_turn_computes_only_what_is_new() -> None:
    scheduler = Scheduler(JobQueue(), 100, slots=4, max_batched_tokens=512)
    worker = PaperWorker(100, 4)
    first = sequence("first", list(range(40)) * 3, 30, eos=-1)
    run_all_of = deque([first])
    random.seed(1)
    while run_all_of or scheduler.everyone():
        if run_all_of:
            scheduler.queue.add(run_all_of.popleft())
        plan = scheduler.plan()
        assert plan is not None
        for seq, token in zip(plan.sampled, worker.run(plan.sequences), strict=True):
            if seq.append(token) is not None:
                scheduler.end(seq)
    second = sequence("second", [*first.tokens, 1, 2, 3], 5, eos=-1)
    scheduler.queue.add(second)
    plan = scheduler.plan()
    assert plan is not None
    known = (len(first.tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert second.cached_tokens == known
    assert len(plan.sequences[0].tokens) == len(second.tokens) - known


def test_two_users_share_the_blocks_of_a_common_prefix() -> None:
    scheduler = Scheduler(JobQueue(), 100, slots=4, max_batched_tokens=512)
    prefix = list(range(48))
    for name in "ab":
        scheduler.queue.add(sequence(name, [*prefix, ord(name)], 5))
    assert scheduler.plan() is not None
    a, b = scheduler.running
    assert list(a.blocks[:3]) == list(b.blocks[:3])
    assert scheduler.pool.used == 5


def test_story_and_chat_take_turns() -> None:
    queue = JobQueue()
    for i in range(6):
        seq = sequence(str(i), [1], 1)
        seq.kind = "story" if i < 4 else "chat"
        queue.add(seq)
    assert [queue.pop().request_id for _ in range(6)] == ["0", "4", "1", "5", "2", "3"]
