"""The sharded sampler against what it should choose, worked out plainly on whole logits."""

import functools
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from shared.worker_messages import (
    AllocateKV,
    CommSetup,
    History,
    LoadModel,
    Sampling,
    SequenceStep,
    StepPlan,
)
from tests.worker.sampling_ranks import (
    GREEDY,
    Batch,
    Row,
    changed_logits,
    expected_token,
    sample_on_ranks,
    tokens_of,
)
from worker.comm.base import Floats
from worker.comm.open import open_communicator
from worker.runner import Runner
from worker.sampling.candidates import best
from worker.sampling.sampler import Sampled

WORLDS = (1, 2, 3, 8)
VOCABULARIES = (1, 5, 40, 200, 2000)
"""The first four give ranks without tokens; the last one gives each rank more than it sends."""

replace = msgspec.structs.replace
LIKE_A_MODELS = Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=1)


def history(prompt: Sequence[int], output: Sequence[int]) -> History:
    return History(array("i", prompt).tobytes(), array("i", output).tobytes())


def random_logits(rng: np.random.Generator, vocab: int) -> Floats:
    """Of many shapes: peaked, flat, with ties, with tokens that are ruled out."""
    scale = float(rng.choice([0.01, 1, 3, 10]))
    logits = (rng.normal(size=vocab) * scale).astype(np.float32)
    match rng.integers(6):
        case 0:
            logits = np.round(logits)
        case 1:
            logits[:] = 0
        case 2:
            logits[rng.random(vocab) < 0.5] = -np.inf
            logits[rng.integers(vocab)] = 1
    return logits


def random_sampling(rng: np.random.Generator, vocab: int) -> Sampling:
    """Every parameter at its neutral value, at extremes and in between."""
    ids = [int(i) for i in rng.integers(vocab, size=3)]
    s = Sampling(
        temperature=float(rng.choice([0, 0, 0.1, 0.8, 1, 2.5, 100])),
        top_k=int(rng.choice([0, 0, 1, 2, 40, 100, vocab, vocab + 7, 300])),
        top_p=float(rng.choice([1, 1, 1e-9, 0.1, 0.5, 0.95, 0.999999])),
        min_p=float(rng.choice([0, 0, 0.05, 0.9, 1])),
        seed=int(rng.integers(1 << 63)),
    )
    if rng.random() < 0.3:
        s = replace(s, logit_bias=dict(zip(ids, [100.0, -100.0, 0.5], strict=True)))
    if rng.random() < 0.3:
        s = replace(s, banned=ids, banned_before=int(rng.integers(40)))
    return s


def random_rows(vocab: int, count: int) -> list[Row]:
    rng = np.random.default_rng(vocab)
    return [
        Row(random_logits(rng, vocab), random_sampling(rng, vocab), int(rng.integers(4096)))
        for _ in range(count)
    ]


@functools.cache
def random_cases(vocab: int) -> tuple[list[Row], list[int]]:
    rows = random_rows(vocab, 600)
    return rows, [expected_token(row) for row in rows]


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("world", WORLDS)
def test_every_number_of_workers_chooses_the_reference_token(world: int, vocab: int) -> None:
    rows, expected = random_cases(vocab)
    batches = [Batch(rows[start : start + 50]) for start in range(0, len(rows), 50)]
    outcomes = sample_on_ranks(world, batches)
    assert [token for outcome in outcomes for token in outcome.sampled.tokens] == expected


@functools.cache
def large_cases() -> tuple[list[Row], list[int]]:
    rng = np.random.default_rng(7)
    vocab = 12_011  # no multiple of the 32 tokens that are cut as one
    peaked = (rng.normal(size=vocab) * 3).astype(np.float32)
    tied = np.round(peaked)
    flat = (rng.normal(size=vocab) * 0.1).astype(np.float32)
    rows = [
        Row(logits, replace(LIKE_A_MODELS, top_k=k, top_p=p, min_p=m, temperature=t), position=i)
        for logits in (peaked, tied, flat)
        for i, (t, k, p, m) in enumerate(
            [(0.0, 0, 1, 0), (1, 0, 1, 0), (1, 40, 0.95, 0), (1, 0, 0.9, 0), (1, 0, 1, 0.1)]
        )
    ]
    return rows, [expected_token(row) for row in rows]


