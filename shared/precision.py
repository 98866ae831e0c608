"""Which precision keys and values have when nobody chose one."""

from typing import Literal

from shared.messages import KVPrecision, Precision


def kv_precision(wanted: KVPrecision | Literal["auto"], weights: Precision) -> KVPrecision:
    """`wanted`; for auto that of the weights, or bf16 if those are quantised."""
    if wanted != "auto":
        return wanted
    return "bf16" if weights == "int8" or weights == "int4" else weights
