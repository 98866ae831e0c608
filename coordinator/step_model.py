"""How long a step of a model takes on this machine, and so how many tokens per second there will be.

A step reads all weights once and multiplies them with every token of the step; reads the keys and
values of what came before; and meets at two all-reduces in each layer. Each of these is a product of
something known of the model (planner.py) and something measured of the machine (machine.py).
Models that stay in the processor's cache are faster than is predicted here.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from coordinator.machine import ROWS, Comm, Exchanging, Machine
from coordinator.pace import passes_of
from coordinator.planner import kv_token_bytes, layer_and_head_bytes
from shared.messages import KVPrecision, Precision
from shared.model_config import ModelConfig
from shared.sharding import ModelShards, assign_shards

ONE_THREAD_BYTES = 16 << 20
"""Workers compute a model with less than this of weights with one thread, however many they have."""

_MOST_PASSES = 8
"""Of a plan, by default: --steps-per-plan."""
_ATTENTION: Precision = "fp32"
"""In which attention is computed; its weights are read fastest, too."""
_HEAD: Mapping[Precision, Precision] = {"int4": "int8"}
"""In which logits are computed, where it is not in that of the layers."""


def precisions_of(dtypes: Iterable[Precision]) -> set[Precision]:
    """Those in which a machine must have been measured to predict steps of models in `dtypes`."""
    return {_ATTENTION, *dtypes, *(_HEAD.get(dtype, dtype) for dtype in dtypes)}


@dataclass(frozen=True)
class Choice:
    """What may be chosen for a model."""

    workers: int
    threads: int
    """Of each worker."""
    dtype: Precision
    kv_dtype: KVPrecision
    comm: Comm
    """Between workers; one alone is "local"."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one forward pass, by what takes them."""

    weights_s: float
    """Reading weights and multiplying with them."""
    attention_s: float
    """Reading keys and values, and multiplying with them."""
    layers_s: float
    """What each layer takes besides: norms, rotations, barriers, the worker's Python."""
    exchange_s: float
    """All-reduces."""
    coordinator_s: float
    """Plans and results on their way."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return (
            self.weights_s + self.attention_s + self.layers_s + self.exchange_s + self.coordinator_s
        )


class StepModel:
    """One model on one machine."""

    def __init__(self, machine: Machine, config: ModelConfig, virtual_shards: int) -> None:
        self._machine, self._config = machine, config
        self._shards = ModelShards(config, virtual_shards)

    def knows(self, choice: Choice) -> bool:
        """Whether the machine's kernels have its precision, and its collective was measured."""
        measured = [name.partition("-")[0] for name in self._machine.exchanging]
        return choice.dtype in self._machine.multiplying and choice.comm in measured

    def decode_tokens_per_s(self, choice: Choice, streams: int, depth: int) -> float:
        """Of all streams together, with so many tokens before each new one."""
        return streams / self.step(choice, rows=streams, logits=streams, depth=depth).seconds

    def prefill_tokens_per_s(self, choice: Choice, prompt: int, chunk: int) -> float:
        """While a prompt is read in steps of `chunk` tokens."""
        starts = range(0, prompt, chunk)
        seconds = sum(
            self.step(
                choice,
                rows=min(chunk, prompt - start),
                logits=int(start + chunk >= prompt),
                depth=start + min(chunk, prompt - start) // 2,
                sequences=1,
            ).seconds
            for start in starts
        )
        return prompt / seconds

    def step(
        self, choice: Choice, *, rows: int, logits: int, depth: int, sequences: int | None = None
    ) -> StepTime:
        """A forward pass of `rows` tokens, `logits` of which want a successor.

        depth: tokens before each, on average. sequences: that the rows belong to; None: one each.
        """
        config, machine = self._config, self._machine
        owned = assign_shards(choice.workers, self._shards.virtual_shards)[0]  # the largest share
        of_layers, of_head = layer_and_head_bytes(self._shards, owned, choice.dtype)
        threads = choice.threads if of_layers + of_head >= ONE_THREAD_BYTES else 1
        computing = choice.workers * threads
        cores = min(computing, machine.cores)
        crowded = computing / cores  # more threads than cores take turns
        slower = crowded / threads
        weights_s = of_layers * self._seconds_per_byte(choice.dtype, rows, cores, threads)
        if logits:
            head = _HEAD.get(choice.dtype, choice.dtype)
            weights_s += of_head * self._seconds_per_byte(head, logits, cores, threads)
        alone, ranks = machine.exchanging["local-1"], self._exchanging(choice)
        compute = StepTime(
            weights_s=weights_s * slower,
            attention_s=self._attention_s(choice, owned, rows, depth, sequences, cores) * slower,
            layers_s=alone.pass_s + config.num_layers * alone.layer_s,
            exchange_s=self._exchange_s(alone, ranks, rows) * crowded,
            coordinator_s=0.0,
        )
        passes = passes_of(compute.seconds, _MOST_PASSES)
        return StepTime(
            compute.weights_s,
            compute.attention_s,
            compute.layers_s,
            compute.exchange_s,
            machine.message_s / passes,
        )

    def _seconds_per_byte(self, dtype: Precision, rows: int, cores: int, threads: int) -> float:
        """Of one thread's weights, when so many cores compute, with `threads` of each process."""
        kernel, others = self._machine.multiplying[dtype], self._machine.cores - 1
        alone, together, threaded = (
            _at(rows, seconds) for seconds in (kernel.alone, kernel.together, kernel.threaded)
        )
        if others == 0:
            return alone
        of_processes = alone + (together - alone) * (cores - 1) / others
        # Threads of a process meet at barriers: the more of them, the longer.
        return of_processes + (threaded - together) * min(threads - 1, others) / others

    def _attention_s(
        self,
        choice: Choice,
        owned: range,
        rows: int,
        depth: int,
        sequences: int | None,
        cores: int,
    ) -> float:
        """Of one thread: keys and values are read once for a sequence, and used by every row."""
        machine, config = self._machine, self._config
        token_bytes = kv_token_bytes(self._shards, owned, choice.kv_dtype)
        read = (sequences or rows) * depth * token_bytes / (machine.bandwidth(cores) / cores)
        heads = len(self._shards.heads(owned))
        operations = 4 * rows * depth * heads * config.head_dim * config.num_layers
        return max(read, operations / (machine.operations(_ATTENTION, cores) / cores))

    def _exchange_s(self, alone: Exchanging, ranks: Exchanging, rows: int) -> float:
        """What two all-reduces a layer, and the one of sampling, take beyond a worker alone."""
        config = self._config
        latency = (ranks.pass_s - alone.pass_s) + config.num_layers * (
            ranks.layer_s - alone.layer_s
        )
        floats = 2 * config.num_layers * rows * config.hidden_size
        return max(0.0, latency) + floats * max(0.0, ranks.float_s - alone.float_s)

    def _exchanging(self, choice: Choice) -> Exchanging:
        """As measured with as many workers, or the nearest number there is."""
        if choice.workers == 1:
            return self._machine.exchanging["local-1"]
        worlds = {
            int(world): found
            for name, found in self._machine.exchanging.items()
            for comm, _, world in (name.partition("-"),)
            if comm == choice.comm
        }
        nearest = min(worlds, key=lambda world: (abs(math.log2(world / choice.workers)), -world))
        return worlds[nearest]


def _at(rows: int, seconds: list[float]) -> float:
    """Between the measured numbers of rows a straight line; beyond them, in proportion."""
    if rows >= ROWS[-1]:
        return seconds[-1] * rows / ROWS[-1]
    for (low, below), (high, above) in itertools.pairwise(zip(ROWS, seconds, strict=True)):
        if rows <= high:
            return below + (above - below) * (rows - low) / (high - low)
    raise AssertionError("rows is less than the last of ROWS")
