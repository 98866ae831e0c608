"""The sharded decoder against transformers, on random checkpoints in real shapes."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.messages import BLOCK_TOKENS, AllocateKV, LoadModel, SequenceStep
from tests.worker.rank_threads import VIRTUAL_SHARDS, run_ranks
from worker.comm.base import Communicator
from worker.runner import Runner

TOLERANCE = 1e-4  # largest difference of logits, relative to the largest logit, in float32


def logits_of(folder: Path, world: int, chunks: list[list[int]]) -> torch.Tensor:
    """Logits after the last token of each chunk of one sequence, joined over the ranks.

    An empty chunk starts the sequence again from its beginning; it has no logits.
    """
    pieces: dict[int, torch.Tensor] = {}

    def job(comm: Communicator, owned: list[range]) -> None:
        runner = Runner(comm, owned, VIRTUAL_SHARDS)
        runner.load(LoadModel(model="m", path=str(folder), dtype="fp32", kv_dtype="fp32", max_model_len=512))
        runner.allocate(AllocateKV(model="m", blocks=40, slots=1, tokens=512))
        model = runner._models["m"]
        assert model.cache is not None
        # Blocks in a scrambled order: the cache is paged, and nothing may depend on neighbours.
        table = np.random.default_rng(0).permutation(40).astype("<i4").tobytes()
        start, rows = 0, []
        with torch.inference_mode():
            for chunk in chunks:
                if not chunk:
                    start = 0
                    continue
                step = SequenceStep(0, start, chunk, table, None)
                inputs = runner.prepare(model, [step])
                last = torch.tensor([len(chunk) - 1])
                inputs = type(inputs)(**{**vars(inputs), "logit_rows": last})
                rows.append(model.decoder(inputs, model.cache)[0])
                start += len(chunk)
        pieces[comm.rank] = torch.stack(rows)

    run_ranks(world, job)
    return torch.cat([pieces[rank] for rank in range(world)], dim=1)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("preset", ["tiny-mha", "tiny-gqa", "minueza-32m"])
def test_logits_equal_transformers_for_any_number_of_workers(
    preset: str, make_checkpoint: Callable[..., Path]
) -> None:
    folder = make_checkpoint(preset)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 32000, (300,), generator=generator)
    with torch.inference_mode():
        theirs = reference(ids[None]).logits[0]
    lengths = [1, 2, 17, 64, 300]
    for world in (1, 2, 3, 5):
        prompts = [chunk for n in lengths for chunk in ([], ids[:n].tolist())]
        for length, ours in zip(lengths, logits_of(folder, world, prompts), strict=True):
            assert relative(ours, theirs[length - 1]) < TOLERANCE, (world, length)


@pytest.mark.parametrize("sizes", [[1] * 40, [7] * 6, [16, 16, 1, 1, 6], [33, 7]])
def test_a_prompt_may_come_in_chunks(
    sizes: list[int], make_checkpoint: Callable[..., Path]
) -> None:
    folder = make_checkpoint("tiny-gqa")
    ids = torch.randint(
        3, 32000, (sum(sizes),), generator=torch.Generator().manual_seed(2)
    ).tolist()
    whole = logits_of(folder, 1, [ids])[-1]
    bounds = np.cumsum([0, *sizes])
    chunks = [ids[a:b] for a, b in itertools.pairwise(bounds)]
    for world in (1, 3):
        assert relative(logits_of(folder, world, chunks)[-1], whole) < TOLERANCE


def test_a_sliding_window_hides_what_is_further_back(
    make_checkpoint: Callable[..., Path], tmp_path: Path
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
        theirs = reference(ids[None]).logits[0, -1]
    assert relative(logits_of(tmp_path, 2, [ids.tolist()])[-1], theirs) < TOLERANCE
    one_by_one = [ids[:30].tolist(), *([i] for i in ids[30:].tolist())]
    assert relative(logits_of(tmp_path, 2, one_by_one)[-1], theirs) < TOLERANCE


def test_a_batch_gives_each_sequence_what_it_gets_alone(
    make_checkpoint: Callable[..., Path],
) -> None:
    folder = make_checkpoint("tiny-gqa")
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, 32000, (n,), generator=generator).tolist() for n in (1, 5, 40, 17)]
    alone = [logits_of(folder, 1, [p[:-1], p[-1:]] if len(p) > 1 else [p])[-1] for p in prompts]
    per_sequence = 48 // BLOCK_TOKENS

    def job(comm: Communicator, owned: list[range]) -> None:
        runner = Runner(comm, owned, VIRTUAL_SHARDS)
        runner.load(LoadModel(model="m", path=str(folder), dtype="fp32", kv_dtype="fp32", max_model_len=512))
        runner.allocate(AllocateKV(model="m", blocks=len(prompts) * per_sequence, slots=4, tokens=512))
        model = runner._models["m"]
        assert model.cache is not None

        def steps(tokens: Callable[[list[int]], list[int]], decode: bool) -> list[SequenceStep]:
            made = []
            for i, p in enumerate(prompts):
                blocks = np.arange(i * per_sequence, (i + 1) * per_sequence, dtype="<i4").tobytes()
                if tokens(p):
                    made.append(
                        SequenceStep(i, len(p) - 1 if decode else 0, tokens(p), blocks, None)
                    )
            return made

        with torch.inference_mode():
            first = runner.prepare(model, steps(lambda p: p[:-1], decode=False))
            model.decoder(first, model.cache)
            last = runner.prepare(model, steps(lambda p: p[-1:], decode=True))
            last = type(last)(**{**vars(last), "logit_rows": torch.arange(len(prompts))})
            together = model.decoder(last, model.cache)
        for ours, theirs in zip(together, alone, strict=True):
            assert relative(ours, theirs) < TOLERANCE

    run_ranks(1, job)
