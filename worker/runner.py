"""Carries out step plans: plan -> model -> sampled tokens.

Holds what outlives a step: the models, their KV memory and the last sampled token of each slot.
"""

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from shared.errors import CommError, MemoryPlanError
from shared.model_config import read_model_config
from shared.sharding import ModelShards
from shared.worker_messages import AllocateKV, LoadModel, SequenceStep, StepPlan
from worker.comm.base import Communicator, Floats
from worker.comm.device import Accelerator
from worker.device import free_memory
from worker.layers import Placement
from worker.loader import Checkpoint
from worker.model import Decoder
from worker.native.api import Pool
from worker.native.sampling import NativeRows
from worker.ops.base import HeadLayout, Ops
from worker.ops.choose import make_device_ops, make_ops
from worker.ops.device_chooser import DeviceChooser, UnderWay
from worker.ops.device_ops import DeviceOps
from worker.sampling.sampler import Sampled, Sampler
from worker.sampling.vocabulary import Doubles, Ints, Vocabulary
from worker.shard_cache import ShardCache, cache_key

_TRIM_EVERY_BYTES = 32 << 20
"""Of packed weights: what they were read into would stay with the C library, hundreds of megabytes."""


@dataclass
class LoadedModel:
    """One model on this rank."""

    decoder: Decoder
    ops: Ops
    layers: int
    hidden_size: int
    layout: HeadLayout
    sampler: Sampler
    vocabulary: Vocabulary
    max_positions: int
    chooser: DeviceChooser | None = None
    """Chooses in the sampler's place what it can, where a device computes."""
    last_tokens: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    sums: dict[int, Doubles] = field(default_factory=dict)
    """By slot: of the hidden states [hidden] so far of a text whose mean is wanted."""


@dataclass(frozen=True)
class StepOutcome:
    """What a plan's passes have made."""

    sampled: Sampled
    means: list[Floats]
    """[hidden] of each text whose mean hidden state was due, in the plan's order."""


