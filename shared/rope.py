"""Rotary positions by configuration: which frequencies, how long a context.

Checkpoints that were trained on short texts and then made longer say how in `rope_scaling` (or, since
transformers 5, `rope_parameters`). Pure numbers; the tables are worker/rope.py's.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
from msgspec import Struct

from shared.errors import ModelError

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3"]
ROPE_KINDS: tuple[RopeKind, ...] = get_args(RopeKind)
_THETA = 10000.0


class Rope(Struct, frozen=True, kw_only=True):
    """Angles are position * frequency; `kind` says what becomes of theta^(-2i/d)."""

    theta: float = _THETA
    kind: RopeKind = "default"
    factor: float = 1.0
    """How many times longer the context has become."""
    original_positions: int = 0
    """Context before that."""
    low_freq_factor: float = 1.0
    """llama3: waves longer than original / low_freq_factor are stretched by `factor`, ..."""
    high_freq_factor: float = 4.0
    """... shorter ones than original / high_freq_factor are left alone."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this in the original context are left alone, ..."""
    beta_slow: float = 1.0
    """... those that turn less often than this are stretched by `factor`."""
    truncate: bool = True
    """yarn: the border dimensions are rounded outwards."""
    attention_factor: float = 1.0
    """yarn: cos and sin are multiplied by it."""


class _Raw(Struct, kw_only=True):
    """The union of what the kinds read; other fields are ignored."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    partial_rotary_factor: float | None = None


def read_rope(
    given: Mapping[str, Any], theta: float, max_positions: int, path: Path
) -> tuple[Rope, int]:
    """Of the fields that config.json gives, and the longest context with it.

    theta: what stands beside them. Raises ModelError naming the field.
    """
    try:
        raw = msgspec.convert(dict(given), _Raw)
    except msgspec.ValidationError as error:
        raise ModelError(f"{path}: rope_scaling: {error}") from None
    kind = raw.rope_type or raw.type or "default"
    if kind not in ROPE_KINDS:
        raise ModelError(
            f"{path}: rope scaling {kind!r} is not supported (supported: {', '.join(ROPE_KINDS)})"
        )
    if raw.partial_rotary_factor not in (None, 1.0):
        raise ModelError(
            f"{path}: partial_rotary_factor {raw.partial_rotary_factor} is not supported (only 1)"
        )
    theta = _positive(theta if raw.rope_theta is None else raw.rope_theta, "rope_theta", path)
    if kind == "default":
        return Rope(theta=theta), max_positions
    original = raw.original_max_position_embeddings or max_positions
    _positive(original, "original_max_position_embeddings", path)
    factor = raw.factor
    if factor is None and kind == "yarn":
        factor = max_positions / original
    if factor is None:
        raise ModelError(f"{path}: rope scaling {kind!r} needs 'factor'")
    if not factor >= 1:
        raise ModelError(f"{path}: the factor of rope scaling is {factor}, it must be 1 or more")
    if kind == "llama3":
        low = _positive(raw.low_freq_factor, "low_freq_factor", path)
        high = _positive(raw.high_freq_factor, "high_freq_factor", path)
        if not low < high:
            raise ModelError(f"{path}: low_freq_factor {low} is not below high_freq_factor {high}")
        rope = Rope(
            theta=theta,
            kind=kind,
            factor=factor,
            original_positions=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
        return rope, max_positions
    if kind == "yarn":
        rope = Rope(
            theta=theta,
            kind=kind,
            factor=factor,
            original_positions=original,
            beta_fast=raw.beta_fast or 32.0,
            beta_slow=raw.beta_slow or 1.0,
            truncate=raw.truncate,
            attention_factor=_yarn_attention_factor(raw, factor),
        )
        return rope, max(max_positions, int(original * factor))
    if kind == "dynamic":
        rope = Rope(theta=theta, kind=kind, factor=factor, original_positions=max_positions)
        return rope, int(max_positions * factor)
    return Rope(theta=theta, kind="linear", factor=factor), max_positions


def _yarn_attention_factor(raw: _Raw, factor: float) -> float:
    """Makes up for the flatter scores of long contexts (Peng et al. 2023, eq. 22)."""
    if raw.attention_factor is not None:
        return raw.attention_factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if raw.mscale and raw.mscale_all_dim:
        return scale(raw.mscale) / scale(raw.mscale_all_dim)
    return scale(1.0)


def _positive(value: float | None, name: str, path: Path) -> float:
    if value is None:
        raise ModelError(f"{path}: rope scaling needs {name!r}")
    if not 0 < value < math.inf:
        raise ModelError(f"{path}: {name} is {value!r}, not a positive number")
    return float(value)
