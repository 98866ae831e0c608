"""Which workers, threads, precision and collective are predicted to serve a model fastest."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from coordinator.machine import Comm, Machine, machine
from coordinator.planner import needed_bytes
from coordinator.served_model import ServedModel, open_model
from coordinator.step_model import Choice, StepModel
from shared.config import AUTO_WORKERS, Settings, Sourced
from shared.errors import MemoryPlanError
from shared.memory import free_bytes
from shared.messages import Precision
from shared.model_config import ModelConfig
from shared.precision import kv_precision

DEPTH = 256
"""Tokens before those that are written, and of the prompt that is read."""
STREAMS = (1, 8)
_CLOSE = 0.97
"""A choice that is this part as fast as the fastest is as good, if it has fewer workers."""


@dataclass(frozen=True)
class Prediction:
    """Tokens per second of one choice."""

    choice: Choice
    decode: tuple[float, ...]
    """By STREAMS."""
    prefill: float
    needed_bytes: int
    """Of all its workers together."""

    @property
    def score(self) -> float:
        """What choices are compared by: one stream, several, and reading count alike."""
        rates = (*self.decode, self.prefill)
        return math.prod(rates) ** (1 / len(rates))


def settle(sourced: Sourced) -> Settings:
    """The settings with `workers auto` replaced by numbers, and all that follows from it.

    Raises ModelError, MemoryPlanError when no choice fits into memory, TpserveError when the
    machine cannot be measured.
    """
    settings = sourced.settings
    if settings.workers != AUTO_WORKERS:
        return settings
    models = [open_model(name, path, settings) for name, path in settings.model.items()]
    largest = max(models, key=lambda model: model.config.parameters)
    comm: Sequence[Comm] = ("shm", "zmq", "gloo")
    if sourced.sources["comm"] != "default":
        comm = (settings.comm,)
    predictions = predict(machine(), largest.config, settings, candidates(settings, largest, comm))
    chosen = best(predictions, free_bytes())
    return msgspec.structs.replace(
        settings,
        workers=chosen.choice.workers,
        threads_per_worker=chosen.choice.threads,
        dtype=settings.dtype if not settings.auto_dtypes else chosen.choice.dtype,
        comm=settings.comm if chosen.choice.comm == "local" else chosen.choice.comm,
    )


def candidates(
    settings: Settings, model: ServedModel, comms: Sequence[Comm] = ("shm",)
) -> Iterator[Choice]:
    """All choices that the settings leave open; no more workers than cores or virtual shards."""
    cores = settings.cores
    most = min(cores, settings.virtual_shards)
    workers = [2**n for n in range(most.bit_length()) if 2**n <= most]
    if settings.workers != AUTO_WORKERS:
        workers = [settings.workers]
    elif most not in workers:
        workers.append(most)
    dtypes: list[Precision] = [model.on_workers.dtype, *settings.auto_dtype_list]
    for dtype, count in itertools.product(dict.fromkeys(dtypes), workers):
        threads = settings.threads_per_worker or max(1, cores // count)
        for comm in comms if count > 1 else ("local",):
            yield Choice(count, threads, dtype, kv_precision(settings.kv_dtype, dtype), comm)


def predict(
    measured: Machine, config: ModelConfig, settings: Settings, choices: Iterator[Choice]
) -> list[Prediction]:
    """In the order of the choices; those that the machine's kernels cannot compute are left out."""
    steps = StepModel(measured, config, settings.virtual_shards)
    found = []
    for choice in choices:
        if not steps.knows(choice):
            continue
        found.append(
            Prediction(
                choice=choice,
                decode=tuple(steps.decode_tokens_per_s(choice, n, DEPTH) for n in STREAMS),
                prefill=steps.prefill_tokens_per_s(choice, DEPTH, settings.max_batched_tokens),
                needed_bytes=needed_bytes(config, settings, choice.workers, choice.dtype),
            )
        )
    return found


def best(predictions: Sequence[Prediction], free: int) -> Prediction:
    """The fastest that fits into `free` bytes. Raises MemoryPlanError when none does."""
    fitting = [p for p in predictions if p.needed_bytes <= free]
    if not fitting:
        least = min(p.needed_bytes for p in predictions)
        raise MemoryPlanError(
            f"--workers auto: no number of workers fits: at least {least / 1e9:.2f} GB is needed,"
            f" {free / 1e9:.2f} GB is free: take a smaller --dtype, model or --max-model-len"
        )
    most = max(p.score for p in fitting)
    close = [p for p in fitting if p.score >= _CLOSE * most]
    return min(
        close, key=lambda p: (p.choice.workers * p.choice.threads, p.choice.workers, -p.score)
    )
