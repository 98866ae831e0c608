"""The memory plan: what is planned is what workers then take, and what does not fit is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator import planner
from coordinator.planner import MemoryPlan, check_fits, plan_memory
from coordinator.served_model import open_model
from shared.config import Settings
from shared.errors import MemoryPlanError
from shared.messages import Precision
from shared.worker_messages import AllocateKV, LoadModel
from tests.worker.rank_threads import run_ranks
from worker.comm.base import Communicator
from worker.native.api import Pool, native_library
from worker.runner import Runner


def plan(folder: Path, **wishes: object) -> MemoryPlan:
    settings = Settings(model={"m": str(folder)}, **wishes)  # type: ignore[arg-type]
    model = open_model("m", str(folder), settings)
    return plan_memory(model.config, model.on_workers, settings)


@pytest.mark.parametrize("preset", ["tiny-mha", "tiny-gqa", "minueza-32m"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("world", [1, 3])
def test_workers_take_what_was_planned(
    preset: str, dtype: Precision, world: int, make_checkpoint: Callable[..., Path]
) -> None:
    library = native_library()
    if library is None:
        pytest.skip("sizes are those of the native library, which is not there")
    folder = make_checkpoint(preset)
    planned = plan(folder, workers=world, dtype=dtype)
    taken: dict[int, tuple[int, int]] = {}

    def job(comm: Communicator, owned: list[range]) -> None:
        runner = Runner(comm, owned, 8, Pool(library, 1, crowded=True))
        order = LoadModel(
            model="m",
            path=str(folder),
            dtype=dtype,
            kv_dtype=planned.on_workers.kv_dtype,
            max_model_len=64,
        )
        taken[comm.rank] = runner.load(order)
        runner.allocate(AllocateKV(model="m", blocks=1, slots=1, tokens=16))

    run_ranks(world, job)
    assert planned.weight_bytes == [taken[rank][0] for rank in range(world)]
    assert planned.kv_block_bytes == [taken[rank][1] for rank in range(world)]


def test_what_does_not_fit_is_refused_with_what_would(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint("minueza-32m")
    full = plan(folder, workers=2, dtype="fp32", max_model_len=2048)

    def refusal(free: int) -> str:
        monkeypatch.setattr(planner, "free_bytes", lambda: free)
        with pytest.raises(MemoryPlanError) as caught:
            check_fits([full])
        return caught.value.message

    monkeypatch.setattr(planner, "free_bytes", lambda: sum(full.bytes))
    check_fits([full])
    message = refusal(sum(full.bytes) - 1)
    assert "needs 2 x" in message
    assert "--dtype bf16" in message
    assert "--max-model-len 1024" in message
    int8 = plan(folder, workers=2, dtype="int8", max_model_len=2048)
    assert "--dtype int8" in refusal(sum(int8.bytes))
    assert "--max-model-len" not in refusal(sum(int8.bytes))
    assert "no precision" in refusal(1000)
    monkeypatch.setattr(planner, "free_bytes", lambda: sum(full.bytes))
    with pytest.raises(MemoryPlanError):
        check_fits([full], starting=True)


def test_a_context_that_was_asked_for_must_fit_and_others_may_shrink(
    make_checkpoint: Callable[..., Path],
) -> None:
    folder = make_checkpoint("minueza-32m")
    assert plan(folder, max_model_len=2048).kv_tokens == 2048
    assert plan(folder).kv_tokens == planner.LEAST_CONTEXT
