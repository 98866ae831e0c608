"""How far one precision is from another: what is computed from two observations of one text."""

import math

import numpy as np
from msgspec import Struct

from shared.messages import KVPrecision, Precision
from worker.comm.base import Floats
from worker.compare.observe import Observed
from worker.compare.text import Text
from worker.sampling.vocabulary import Ints


class Difference(Struct, frozen=True, kw_only=True):
    """One precision against the reference. Errors are relative L2: ||a - b|| / ||b||."""

    dtype: Precision
    kv_dtype: KVPrecision
    layer_errors: list[float]
    """Of the residual stream that each layer hands on, over the compared positions."""
    logits_error: float
    greedy_agreement: float
    """Share of all positions whose most probable next token is the same."""
    equal_tokens: list[int]
    """For each prompt the tokens before the first that differs in the greedy continuations."""
    perplexity: float


class Reference(Struct, frozen=True, kw_only=True):
    """What the others are measured against."""

    dtype: Precision
    kv_dtype: KVPrecision
    perplexity: float


class Comparison(Struct, frozen=True, kw_only=True):
    """The whole result, as --json prints it."""

    model: str
    kernels: str
    text: str
    tokens: int
    """Of the text."""
    windows: int
    window_tokens: int
    """Of the longest window, a begin-of-text token included."""
    compared_positions: int
    """Those over which errors are measured: of the others too much would have to be kept."""
    positions: int
    continued_tokens: int
    """Of each greedy continuation."""
    reference: Reference
    precisions: list[Difference]


def difference(
    ours: Observed, theirs: Observed, dtype: Precision, kv_dtype: KVPrecision
) -> Difference:
    """Ours against theirs; both have observed the same text."""
    return Difference(
        dtype=dtype,
        kv_dtype=kv_dtype,
        layer_errors=[
            relative_error(a, b) for a, b in zip(ours.layers, theirs.layers, strict=True)
        ],
        logits_error=relative_error(ours.logits, theirs.logits),
        greedy_agreement=float(np.mean(ours.best == theirs.best)),
        equal_tokens=[
            equal_at_start(a, b)
            for a, b in zip(ours.continuations, theirs.continuations, strict=True)
        ],
        perplexity=perplexity(ours),
    )


def comparison(
    model: str,
    kernels: str,
    text: Text,
    reference: Reference,
    compared: int,
    precisions: list[Difference],
) -> Comparison:
    """The result with what it was measured on."""
    return Comparison(
        model=model,
        kernels=kernels,
        text=text.name,
        tokens=text.tokens,
        windows=len(text.windows),
        window_tokens=max(map(len, text.windows)),
        compared_positions=compared,
        positions=text.positions,
        continued_tokens=text.new_tokens,
        reference=reference,
        precisions=precisions,
    )


def relative_error(ours: Floats, theirs: Floats) -> float:
    """||ours - theirs|| / ||theirs|| over all numbers, each row of [P, N] summed in float64."""
    squares = [0.0, 0.0]
    for a, b in zip(ours, theirs, strict=True):
        apart, exact = a.astype(np.float64) - b, b.astype(np.float64)
        squares[0] += float(apart @ apart)
        squares[1] += float(exact @ exact)
    return math.sqrt(squares[0] / squares[1]) if squares[0] else 0.0


def equal_at_start(ours: Ints, theirs: Ints) -> int:
    """Tokens before the first that differs."""
    differ = np.flatnonzero(ours != theirs)
    return int(differ[0]) if len(differ) else len(ours)


def perplexity(observed: Observed) -> float:
    """exp of the mean negative log probability of the tokens that come (Jelinek et al. 1977)."""
    return float(np.exp(-observed.log_probabilities.mean()))
