"""What `tpserve bench` has measured of a model on this machine, for `tpserve plan` to set beside."""

from hashlib import sha256
from pathlib import Path

import msgspec
from msgspec import Struct

from coordinator.machine import cache_folder, keep, machine_key
from shared.messages import Precision
from shared.model_config import ModelConfig


class Measured(Struct, frozen=True, kw_only=True):
    """The median of one test of one configuration, in tokens per second."""

    workers: int
    threads: int
    dtype: Precision
    comm: str
    prefill: bool
    """Of reading; else of writing."""
    streams: int
    prompt: int
    """Tokens that are read, or that stand before those that are written."""
    tokens_per_s: float


class _File(Struct):
    when: str
    results: list[Measured]


def remember(config: ModelConfig, when: str, results: list[Measured]) -> None:
    """Keep results for models of this shape, with the date; the last run counts."""
    keep(_path(config), _File(when, results))


def recall(config: ModelConfig) -> tuple[str, list[Measured]]:
    """Date and results of the last run; empty where there is none."""
    try:
        file = msgspec.json.decode(_path(config).read_bytes(), type=_File)
    except (OSError, msgspec.DecodeError):
        return "", []
    return file.when, file.results


def _path(config: ModelConfig) -> Path:
    """Speed depends on sizes and not on what the weights are."""
    shape = msgspec.structs.replace(config, bos_id=None, eos_ids=(), dtype="fp32")
    digest = sha256(repr(shape).encode()).hexdigest()[:12]
    return cache_folder() / f"measured-{machine_key()}-{digest}.json"
