"""With deterministic kernels a token's logits are the same bits however they come about.

On a GPU, and on the CPU in Triton's interpreter (tests/triton.sh).
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.errors import ConfigError
from shared.messages import Precision
from shared.worker_messages import AllocateKV, LoadModel, SequenceStep
from tests.worker.forward import GREEDY, logits_of, relative
from tests.worker.interpreter import INTERPRETED
from tests.worker.rank_threads import VIRTUAL_SHARDS, run_ranks
from worker.comm.base import Communicator, Floats
from worker.comm.device import Accelerator, Alone, ThroughHost
from worker.ops.choose import DEVICE_KERNELS, device_kernels, why_not_triton
from worker.runner import Runner

BLOCKS = 8
"""Of each sequence."""
PROMPT = [1, *range(50, 67)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("there is no Triton: tests/triton.sh installs it")
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("kernels run on the CPU with TRITON_INTERPRET=1 only: tests/triton.sh sets it")
    if request.param == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("torch sees no GPU, or kernels are interpreted")
    return torch.device(request.param)


Batch = list[tuple[int, int, list[int]]]
"""Slot, start and tokens of each sequence of a step."""


def logits_after(
    folder: Path, device: torch.device, dtype: Precision, world: int, steps: list[Batch]
) -> Floats:
    """Logits of the first sequence of the last step, joined over the ranks."""
    pieces: dict[int, Floats] = {}

    def job(comm: Communicator, owned: list[range]) -> None:
        collectives = Alone() if comm.world == 1 else ThroughHost(comm)
        accelerator = Accelerator(device, collectives, deterministic=True)
        runner = Runner(comm, owned, VIRTUAL_SHARDS, None, accelerator)
        runner.load(
            LoadModel(model="m", path=str(folder), dtype=dtype, kv_dtype="fp32", max_model_len=128)
        )
        runner.allocate(AllocateKV(model="m", blocks=4 * BLOCKS, slots=4, tokens=512))
        model = runner.model("m")
        tables = np.random.default_rng(world).permutation(4 * BLOCKS).astype("<i4")
        for step in steps:
            sequences = [
                SequenceStep(slot, start, tokens, tables.reshape(4, -1)[slot].tobytes(), GREEDY)
                for slot, start, tokens in step
            ]
            logits = model.ops.run(sequences, model.last_tokens).logits
        pieces[comm.rank] = logits[0].copy()

    run_ranks(world, job)
    return np.concatenate([pieces[rank] for rank in range(world)])


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_batches_chunks_and_workers_change_no_bit(
    dtype: Precision, device: torch.device, tiny_gqa: Path
) -> None:

    def logits(world: int, *steps: Batch) -> Floats:
        return logits_after(tiny_gqa, device, dtype, world, list(steps))

    whole = logits(1, [(0, 0, PROMPT)])
    head, middle, tail = PROMPT[:7], PROMPT[7:17], PROMPT[17:]
    chunked = logits(1, [(2, 0, head)], [(2, 7, middle)], [(2, 17, tail)])
    beside = logits(1, [(1, 0, [1, 7])], [(0, 0, PROMPT), (1, 2, [4]), (3, 0, [1, 5, 9])])
    assert np.array_equal(chunked, whole)
    assert np.array_equal(beside, whole)
    assert np.array_equal(logits(2, [(0, 0, PROMPT)]), whole)
    assert np.array_equal(logits(3, [(0, 0, head)], [(0, 7, PROMPT[7:])]), whole)
    assert not np.array_equal(logits(1, [(0, 0, [5, *PROMPT[1:]])]), whole)


def test_they_compute_the_model(device: torch.device, tiny_gqa: Path) -> None:
    ours = logits_after(tiny_gqa, device, "fp32", 1, [[(0, 0, PROMPT)]])
    theirs = logits_of(tiny_gqa, 1, [PROMPT], "torch", max_model_len=128)[0]
    assert relative(ours, theirs) < 1e-4


def test_without_triton_they_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    why_not_triton.cache_clear()
    with pytest.raises(ConfigError, match="--deterministic needs the Triton kernels, and they are"):
        device_kernels(cpu, deterministic=True)
    monkeypatch.setenv(DEVICE_KERNELS, "triton")
    with pytest.raises(ConfigError, match="is triton, and they are for GPUs, not for cpu"):
        device_kernels(cpu, deterministic=False)
    monkeypatch.setenv(DEVICE_KERNELS, "torch")
    assert device_kernels(cpu, deterministic=False).name == "torch"
    with pytest.raises(ConfigError, match="and TPSERVE_DEVICE_KERNELS is torch"):
        device_kernels(cpu, deterministic=True)
    monkeypatch.setenv(DEVICE_KERNELS, "cublas")
    with pytest.raises(ConfigError, match="'cublas'; it can be triton or torch"):
        device_kernels(cpu, deterministic=False)
    why_not_triton.cache_clear()
