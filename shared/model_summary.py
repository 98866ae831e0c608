"""What can be told of a model folder without loading it, also when the engine cannot compute it."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from shared.errors import ModelError
from shared.model_config import (
    GenerationDefaults,
    ModelConfig,
    read_generation_defaults,
    read_model_config,
)
from shared.rope import Rope

_LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


class ModelFile(Struct, frozen=True):
    """A file of the folder."""

    name: str
    size_bytes: int


class ModelSummary(Struct, frozen=True, kw_only=True):
    """Sizes in elements; None for what the files do not say."""

    path: str
    problems: list[str]
    """Why a server would refuse the model; empty: nothing is known against it."""
    model_type: str | None
    parameters: int | None
    """Counted in the safetensors files where the architecture is not known."""
    dtype: str | None
    max_positions: int | None
    vocab_size: int | None
    num_layers: int | None
    hidden_size: int | None
    intermediate_size: int | None
    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None
    sliding_window: int | None
    rope: dict[str, Any]
    """What differs from the kind's defaults, and `kind` and `theta`."""
    tokenizer: str | None
    """The file."""
    has_chat_template: bool
    sampling: dict[str, float]
    """Defaults of generation_config.json; those that change nothing are left out."""
    files: list[ModelFile]


def summarise(folder: Path) -> ModelSummary:
    """Read the small files of `folder`. Raises ModelError when it has no readable config.json."""
    raw = _read_object(folder / "config.json")
    problems: list[str] = []
    config: ModelConfig | None = None
    defaults = GenerationDefaults()
    try:
        config = read_model_config(folder)
        defaults = read_generation_defaults(folder)
    except ModelError as error:
        problems.append(error.message)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        problems.append("there are no weights: no file ends in .safetensors")
    tokenizer = next((name for name in _TOKENIZERS if (folder / name).exists()), None)
    if tokenizer is None:
        problems.append(f"there is no tokenizer: neither {' nor '.join(_TOKENIZERS)}")
    fields = _known(config) if config is not None else _guessed(raw)
    return ModelSummary(
        path=str(folder),
        problems=problems,
        parameters=config.parameters if config else _count_elements(weights),
        tokenizer=tokenizer,
        has_chat_template=_has_chat_template(folder),
        sampling=_differences(defaults, GenerationDefaults()),
        files=[
            ModelFile(path.name, path.stat().st_size)
            for path in sorted(folder.iterdir())
            if path.is_file()
        ],
        **fields,
    )


def _known(config: ModelConfig) -> dict[str, Any]:
    same = (
        "model_type",
        "max_positions",
        "vocab_size",
        "num_layers",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "sliding_window",
        "dtype",
    )
    rope = {"kind": config.rope.kind, "theta": config.rope.theta}
    neutral = Rope(kind=config.rope.kind, theta=config.rope.theta)
    return {name: getattr(config, name) for name in same} | {
        "rope": rope | _differences(config.rope, neutral)
    }


def _guessed(raw: dict[str, Any]) -> dict[str, Any]:
    """What the usual names of the fields tell of an architecture that is not known."""
    text = raw.get("text_config")  # where models of more than text have it
    inner = raw | text if isinstance(text, dict) else raw

    def number(name: str) -> int | None:
        value = inner.get(name)
        return value if type(value) is int else None

    dtype = inner.get("torch_dtype") or inner.get("dtype")
    scaling = inner.get("rope_parameters") or inner.get("rope_scaling")
    theta = inner.get("rope_theta")
    rope = {"theta": theta} if isinstance(theta, int | float) else {}
    return {
        "model_type": str(raw["model_type"]) if "model_type" in raw else None,
        "max_positions": number("max_position_embeddings"),
        "vocab_size": number("vocab_size"),
        "num_layers": number("num_hidden_layers"),
        "hidden_size": number("hidden_size"),
        "intermediate_size": number("intermediate_size"),
        "num_heads": number("num_attention_heads"),
        "num_kv_heads": number("num_key_value_heads"),
        "head_dim": number("head_dim"),
        "sliding_window": number("sliding_window"),
        "dtype": dtype if isinstance(dtype, str) else None,
        "rope": rope | scaling if isinstance(scaling, dict) else rope,
    }


def _differences(value: Struct, neutral: Struct) -> dict[str, Any]:
    plain, default = msgspec.to_builtins(value), msgspec.to_builtins(neutral)
    return {name: v for name, v in plain.items() if v != default[name]}


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists():
        return True
    path = folder / "tokenizer_config.json"
    return path.exists() and bool(_read_object(path).get("chat_template"))


def _count_elements(weights: list[Path]) -> int | None:
    """None when there are none, or one cannot be read."""
    try:
        return sum(_elements(path) for path in weights) or None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error):
        return None


def _elements(path: Path) -> int:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LONGEST_HEADER:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
    return sum(
        math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: {path.parent} is not a model folder") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: {error}") from None
