"""Carries out step plans: plan -> tensors -> model -> sampled tokens.

Holds what outlives a step: the models, their KV memory and the last sampled token of each slot.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from shared.messages import BLOCK_TOKENS, AllocateKV, LoadModel, SequenceStep, StepPlan
from shared.model_config import read_model_config
from shared.sharding import ModelShards
from worker.comm.base import Communicator
from worker.kv_cache import KVCache, block_bytes
from worker.layers import Placement
from worker.loader import Checkpoint
from worker.model import Decoder, StepInput
from worker.ops.torch_ops import AttentionPlan, DecodeBatch, PrefillSpan
from worker.sampling.sampler import Sampled, Sampler
from worker.sampling.vocabulary import Vocabulary

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Ints = npt.NDArray[np.int64]


@dataclass
class LoadedModel:
    """One model on this rank."""

    decoder: Decoder
    sampler: Sampler
    cache: KVCache | None = None
    last_tokens: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


class Runner:
    """The models of one rank and what they need to run."""

    def __init__(self, comm: Communicator, owned: list[range], virtual_shards: int) -> None:
        """`owned`: the virtual shards of every rank."""
        self._comm = comm
        self._owned = owned
        self._virtual_shards = virtual_shards
        self._models: dict[str, LoadedModel] = {}

    def load(self, order: LoadModel) -> tuple[int, int]:
        """Read this rank's slices. Returns weight bytes and bytes of one KV block.

        Raises ModelError.
        """
        folder, dtype = Path(order.path), TORCH_DTYPES[order.dtype]
        config = read_model_config(folder)
        shards = ModelShards(config, self._virtual_shards)
        placement = Placement(shards, self._owned[self._comm.rank], self._comm, dtype)
        checkpoint = Checkpoint(folder)
        decoder = Decoder(checkpoint, placement, order.max_model_len)
        checkpoint.close()
        token_ids = [[shards.vocab_rows(range(v, v + 1)) for v in owned] for owned in self._owned]
        sampler = Sampler(self._comm, Vocabulary(self._comm.rank, token_ids))
        self._models[order.model] = LoadedModel(decoder, sampler)
        block = block_bytes(config.num_layers, decoder.kv_heads, config.head_dim, dtype)
        return decoder.weight_bytes(), block

    def allocate(self, order: AllocateKV) -> None:
        """KV memory of a loaded model."""
        model = self._models[order.model]
        decoder = model.decoder
        model.cache = KVCache(
            decoder.config.num_layers,
            decoder.kv_heads,
            decoder.config.head_dim,
            order.blocks,
            decoder.dtype,
        )
        model.last_tokens = np.zeros(order.slots, dtype=np.int64)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> Sampled:
        """Run one plan; a token for each sequence that wants one, in the plan's order."""
        model = self._models[plan.model]
        assert model.cache is not None, "allocate comes before step"
        for copy in plan.copies:
            model.cache.copy(copy.source, copy.target)
        for s in plan.sequences:
            if s.history is not None:
                model.sampler.begin(s.slot, s.history)
        logits = model.decoder(self.prepare(model, plan.sequences), model.cache)
        sampled = [(s, s.sampling) for s in plan.sequences if s.sampling is not None]
        if not sampled:
            return Sampled(tokens=[], logprobs=[])
        positions = [s.start + max(len(s.tokens), 1) for s, _ in sampled]
        slots = [s.slot for s, _ in sampled]
        chosen = model.sampler(logits, [sampling for _, sampling in sampled], positions, slots)
        model.last_tokens[slots] = chosen.tokens
        return chosen

    def prepare(self, model: LoadedModel, sequences: list[SequenceStep]) -> StepInput:
        """The tensors of one forward pass."""
        ids, positions, places, logit_rows = [], [], [], []
        prefill: list[PrefillSpan] = []
        decode_rows: list[int] = []
        decode_places: list[Ints] = []
        row = 0
        for s in sequences:
            tokens = s.tokens or [int(model.last_tokens[s.slot])]
            count = len(tokens)
            context = _places(s.blocks, s.start + count)
            ids += tokens
            positions.append(np.arange(s.start, s.start + count))
            places.append(context[s.start :])
            if count == 1:
                decode_rows.append(row)
                decode_places.append(context)
            else:
                prefill.append(PrefillSpan(row, count, s.start, torch.from_numpy(context)))
            row += count
            if s.sampling is not None:
                logit_rows.append(row - 1)
        window = model.decoder.config.sliding_window
        decode = _decode_batch(decode_rows, decode_places, window) if decode_rows else None
        return StepInput(
            ids=torch.tensor(ids),
            positions=torch.from_numpy(np.concatenate(positions)),
            places=torch.from_numpy(np.concatenate(places)),
            attention=AttentionPlan(tuple(prefill), decode, window),
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        )


def _places(blocks: bytes, length: int) -> Ints:
    """Where a block table keeps positions 0 .. length - 1: [length] int64."""
    table = np.frombuffer(blocks, dtype="<i4").astype(np.int64)[:, None]
    return (table * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)).ravel()[:length]


def _decode_batch(rows: list[int], contexts: list[Ints], window: int | None) -> DecodeBatch:
    """Contexts padded to the longest; what a token must not see is hidden."""
    lengths = np.array([len(c) for c in contexts])
    longest = int(lengths.max())
    places = np.stack([np.pad(c, (0, longest - len(c)), mode="edge") for c in contexts])
    at = np.arange(longest)
    hidden = at >= lengths[:, None]
    if window is not None:
        hidden |= at < lengths[:, None] - window
    return DecodeBatch(torch.tensor(rows), torch.from_numpy(places), torch.from_numpy(hidden))


class TimedCommunicator:
    """A communicator that adds up the time spent in it."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.rank, self.world = comm.rank, comm.world
        self.seconds = 0.0

    def all_reduce_tree(self, partials: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """As the communicator's."""
        began = time.perf_counter()
        total = self._comm.all_reduce_tree(partials)
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

    def close(self) -> None:
        """As the communicator's."""
        self._comm.close()
