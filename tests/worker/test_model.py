"""The sharded decoder against transformers, on random checkpoints in real shapes."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.messages import BLOCK_TOKENS
from shared.worker_messages import SequenceStep
from tests.worker.forward import GREEDY, TOLERANCE, loaded, logits_of, relative
from tests.worker.rank_threads import run_ranks
from worker.comm.base import Communicator


@pytest.mark.parametrize("preset", ["tiny-mha", "tiny-gqa", "minueza-32m"])
def test_logits_equal_transformers_for_any_number_of_workers(
    preset: str, kernels: str, make_checkpoint: Callable[..., Path]
) -> None:
    folder = make_checkpoint(preset)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 32000, (300,), generator=generator)
    with torch.inference_mode():
        theirs = reference(ids[None]).logits[0].numpy()
    lengths = [1, 2, 17, 64, 300]
    for world in (1, 2, 3, 5):
        prompts = [chunk for n in lengths for chunk in ([], ids[:n].tolist())]
        for length, ours in zip(lengths, logits_of(folder, world, prompts, kernels), strict=True):
            assert relative(ours, theirs[length - 1]) < TOLERANCE, (world, length)


@pytest.mark.parametrize("sizes", [[1] * 40, [7] * 6, [16, 16, 1, 1, 6], [33, 7]])
def test_a_prompt_may_come_in_chunks(
    sizes: list[int], kernels: str, make_checkpoint: Callable[..., Path]
) -> None:
    folder = make_checkpoint("tiny-gqa")
    ids = torch.randint(
        3, 32000, (sum(sizes),), generator=torch.Generator().manual_seed(2)
    ).tolist()
    whole = logits_of(folder, 1, [ids], kernels)[-1]
    bounds = np.cumsum([0, *sizes])
    chunks = [ids[a:b] for a, b in itertools.pairwise(bounds)]
    for world in (1, 3):
        assert relative(logits_of(folder, world, chunks, kernels)[-1], whole) < TOLERANCE


def test_a_sliding_window_hides_what_is_further_back(
    kernels: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    made = make_checkpoint("minueza-32m")
    for file in made.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = (
        (made / "config.json").read_text().replace('"sliding_window": 1024', '"sliding_window": 8')
    )
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(config)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(3, 32000, (50,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        theirs = reference(ids[None]).logits[0, -1].numpy()
    assert relative(logits_of(tmp_path, 2, [ids.tolist()], kernels)[-1], theirs) < TOLERANCE
    one_by_one = [ids[:30].tolist(), *([i] for i in ids[30:].tolist())]
    assert relative(logits_of(tmp_path, 2, one_by_one, kernels)[-1], theirs) < TOLERANCE


def test_a_batch_gives_each_sequence_what_it_gets_alone(
    kernels: str, make_checkpoint: Callable[..., Path]
) -> None:
    folder = make_checkpoint("tiny-gqa")
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, 32000, (n,), generator=generator).tolist() for n in (1, 5, 40, 17)]
    alone = [
        logits_of(folder, 1, [p[:-1], p[-1:]] if len(p) > 1 else [p], kernels)[-1] for p in prompts
    ]
    per_sequence = 48 // BLOCK_TOKENS

    def job(comm: Communicator, owned: list[range]) -> None:
        model = loaded(folder, comm, owned, kernels, blocks=len(prompts) * per_sequence)
        blocks = np.arange(len(prompts) * per_sequence, dtype="<i4").reshape(len(prompts), -1)
        first = [
            SequenceStep(i, 0, p[:-1], blocks[i].tobytes(), None)
            for i, p in enumerate(prompts)
            if len(p) > 1
        ]
        model.ops.run(first, model.last_tokens)
        last = [
            SequenceStep(i, len(p) - 1, p[-1:], blocks[i].tobytes(), GREEDY)
            for i, p in enumerate(prompts)
        ]
        together = model.ops.run(last, model.last_tokens).logits
        for ours, theirs in zip(together, alone, strict=True):
            assert relative(ours, theirs) < TOLERANCE

    run_ranks(1, job)
