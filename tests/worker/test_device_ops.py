"""What GPUs compute: here on the CPU, and the same tests on a GPU where there is one."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from shared.config import PROJECT_ROOT
from shared.errors import MemoryPlanError, ModelError
from shared.messages import BLOCK_TOKENS, Precision
from shared.worker_messages import (
    AllocateKV,
    CommSetup,
    LoadModel,
    Sampling,
    SequenceStep,
    StepPlan,
)
from tests.worker.forward import GREEDY
from tests.worker.rank_threads import VIRTUAL_SHARDS, run_ranks
from worker.comm.base import Communicator
from worker.comm.device import Accelerator, Alone, Collectives, ThroughHost, open_collectives
from worker.ops.device_chooser import padded_batch, padded_blocks
from worker.runner import Runner

SLOTS, BLOCKS = 12, 12
"""Blocks of each sequence."""
PROMPTS = [[1, 5, 9, 100], [1, 7], [1, *range(50, 90)], [1, 3, 4]]
WAYS = [
    GREEDY,
    Sampling(temperature=0.9, top_k=0, top_p=1, seed=3),
    Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=4),
    GREEDY,
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return torch.device(request.param)


class Machine:
    """A model on one rank, which is given plans; without a device, TorchOps and the sampler."""

    def __init__(
        self,
        folder: Path,
        comm: Communicator,
        owned: list[range],
        accelerator: Accelerator | None,
        dtype: Precision = "fp32",
    ) -> None:
        self._runner = Runner(comm, owned, VIRTUAL_SHARDS, None, accelerator)
        self._runner.load(
            LoadModel(model="m", path=str(folder), dtype=dtype, kv_dtype="fp32", max_model_len=180)
        )
        self._runner.allocate(AllocateKV(model="m", blocks=SLOTS * BLOCKS, slots=SLOTS, tokens=512))
        # Scrambled: the cache is paged, and nothing may depend on neighbours.
        tables = np.random.default_rng(0).permutation(SLOTS * BLOCKS).astype("<i4")
        self._tables = tables.reshape(SLOTS, BLOCKS)

    def plan(self, steps: list[tuple[int, int, list[int], Sampling]], passes: int = 1) -> list[int]:
        """Tokens of a plan of (slot, start, tokens, sampling)."""
        return self._runner.step(self.planned(steps, passes)).sampled.tokens

    def planned(
        self, steps: list[tuple[int, int, list[int], Sampling]], passes: int = 1
    ) -> StepPlan:
        sequences = [
            SequenceStep(slot, start, tokens, self._tables[slot].tobytes(), sampling)
            for slot, start, tokens, sampling in steps
        ]
        return StepPlan(epoch=1, step=1, model="m", sequences=sequences, passes=passes)

    def stories(self, ways: list[Sampling], passes: int) -> list[list[int]]:
        """Three plans of decoding after each prompt was read, all sequences at once."""
        steps = [(slot, 0, PROMPTS[slot % 4], way) for slot, way in enumerate(ways)]
        written = [self.plan(steps)]
        for plan in range(3):
            steps = [
                (slot, len(PROMPTS[slot % 4]) + plan * passes, [], way)
                for slot, way in enumerate(ways)
            ]
            written.append(self.plan(steps, passes))
        return written


def on(device: torch.device, comm: Communicator) -> Accelerator:
    collectives: Collectives = Alone() if comm.world == 1 else ThroughHost(comm)
    return Accelerator(device, collectives)


@pytest.mark.parametrize(("world", "sequences"), [(1, 1), (1, 3), (1, 11), (2, 4)])
def test_plans_give_the_tokens_of_torch_and_the_sampler(
    world: int, sequences: int, device: torch.device, tiny_gqa: Path
) -> None:
    ways = [WAYS[i % 4] for i in range(sequences)]

    def job(comm: Communicator, owned: list[range]) -> None:
        theirs = Machine(tiny_gqa, comm, owned, None).stories(ways, passes=5)
        ours = Machine(tiny_gqa, comm, owned, on(device, comm)).stories(ways, passes=5)
        assert ours == theirs

    run_ranks(world, job)


def test_prefill_and_decode_share_a_step_and_penalties_are_the_samplers(
    device: torch.device, tiny_gqa: Path
) -> None:
    penalised = Sampling(temperature=0, top_k=0, top_p=1, seed=0, logit_bias={77: 100.0})

    def written(machine: Machine) -> list[list[int]]:
        return [
            machine.plan([(0, 0, PROMPTS[2], GREEDY)]),
            machine.plan([(0, 41, [], WAYS[1]), (1, 0, PROMPTS[0], WAYS[2])]),
            machine.plan([(0, 42, [], penalised), (1, 4, [], WAYS[2])]),
            machine.plan([(0, 43, [], WAYS[1]), (1, 5, [], WAYS[2])], passes=4),
        ]

    def job(comm: Communicator, owned: list[range]) -> None:
        ours = written(Machine(tiny_gqa, comm, owned, on(device, comm)))
        assert ours == written(Machine(tiny_gqa, comm, owned, None))
        assert ours[2][0] == 77

    run_ranks(1, job)


def test_greedy_stories_are_the_reference(
    device: torch.device, story_model: Path, golden: list[dict[str, Any]]
) -> None:
    cases = [(len(case["prompt_ids"]), case) for case in golden[:SLOTS]]

    def job(comm: Communicator, owned: list[range]) -> None:
        machine = Machine(story_model, comm, owned, on(device, comm))
        steps = [(i, 0, case["prompt_ids"], GREEDY) for i, (_, case) in enumerate(cases)]
        first = machine.plan(steps)
        rest = machine.plan([(i, n, [], GREEDY) for i, (n, _) in enumerate(cases)], passes=59)
        for i, (_, case) in enumerate(cases):
            ours = [first[i], *rest[i :: len(cases)]]
            assert ours[: len(case["new_ids"])] == case["new_ids"][: len(ours)]

    run_ranks(1, job)


def test_a_story_is_that_of_torch_on_the_cpu(device: torch.device) -> None:
    """Greedy, fp32, the bundled model: nothing is needed beside the project."""
    folder = PROJECT_ROOT / "models" / "demo-story"

    def job(comm: Communicator, owned: list[range]) -> None:
        written = []
        for accelerator in (on(device, comm), None):
            machine = Machine(folder, comm, owned, accelerator)
            first = machine.plan([(0, 0, [1, 40, 7, 90], GREEDY)])
            written.append(first + machine.plan([(0, 4, [], GREEDY)], passes=64))
        assert written[0] == written[1]

    run_ranks(1, job)


@pytest.mark.parametrize(("dtype", "limit"), [("fp16", 0.005), ("bf16", 0.03), ("int8", 0.05)])
def test_a_precision_is_as_exact_as_it_can_be(
    dtype: Precision, limit: float, device: torch.device, tiny_gqa: Path
) -> None:
    """Relative L2 error of logits against fp32."""
    table = np.arange(BLOCKS, dtype="<i4").tobytes()
    prompt = SequenceStep(0, 0, PROMPTS[2], table, GREEDY)

    def job(comm: Communicator, owned: list[range]) -> None:
        logits = []
        for precision in ("fp32", dtype):
            machine = Machine(tiny_gqa, comm, owned, on(device, comm), precision)
            model = machine._runner.model("m")
            logits.append(model.ops.run([prompt], model.last_tokens, every_token=True).logits)
        exact, ours = logits
        error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
        assert 1e-6 < error < limit

    run_ranks(1, job)


def test_a_plan_may_begin_before_the_last_ones_tokens_are_read(
    device: torch.device, tiny_gqa: Path
) -> None:
    ways, passes = [WAYS[0], WAYS[1], WAYS[2]], 3

    def plans(machine: Machine) -> list[StepPlan]:
        return [
            machine.planned(
                [(slot, len(PROMPTS[slot]) + n * passes, [], way) for slot, way in enumerate(ways)],
                passes,
            )
            for n in range(4)
        ]

    def job(comm: Communicator, owned: list[range]) -> None:
        machine = Machine(tiny_gqa, comm, owned, on(device, comm))
        other = Machine(tiny_gqa, comm, owned, on(device, comm))
        prompts = [(slot, 0, PROMPTS[slot], way) for slot, way in enumerate(ways)]
        assert machine.plan(prompts) == other.plan(prompts)
        one_by_one = [other._runner.step(plan).sampled.tokens for plan in plans(other)]
        runner, before, ahead = machine._runner, None, []
        for plan in plans(machine):
            assert before is None or runner.can_follow(plan, before)
            started = runner.begin(plan, before)
            if before is not None:
                ahead.append(before.finish().sampled.tokens)
            before = started
        assert before is not None
        penalised = Sampling(temperature=0, top_k=0, top_p=1, seed=0, logit_bias={77: 100.0})
        for next_plan in (
            machine.planned([(0, 20, [], penalised)]),
            machine.planned([(0, 20, [], GREEDY), (1, 0, [1, 2], GREEDY)]),
        ):
            assert not runner.can_follow(next_plan, before)
        ahead.append(before.finish().sampled.tokens)
        assert ahead == one_by_one

    run_ranks(1, job)


def test_a_kv_cache_that_does_not_fit_is_an_error_and_another_can_be_had(
    device: torch.device, tiny_gqa: Path
) -> None:
    def job(comm: Communicator, owned: list[range]) -> None:
        machine = Machine(tiny_gqa, comm, owned, on(device, comm))
        order = AllocateKV(model="m", blocks=1 << 40, slots=SLOTS, tokens=512)
        with pytest.raises(MemoryPlanError, match="no room for a KV cache of 1099511627776 blocks"):
            machine._runner.allocate(order)
        machine._runner.allocate(msgspec.structs.replace(order, blocks=SLOTS * BLOCKS))
        assert len(machine.plan([(0, 0, PROMPTS[0], GREEDY)])) == 1

    run_ranks(1, job)


def test_int4_is_refused(tiny_gqa: Path) -> None:
    def job(comm: Communicator, owned: list[range]) -> None:
        with pytest.raises(ModelError, match="int4 is not there with --device cuda; use one of"):
            Machine(tiny_gqa, comm, owned, on(torch.device("cpu"), comm), "int4")

    run_ranks(1, job)


@pytest.mark.parametrize("kind", ["nccl", "shm"])
def test_collectives_of_tensors(kind: str, tmp_path: Path) -> None:
    """nccl: over a group of their own, which is Gloo's on the CPU; shm: through the host's memory."""

    def job(comm: Communicator, owned: list[range]) -> None:
        setup = CommSetup(
            kind=kind,  # type: ignore[arg-type]
            rank=comm.rank,
            owned=[(own.start, own.stop) for own in owned],
            deadline_s=60,
            addresses=[f"file://{tmp_path}/meet"],
        )
        collectives = open_collectives(setup, comm, torch.device("cpu"))
        mine = torch.full((2, 3), float(comm.rank + 1))
        assert collectives.all_reduce(mine.clone()).tolist() == [[6.0] * 3] * 2
        assert collectives.all_reduce(mine.to(torch.bfloat16)).dtype == torch.bfloat16
        every = collectives.all_gather(mine.double().T)
        assert every.dtype == torch.float64
        assert every.tolist() == [[[rank + 1.0] * 2] * 3 for rank in range(3)]

    run_ranks(3, job)


@pytest.mark.gpu
def test_nccl_in_a_graph(tmp_path: Path) -> None:
    """A world of one rank, which `open_collectives` would do without."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    from worker.comm.torch_dist import GroupCollectives

    setup = CommSetup(
        kind="nccl",
        rank=0,
        owned=[(0, VIRTUAL_SHARDS)],
        deadline_s=60,
        addresses=[f"file://{tmp_path}/meet"],
    )
    collectives = GroupCollectives(setup, torch.device("cuda"))
    source, total = torch.ones(2, 3, device="cuda"), torch.zeros(2, 3, device="cuda")
    every = torch.zeros(1, 2, 3, device="cuda")

    def step() -> None:
        total.copy_(collectives.all_reduce(source * 2))
        every.copy_(collectives.all_gather(total))

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    source.fill_(5)
    graph.replay()
    assert total.tolist() == [[10.0] * 3] * 2
    assert every.tolist() == [[[10.0] * 3] * 2]


def test_batches_and_tables_come_in_few_sizes() -> None:
    assert [padded_batch(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 256)] == [
        *(1, 2, 4, 8, 8, 16, 16, 32, 256)
    ]
    assert [padded_blocks(n) for n in (1, 8, 9, 128)] == [8, 8, 16, 128]
    assert BLOCK_TOKENS * BLOCKS >= 180
