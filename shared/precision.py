"""How large a weight is in each precision, and which one keys and values have when nobody chose it."""

from collections.abc import Mapping
from typing import Literal

from shared.messages import KVPrecision, Precision

BYTES_PER_WEIGHT: Mapping[Precision, float] = {
    "fp32": 4,
    "bf16": 2,
    "fp16": 2,
    "int8": 1 + 2 / 32,
    "int4": 0.5 + 2 / 32,
}
"""Scales of groups included."""


def kv_precision(wanted: KVPrecision | Literal["auto"], weights: Precision) -> KVPrecision:
    """`wanted`; for auto that of the weights, or bf16 if those are quantised."""
    if wanted != "auto":
        return wanted
    return "bf16" if weights == "int8" or weights == "int4" else weights