class Runner:
    """The models of one rank and what they need to run."""

    def __init__(
        self,
        comm: Communicator,
        owned: list[range],
        virtual_shards: int,
        pool: Pool | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        """`owned`: the virtual shards of every rank. `pool`: None computes with torch.

        accelerator: computes instead of the CPU.
        """
        self._comm = comm
        self._owned = owned
        self._virtual_shards = virtual_shards
        self._pool = pool
        self._accelerator = accelerator
        self._models: dict[str, LoadedModel] = {}

    def load(
        self, order: LoadModel, progress: Callable[[int], None] = lambda _: None
    ) -> tuple[int, int]:
        """Read this rank's slices. Returns weight bytes and bytes of one KV block.

        progress: is told the weight bytes so far. May run in another thread than the steps of other
        models. Raises ModelError, and what `progress` raises.
        """
        folder = Path(order.path)
        config = read_model_config(folder)
        shards = ModelShards(config, self._virtual_shards)
        cache, trimmed_at = self._shard_cache(order), 0

        def packed(weight_bytes: int) -> None:
            nonlocal trimmed_at
            if weight_bytes >= trimmed_at + _TRIM_EVERY_BYTES:
                trimmed_at = weight_bytes
                _give_memory_back()
            progress(weight_bytes)

        if self._accelerator is None:
            ops = make_ops(order, config, self._comm, self._pool, self._owned, packed, cache)
        else:
            ops = make_device_ops(order, config, self._accelerator, self._owned, packed)
        placement = Placement(shards, self._owned[self._comm.rank], ops)
        checkpoint = Checkpoint(folder)
        decoder = None
        try:
            decoder = Decoder(checkpoint, placement, order.max_model_len)
        finally:
            checkpoint.close()
            if cache is not None:
                cache.close(complete=decoder is not None)
        _give_memory_back()
        token_ids = [[shards.vocab_rows(range(v, v + 1)) for v in owned] for owned in self._owned]
        rows = None if self._pool is None else NativeRows(self._pool.library)
        vocabulary = Vocabulary(self._comm.rank, token_ids, rows)
        layers, layout = config.num_layers, placement.head_layout()
        loaded = LoadedModel(
            decoder=decoder,
            ops=ops,
            layers=layers,
            hidden_size=config.hidden_size,
            layout=layout,
            sampler=Sampler(self._comm, vocabulary),
            vocabulary=vocabulary,
            max_positions=order.max_model_len,
        )
        # Replaced, not changed: steps of other models may be looking at it in the main thread.
        self._models = {**self._models, order.model: loaded}
        return ops.weight_bytes, ops.block_bytes(layers, layout)

    def _shard_cache(self, order: LoadModel) -> ShardCache | None:
        """Where packed weights are kept, if they are; others are read as fast from the checkpoint."""
        if not order.shard_cache or order.dtype not in ("int8", "int4"):
            return None
        facts = {
            "dtype": order.dtype,
            "virtual_shards": self._virtual_shards,
            "owned": self._owned[self._comm.rank],
        }
        return ShardCache(Path(order.shard_cache), cache_key(Path(order.path), facts))

    def free_bytes(self) -> int:
        """Memory for KV caches, and whatever else, where models compute."""
        return free_memory(None if self._accelerator is None else self._accelerator.device)

    def unload(self, model: str) -> None:
        """Give back the memory of a model, or of what was loaded of it."""
        self._models.pop(model, None)
        gc.collect()
        _give_memory_back()

    def model(self, name: str) -> LoadedModel:
        """A model that is loaded, for what goes past the sampler."""
        return self._models[name]

    def allocate(self, order: AllocateKV) -> None:
        """KV memory of a loaded model. Raises MemoryPlanError when there is no room for it."""
        try:
            self._allocate(order)
        except (RuntimeError, MemoryError) as error:  # what torch and the library raise then
            raise MemoryPlanError(
                f"{order.model}: there is no room for a KV cache of {order.blocks} blocks"
                f" ({_first_line(error)}): give less --kv-memory, or unload a model"
            ) from error

    def _allocate(self, order: AllocateKV) -> None:
        model = self._models[order.model]
        model.ops.allocate(model.decoder, model.layers, model.layout, order.blocks, order.tokens)
        model.last_tokens = np.zeros(order.slots, dtype=np.int64)
        if self._accelerator is not None and isinstance(model.ops, DeviceOps):
            model.chooser = DeviceChooser(
                model.ops,
                self._accelerator.collectives,
                model.vocabulary,
                slots=order.slots,
                blocks=order.blocks,
                max_positions=model.max_positions,
            )

    def step(self, plan: StepPlan) -> StepOutcome:
        """Run one plan; a token for each sequence that wants one, in the plan's order, pass after pass.

        Raises as `begin`.
        """
        return self.begin(plan).finish()

    def can_follow(self, plan: StepPlan, before: "StartedStep") -> bool:
        """Whether a plan can begin though nobody has read the tokens of the one `before`."""
        chooser = self._models[plan.model].chooser
        return (
            before.under_way is not None
            and chooser is not None
            and chooser.can(plan.sequences)
            and chooser.only_decodes(plan.sequences)
        )

    def begin(self, plan: StepPlan, before: "StartedStep | None" = None) -> "StartedStep":
        """Have a device carry out a plan that only decodes; any other is carried out here and now.

        before: the plan that was begun and not finished, which `plan` can follow.

        Raises MemoryPlanError when a device has no room for it, and no other rank waits for this one;
        CommError.
        """
        try:
            return self._begin(plan, before)
        except torch.OutOfMemoryError as error:
            if self._comm.world > 1:
                raise
            reason = _first_line(error)
        # Out here nothing holds the tensors of the step any more.
        self.free_bytes()
        raise MemoryPlanError(
            f"{plan.model}: the device has no room for a step of {len(plan.sequences)} sequences"
            f" ({reason}): use less --max-num-seqs, --max-batched-tokens or --kv-memory"
        )

    def _begin(self, plan: StepPlan, before: "StartedStep | None") -> "StartedStep":
        model = self._models[plan.model]
        for copy in plan.copies:
            model.ops.copy_block(copy.source, copy.target)
        for s in plan.sequences:
            if s.history is not None:
                model.sampler.begin(s.slot, s.history)
            if s.pooled and s.start == 0:
                model.sums[s.slot] = np.zeros(model.hidden_size)
        chooser = model.chooser
        if chooser is None or not chooser.can(plan.sequences):
            return StartedStep(plan, model, self._passes(model, plan))
        if chooser.only_decodes(plan.sequences):
            unread = before.slots if before is not None and before.model is model else frozenset()
            under_way = chooser.begin(plan.sequences, plan.passes, model.last_tokens, unread)
            return StartedStep(plan, model, under_way=under_way)
        tokens = chooser(plan.sequences, plan.passes, model.last_tokens, model.sums)
        return StartedStep(plan, model, _taken(model, plan, tokens))

    def _passes(self, model: LoadedModel, plan: StepPlan) -> Sampled:
        sequences = plan.sequences
        sampled = self._pass(model, sequences)
        for _ in range(1, plan.passes):
            sequences = [following(s) for s in sequences]
            further = self._pass(model, sequences)
            sampled.tokens.extend(further.tokens)
            sampled.logprobs.extend(further.logprobs)
        return sampled

    def _pass(self, model: LoadedModel, sequences: Sequence[SequenceStep]) -> Sampled:
        sampled = [(s, s.sampling) for s in sequences if s.sampling is not None]
        positions = [s.start + max(len(s.tokens), 1) for s, _ in sampled]
        slots = [s.slot for s, _ in sampled]
        sampling = [sampling for _, sampling in sampled]
        wanted = model.sampler.wanted(sampling, positions, slots)
        logits = model.ops.run(sequences, model.last_tokens, wanted, model.sums)
        if not sampled:
            return Sampled(tokens=[], logprobs=[])
        chosen = model.sampler(logits, sampling, positions, slots)
        model.last_tokens[slots] = chosen.tokens
        return chosen

    @property
    def comm_seconds(self) -> float:
        """Time that models spent in collectives which the communicator did not see."""
        return sum(model.ops.comm_seconds for model in self._models.values())


@dataclass(frozen=True)
class StartedStep:
    """A plan that is carried out, or that a device is carrying out."""

    plan: StepPlan
    model: LoadedModel
    sampled: Sampled | None = None
    under_way: UnderWay | None = None

    @property
    def slots(self) -> frozenset[int]:
        """Of the sequences that get tokens."""
        return frozenset(s.slot for s in self.plan.sequences if s.sampling is not None)

    def finish(self) -> StepOutcome:
        """Wait for what it makes."""
        sampled, model = self.sampled, self.model
        if sampled is None:
            assert self.under_way is not None, "it is one or the other"
            sampled = _taken(model, self.plan, self.under_way.read())
        due = [s for s in self.plan.sequences if s.mean_is_due]
        means = [(model.sums.pop(s.slot) / s.pooled).astype(np.float32) for s in due]
        return StepOutcome(sampled, means)


def _taken(model: LoadedModel, plan: StepPlan, tokens: Ints) -> Sampled:
    """Tokens [passes, B] that a device has chosen, remembered for the plans to come."""
    slots = [s.slot for s in plan.sequences if s.sampling is not None]
    model.last_tokens[slots] = tokens[-1]
    return Sampled(tokens=tokens.ravel().tolist(), logprobs=[])


def following(step: SequenceStep) -> SequenceStep:
    """What a sequence that decodes does in the pass after this one."""
    return SequenceStep(
        slot=step.slot, start=step.start + 1, tokens=[], blocks=step.blocks, sampling=step.sampling
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _give_memory_back() -> None:
    """Return to the system what reading and packing weights has freed; other C libraries do so anyway."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class TimedCommunicator:
    """A communicator that adds up the time spent in it."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.rank, self.world, self.tree = comm.rank, comm.world, comm.tree
        self.native, self.buffer_bytes = comm.native, comm.buffer_bytes
        self.seconds = 0.0

    def all_reduce_tree(self, partials: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """As the communicator's."""
        began = time.perf_counter()
        total = self._comm.all_reduce_tree(partials)
        self.seconds += time.perf_counter() - began
        return total

    def all_reduce_roots(self, roots: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """As the communicator's."""
        began = time.perf_counter()
        total = self._comm.all_reduce_roots(roots)
        self.seconds += time.perf_counter() - began
        return total

    def exchange_small(self, array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """As the communicator's."""
        began = time.perf_counter()
        every = self._comm.exchange_small(array)
        self.seconds += time.perf_counter() - began
        return every

    def barrier(self) -> None:
        """As the communicator's."""
        self._comm.barrier()

    def lost(self, rank: int, operation: str) -> CommError:
        """As the communicator's."""
        return self._comm.lost(rank, operation)

    def close(self) -> None:
        """As the communicator's."""
        self._comm.close()