@pytest.mark.parametrize("world", WORLDS)
def test_a_large_vocabulary_gives_the_reference_token(world: int) -> None:
    rows, expected = large_cases()
    assert tokens_of(world, rows) == expected


@pytest.mark.parametrize("world", WORLDS)
def test_penalties_count_the_prompt_and_every_token_sampled_since(world: int) -> None:
    rng = np.random.default_rng(3)
    vocab, slots, steps = 300, 12, 30
    logits = [(rng.normal(size=vocab) * 2).astype(np.float32) for _ in range(slots)]
    sampling = [
        replace(
            random_sampling(rng, vocab),
            repetition_penalty=float(rng.choice([1, 1.3, 0.7])),
            presence_penalty=float(rng.choice([0, 1.5, -0.5])),
            frequency_penalty=float(rng.choice([0, 0.7, -0.2])),
        )
        for _ in range(slots)
    ]
    prompts = [[int(i) for i in rng.integers(vocab, size=50)] for _ in range(slots)]
    outputs = [[int(i) for i in rng.integers(vocab, size=rng.integers(9))] for _ in range(slots)]
    begin = {
        slot: history(prompts[slot], outputs[slot])
        for slot in range(slots)
        if sampling[slot].penalises
    }
    batches, expected = [], []
    for step in range(steps):
        # The logits stay the same, so that only what was sampled makes a difference.
        here = [slot for slot in range(slots) if (slot + step) % 4]
        rows = [Row(logits[slot], sampling[slot], step, slot) for slot in here]
        batches.append(Batch(rows, begin if step == 0 else {}))
        tokens = [expected_token(r, prompts[r.slot], outputs[r.slot]) for r in rows]
        for slot, token in zip(here, tokens, strict=True):
            outputs[slot].append(token)
        expected.append(tokens)
    assert [outcome.sampled.tokens for outcome in sample_on_ranks(world, batches)] == expected


def test_a_slots_next_sequence_does_not_inherit_penalties() -> None:
    logits = np.array([1, 0.9, 0.8], dtype=np.float32)
    penalised = replace(GREEDY, frequency_penalty=1.0)
    row = Row(logits, penalised)
    batches = [
        Batch([row], {0: history([], [])}),
        Batch([row]),
        Batch([Row(logits, GREEDY)]),
        Batch([row], {0: history([2], [1])}),
        Batch([row]),
        Batch([row]),
    ]
    tokens = [outcome.sampled.tokens[0] for outcome in sample_on_ranks(2, batches)]
    assert tokens == [0, 1, 0, 0, 2, 0]


