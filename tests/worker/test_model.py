"""The sharded decoder against transformers, on random checkpoints in real shapes."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.messages import BLOCK_TOKENS, AllocateKV, LoadModel, Sampling, SequenceStep
from tests.worker.rank_threads import VIRTUAL_SHARDS, run_ranks
from worker.comm.base import Communicator, Floats
from worker.native.api import Pool, native_library
from worker.runner import LoadedModel, Runner

TOLERANCE = 1e-4  # largest difference of logits, relative to the largest logit, in float32
GREEDY = Sampling(temperature=0, top_k=0, top_p=1, seed=0)


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> str:
    """What computes. Both give the same but for rounding."""
    if request.param == "native" and native_library() is None:
        pytest.skip("there is no native library: no C++ compiler when it was to be built")
    return str(request.param)


def loaded(
    folder: Path, comm: Communicator, owned: list[range], kernels: str, blocks: int = 40
) -> LoadedModel:
    """The model on one rank, ready for steps."""
    library = native_library() if kernels == "native" else None
    pool = None if library is None else Pool(library, 1, crowded=comm.world > 2)
    runner = Runner(comm, owned, VIRTUAL_SHARDS, pool)
    order = LoadModel(model="m", path=str(folder), dtype="fp32", kv_dtype="fp32", max_model_len=512)
    runner.load(order)
    runner.allocate(AllocateKV(model="m", blocks=blocks, slots=4, tokens=512))
    return runner._models["m"]


def logits_of(folder: Path, world: int, chunks: list[list[int]], kernels: str) -> Floats:
    """Logits after the last token of each chunk of one sequence, joined over the ranks.

    An empty chunk starts the sequence again from its beginning; it has no logits.
    """
    pieces: dict[int, Floats] = {}

    def job(comm: Communicator, owned: list[range]) -> None:
        model = loaded(folder, comm, owned, kernels)
        # Blocks in a scrambled order: the cache is paged, and nothing may depend on neighbours.
        table = np.random.default_rng(0).permutation(40).astype("<i4").tobytes()
        start, rows = 0, []
        for chunk in chunks:
            if not chunk:
                start = 0
                continue
            step = SequenceStep(0, start, chunk, table, GREEDY)
            rows.append(model.ops.run([step], model.last_tokens).logits[0].copy())
            start += len(chunk)
        pieces[comm.rank] = np.stack(rows)

    run_ranks(world, job)
    return np.concatenate([pieces[rank] for rank in range(world)], axis=1)


def relative(ours: Floats, theirs: Floats) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


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
