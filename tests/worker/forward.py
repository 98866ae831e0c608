"""Forward passes of a model on ranks in threads, for tests that compare logits."""

from pathlib import Path

import numpy as np
import torch

from shared.messages import Precision
from shared.worker_messages import AllocateKV, LoadModel, Sampling, SequenceStep
from tests.worker.rank_threads import VIRTUAL_SHARDS, run_ranks
from worker.comm.base import Communicator, Floats
from worker.comm.device import Accelerator, Alone, ThroughHost
from worker.native.api import Pool, native_library
from worker.runner import LoadedModel, Runner

TOLERANCE = 1e-4  # largest difference of logits, relative to the largest logit, in float32
GREEDY = Sampling(temperature=0, top_k=0, top_p=1, seed=0)


def loaded(
    folder: Path,
    comm: Communicator,
    owned: list[range],
    kernels: str,
    blocks: int = 40,
    dtype: Precision = "fp32",
    max_model_len: int = 512,
) -> LoadedModel:
    """The model on one rank, ready for steps."""
    library = native_library() if kernels == "native" else None
    pool = None if library is None else Pool(library, 1, crowded=comm.world > 2)
    accelerator = None
    if kernels == "device":
        collectives = Alone() if comm.world == 1 else ThroughHost(comm)
        accelerator = Accelerator(torch.device("cpu"), collectives)
    runner = Runner(comm, owned, VIRTUAL_SHARDS, pool, accelerator)
    runner.load(
        LoadModel(
            model="m", path=str(folder), dtype=dtype, kv_dtype="fp32", max_model_len=max_model_len
        )
    )
    runner.allocate(AllocateKV(model="m", blocks=blocks, slots=4, tokens=512))
    return runner._models["m"]


def logits_of(
    folder: Path,
    world: int,
    chunks: list[list[int]],
    kernels: str,
    dtype: Precision = "fp32",
    max_model_len: int = 512,
) -> Floats:
    """Logits after the last token of each chunk of one sequence, joined over the ranks.

    An empty chunk starts the sequence again from its beginning; it has no logits.
    """
    pieces: dict[int, Floats] = {}

    def job(comm: Communicator, owned: list[range]) -> None:
        model = loaded(folder, comm, owned, kernels, dtype=dtype, max_model_len=max_model_len)
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
    """The largest difference, relative to the largest number."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