def test_penalties_do_what_their_definitions_say() -> None:
    logits = np.array([2, -2, 2, -2, 1, 0], dtype=np.float32)
    s = replace(GREEDY, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    changed = changed_logits(Row(logits, s), prompt=[0, 1, 0], output=[2, 3, 3])
    # [divided, multiplied, divided - 0.25 - 0.5, multiplied - 0.25 - 2 * 0.5, as they were]
    assert changed.tolist() == [1, -4, 0.25, -5.25, 1, 0]


@pytest.mark.parametrize("world", WORLDS)
def test_banned_tokens_are_banned_up_to_their_position_only(world: int) -> None:
    logits = np.array([1, 3, 2], dtype=np.float32)
    s = replace(GREEDY, banned=[1], banned_before=10)
    rows = [Row(logits, s, position) for position in (0, 9, 10, 11)]
    assert tokens_of(world, rows) == [2, 2, 1, 1]


@pytest.mark.parametrize("world", WORLDS)
def test_a_row_gets_the_same_token_alone_and_in_any_batch(world: int) -> None:
    rows = [row for row in random_rows(1000, 60) if row.sampling.temperature > 0]
    together = tokens_of(world, rows)
    backwards = tokens_of(world, rows[::-1])[::-1]
    alone = sample_on_ranks(world, [Batch([row]) for row in rows])
    assert together == backwards == [outcome.sampled.tokens[0] for outcome in alone]


def test_seed_position_and_parameters_decide_and_the_slot_does_not() -> None:
    logits = np.zeros(500, dtype=np.float32)
    free = replace(GREEDY, temperature=1.0, seed=5)
    rows = [
        Row(logits, free, 7, slot=0),
        Row(logits, free, 7, slot=3),
        Row(logits, free, 8),
        Row(logits, replace(free, seed=6), 7),
    ]
    first, other_slot, other_position, other_seed = tokens_of(1, rows)
    assert first == other_slot
    assert len({first, other_position, other_seed}) == 3


@pytest.mark.parametrize("world", WORLDS)
def test_temperatures_close_to_zero_are_greedy(world: int) -> None:
    rng = np.random.default_rng(11)
    logits = rng.normal(size=300).astype(np.float32) * np.float32(1e30)
    rows = [
        Row(logits, replace(GREEDY, temperature=t, top_p=p))
        for t in (5e-324, 1e-300, 1e-30)
        for p in (1.0, 0.9)
    ]
    assert tokens_of(world, rows) == [int(logits.argmax())] * len(rows)


# --- numbers that are none ------------------------------------------------------------------------

WAYS = {
    "greedy": GREEDY,
    "plain": replace(GREEDY, temperature=1.0),
    "top_k": replace(GREEDY, temperature=1.0, top_k=5),
    "top_p": replace(GREEDY, temperature=1.0, top_p=0.9),
    "whole row": replace(GREEDY, temperature=50.0, top_p=0.99),
    "min_p": replace(GREEDY, temperature=1.0, min_p=0.1),
    "logprobs": replace(GREEDY, logprobs=3),
    "penalties": replace(GREEDY, repetition_penalty=1.5),
    "bias": replace(GREEDY, logit_bias={1: 1.0}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", WORLDS)
def test_a_row_with_nan_or_inf_anywhere_has_no_token_and_harms_no_other(
    world: int, way: str
) -> None:
    rng = np.random.default_rng(13)
    vocab, s = 1000, WAYS[way]
    healthy = (rng.normal(size=vocab) * 2).astype(np.float32)
    rows = [Row(healthy, s, slot=0)]
    for place in (0, 1, 300, 500, 800, vocab - 1):
        for value in (np.nan, np.inf):
            broken = healthy.copy()
            broken[place] = value
            hidden = replace(s, banned=[place], banned_before=99)  # a ban does not heal it
            rows += [Row(broken, s, slot=len(rows)), Row(broken, hidden, slot=len(rows) + 1)]
            rows += [Row(healthy, s, slot=len(rows))]
    rows.append(Row(np.full(vocab, np.nan, np.float32), s, slot=len(rows)))
    rows.append(Row(np.full(vocab, -np.inf, np.float32), s, slot=len(rows)))
    expected = [-1 if row.logits is not healthy else expected_token(row) for row in rows]
    begin = {slot: history([], []) for slot in range(len(rows)) if s.penalises}
    sampled = sample_on_ranks(world, [Batch(rows, begin)])[0].sampled
    assert sampled.tokens == expected
    if way == "logprobs":
        assert [found is None for found in sampled.logprobs] == [t == -1 for t in expected]


@pytest.mark.parametrize("world", WORLDS)
def test_a_row_whose_every_token_is_banned_has_no_token(world: int) -> None:
    logits = np.zeros(100, dtype=np.float32)
    banned = {"banned": list(range(100)), "banned_before": 1}
    rows = [Row(logits, replace(s, **banned)) for s in (WAYS["greedy"], WAYS["top_p"])]
    assert tokens_of(world, rows) == [-1, -1]


# --- what it costs --------------------------------------------------------------------------------


def test_collectives_are_as_few_as_the_batch_needs() -> None:
    rng = np.random.default_rng(17)
    peaked = (rng.normal(size=2000) * 5).astype(np.float32)
    flat = np.zeros(2000, dtype=np.float32)
    usual = [
        Row(peaked, s) for s in (GREEDY, WAYS["plain"], WAYS["top_k"], WAYS["top_p"], WAYS["min_p"])
    ]
    penalised = Row(peaked, WAYS["penalties"])
    whole = Row(flat, WAYS["top_p"])
    broken = Row(np.full(2000, np.nan, np.float32), WAYS["whole row"])
    batches = {
        "greedy": (Batch([Row(peaked, GREEDY)] * 8), 1),
        "usual": (Batch(usual), 1),
        "penalties": (Batch([penalised], {0: history([1], [2])}), 1),
        "top-k of equals": (Batch([Row(flat, LIKE_A_MODELS)]), 1),
        "top-k of more than are sent": (Batch([Row(peaked, replace(LIKE_A_MODELS, top_k=999))]), 2),
        "flat": (Batch([*usual, whole, whole]), 2),
        "no token": (Batch([broken]), 1),
        "logprobs": (Batch([Row(peaked, GREEDY), Row(peaked, WAYS["logprobs"])]), 2),
        "all": (Batch([whole, Row(peaked, WAYS["logprobs"])]), 3),
    }
    outcomes = sample_on_ranks(3, [batch for batch, _ in batches.values()])
    taken = dict(zip(batches, [outcome.collectives for outcome in outcomes], strict=True))
    assert taken == {name: count for name, (_, count) in batches.items()}


# --- log probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [5, 40, 1000])
@pytest.mark.parametrize("world", WORLDS)
def test_logprobs_are_the_log_softmax_of_the_models_own_logits(world: int, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    rows = [
        Row(
            (rng.normal(size=vocab) * rng.choice([0.1, 3, 20])).astype(np.float32),
            replace(random_sampling(rng, vocab), logprobs=int(rng.choice([-1, 0, 1, 5, 20]))),
            int(rng.integers(40)),
        )
        for _ in range(60)
    ]
    sampled = sample_on_ranks(world, [Batch(rows)])[0].sampled
    assert sampled.tokens == [expected_token(row) for row in rows]
    for row, token, found in zip(rows, sampled.tokens, sampled.logprobs, strict=True):
        wanted = row.sampling.logprobs
        if wanted < 0 or token < 0:
            assert found is None
            continue
        assert found is not None
        expected = torch.log_softmax(torch.from_numpy(row.logits).double(), 0).numpy()
        best = np.argsort(-row.logits, kind="stable")[:wanted]
        assert found.chosen == pytest.approx(expected[token], abs=1e-5)
        assert [token for token, _ in found.top] == best.tolist()
        assert [p for _, p in found.top] == pytest.approx(expected[best].tolist(), abs=1e-5)


def test_logprobs_have_the_same_bits_for_every_number_of_workers() -> None:
    rng = np.random.default_rng(19)
    rows = [
        Row((rng.normal(size=5000) * 2).astype(np.float32), replace(GREEDY, logprobs=20))
        for _ in range(20)
    ]
    sampled = [sample_on_ranks(world, [Batch(rows)])[0].sampled for world in WORLDS]
    assert sampled == [sampled[0]] * len(WORLDS)


def test_nobody_asks_for_logprobs_nobody_gets_any() -> None:
    rows = [Row(np.zeros(10, np.float32), GREEDY)]
    assert sample_on_ranks(2, [Batch(rows)])[0].sampled.logprobs == []


@pytest.mark.parametrize("world", WORLDS)
def test_tokens_of_probability_zero_are_not_among_the_most_probable(world: int) -> None:
    logits = np.full(300, -np.inf, dtype=np.float32)
    logits[[7, 290]] = 0, 1
    found = sample_on_ranks(world, [Batch([Row(logits, replace(GREEDY, logprobs=5))])])
    (logprobs,) = found[0].sampled.logprobs
    assert logprobs is not None
    assert [token for token, _ in logprobs.top] == [290, 7]


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 65, 1000, 3000, 20_000, 50_001])
@pytest.mark.parametrize("count", [1, 2, 64])
def test_the_best_columns_are_those_of_a_stable_sort(width: int, count: int) -> None:
    rng = np.random.default_rng(width)
    count = min(count, width)
    logits = (rng.normal(size=(6, width)) * 3).astype(np.float32)
    logits[1:3] = np.round(logits[1:3])
    logits[3] = 0
    logits[4, width // 3 :] = logits[4, 0]
    expected = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :count], axis=1)
    assert np.array_equal(best(logits, count)[1], expected)


# --- in the runner --------------------------------------------------------------------------------


@pytest.fixture
def runner(make_checkpoint: Callable[..., Path]) -> Iterator[Runner]:
    """With a model "m" and room for two sequences."""
    comm = open_communicator(CommSetup(kind="local", rank=0, owned=[(0, 8)], deadline_s=60), None)
    runner = Runner(comm, [range(8)], virtual_shards=8)
    folder = make_checkpoint("tiny-gqa")
    runner.load(
        LoadModel(model="m", path=str(folder), dtype="fp32", kv_dtype="fp32", max_model_len=64)
    )
    runner.allocate(AllocateKV(model="m", blocks=8, slots=2, tokens=64))
    yield runner
    comm.close()


def test_the_runner_penalises_tokens_that_no_plan_has_named_yet(runner: Runner) -> None:
    """Plans are sent before the tokens of earlier ones are known: the worker must count itself."""
    blocks = np.arange(4, dtype="<i4").tobytes()
    prompt, earlier = [5, 6, 7], [8, 9]
    # So much that no token comes twice, and none that the answer had before.
    s = replace(GREEDY, presence_penalty=1000.0, logprobs=2)
    tokens: list[int] = []
    for step in range(20):
        first = SequenceStep(1, 0, [*prompt, *earlier], blocks, s, history(prompt, earlier))
        later = SequenceStep(1, len(prompt + earlier) + step - 1, [], blocks, s)
        plan = StepPlan(epoch=1, step=step, model="m", sequences=[first if step == 0 else later])
        sampled = runner.step(plan).sampled
        (logprobs,) = sampled.logprobs
        assert logprobs is not None
        assert logprobs.chosen <= logprobs.top[0][1]
        tokens += sampled.tokens
    assert len({*tokens, *earlier}) == 22


def test_steps_that_share_a_plan_sample_as_steps_with_plans_of_their_own(runner: Runner) -> None:
    blocks = [np.arange(4, dtype="<i4").tobytes(), np.arange(4, 8, dtype="<i4").tobytes()]
    prompts = [[5, 6, 7], [8, 9]]
    sampling = [
        replace(GREEDY, temperature=0.9, top_k=20, seed=3, logprobs=1),
        replace(GREEDY, frequency_penalty=1.0),
    ]

    def generate(passes: list[int]) -> list[Sampled]:
        starts = [
            SequenceStep(i, 0, prompts[i], blocks[i], sampling[i], history(prompts[i], []))
            for i in range(2)
        ]
        found = [runner.step(StepPlan(epoch=1, step=0, model="m", sequences=starts)).sampled]
        done = 0
        for count in passes:
            further = [
                SequenceStep(i, len(prompts[i]) + done, [], blocks[i], sampling[i])
                for i in range(2)
            ]
            plan = StepPlan(epoch=1, step=1, model="m", sequences=further, passes=count)
            found.append(runner.step(plan).sampled)
            done += count
        return found

    apart, together = generate([1] * 12), generate([8, 4])
    for part in ("tokens", "logprobs"):
        one, other = ([x for s in run for x in getattr(s, part)] for run in (apart, together))
        assert one == other
        assert len(one) == 26
