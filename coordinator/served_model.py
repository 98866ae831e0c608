"""A model as the coordinator knows it: configuration, text side, and its scheduler."""

import logging
from dataclasses import dataclass
from pathlib import Path

from coordinator.cluster import ModelOnWorkers
from coordinator.jobs import JobQueue
from coordinator.pace import Pace
from coordinator.scheduler import Scheduler
from coordinator.text import TextModel
from shared.config import Settings
from shared.errors import ModelError
from shared.hub import resolve_model
from shared.messages import BLOCK_TOKENS, ModelInfo, ModelState, Precision
from shared.model_config import (
    GenerationDefaults,
    ModelConfig,
    read_generation_defaults,
    read_model_config,
)
from shared.precision import kv_precision

log = logging.getLogger(__name__)


@dataclass
class ServedModel:
    """One entry of `--model NAME=MODEL`."""

    name: str
    source: str
    """The folder or the hub's name that was asked for."""
    config: ModelConfig
    defaults: GenerationDefaults
    text: TextModel
    on_workers: ModelOnWorkers
    queue: JobQueue
    pace: Pace
    state: ModelState = "loading"
    """It takes jobs when it is "ready"."""
    scheduler: Scheduler | None = None
    """None until the workers have loaded the model."""

    @property
    def max_model_len(self) -> int:
        """Longest prompt + answer, in tokens: what the model and the KV cache can hold."""
        on_workers = self.on_workers
        if on_workers.kv_blocks:
            return min(on_workers.max_model_len, on_workers.kv_blocks * BLOCK_TOKENS)
        return on_workers.max_model_len

    @property
    def root_digest(self) -> bytes:
        """What the KV of a token depends on besides the tokens before it."""
        on_workers = self.on_workers
        return f"{self.name}|{on_workers.path}|{on_workers.dtype}|{on_workers.kv_dtype}".encode()

    def info(self) -> ModelInfo:
        """What clients are told."""
        return ModelInfo(
            name=self.name,
            path=str(self.on_workers.path),
            model_type=self.config.model_type,
            dtype=self.on_workers.dtype,
            kv_dtype=self.on_workers.kv_dtype,
            parameters=self.config.parameters,
            max_model_len=self.max_model_len,
            vocab_size=self.config.vocab_size,
            kv_capacity_tokens=self.scheduler.capacity_tokens if self.scheduler else 0,
            has_chat_template=self.text.has_chat_template,
            state=self.state,
            weight_bytes=self.on_workers.weight_bytes,
            kv_bytes=self.on_workers.kv_bytes,
        )


def open_model(name: str, path: str, settings: Settings) -> ServedModel:
    """Read everything but the weights, from a folder or from the hub; `fetch_weights` comes next.

    Raises ModelError naming the file and what is wrong.
    """
    folder = _resolve(name, path, settings, weights=False)
    config = read_model_config(folder)
    limit = settings.max_model_len or config.max_positions
    dtype: Precision = config.dtype if settings.dtype == "auto" else settings.dtype
    return ServedModel(
        name=name,
        source=path,
        config=config,
        defaults=read_generation_defaults(folder),
        text=TextModel(folder, config),
        on_workers=ModelOnWorkers(
            name=name,
            path=folder,
            dtype=dtype,
            kv_dtype=kv_precision(settings.kv_dtype, dtype),
            max_model_len=min(limit, config.max_positions),
        ),
        queue=JobQueue(
            {
                "story": settings.story_weight,
                "chat": settings.chat_weight,
                "embedding": settings.embedding_weight,
            }
        ),
        pace=Pace(settings.steps_per_plan),
    )


def fetch_weights(model: ServedModel, settings: Settings) -> None:
    """Have the weights in the model's folder, too. Raises ModelError."""
    model.on_workers.path = _resolve(model.name, model.source, settings, weights=True)


def _resolve(name: str, path: str, settings: Settings, *, weights: bool) -> Path:
    try:
        return resolve_model(path, offline=settings.offline, report=log.info, weights=weights)
    except ModelError as error:
        raise ModelError(f"model {name}: {error.message}") from None
