"""How exact the native kernels are, against float64 and in every level of vector instructions.

Operations are recorded as the model records them, on inputs chosen here, and run for one step.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from shared.errors import CommError
from shared.messages import KVPrecision, Precision
from shared.sharding import assign_shards
from shared.shm import create_shm_region
from shared.worker_messages import CommSetup, SequenceStep
from tests.worker.native_ranks import (
    GREEDY,
    Model,
    Piece,
    Setting,
    Shape,
    Texts,
    chunks,
    logits_of,
    write_checkpoint,
)
from tests.worker.rank_threads import VIRTUAL_SHARDS
from worker.comm.local import LocalCommunicator
from worker.comm.open import open_communicator
from worker.native.api import Pool, isa_of, native_library
from worker.native.toolchain import LEVELS
from worker.ops.base import HeadLayout, RopeTable, Source, Value
from worker.ops.native import NativeOps

pytestmark = pytest.mark.skipif(
    native_library() is None, reason="there is no native library: no C++ compiler to build it"
)

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
DTYPES: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8", "int4")
KV_DTYPES: tuple[KVPrecision, ...] = ("fp32", "bf16", "fp16", "int8")
ONE_SHARD = [range(1)]
PROJECT = Path(__file__).resolve().parents[2]
LEVEL_DEADLINE_S = 240


# --- running recorded operations ------------------------------------------------------------------


def source(weight: torch.Tensor) -> Source:
    rows, columns = weight.shape
    return Source(rows, columns, lambda: weight)


class Bench:
    """One rank of one virtual shard, and programs on it that end with a value to look at."""

    def __init__(
        self,
        dtype: Precision = "fp32",
        kv_dtype: KVPrecision = "fp32",
        window: int | None = None,
        threads: int = 1,
    ) -> None:
        library = native_library()
        assert library is not None
        comm = LocalCommunicator(CommSetup(kind="local", rank=0, owned=[(0, 1)], deadline_s=60))
        pool = Pool(library, threads, crowded=True, from_bytes=0)
        self.ops = NativeOps(comm, pool, ONE_SHARD, dtype, kv_dtype, window)
        self._result: Value = None

    def record(
        self, build: Callable[[NativeOps], Value], layout: HeadLayout, blocks: int = 8
    ) -> None:
        """The operations of `build`, which returns the value that `run` is to show."""

        def forward() -> Value:
            head = self.ops.weight(source(torch.zeros(1, 32)), token_ids=[range(1)])
            x = self.ops.embed(self.ops.table(torch.zeros(1 << 12, 32)))
            delta = self.ops.embed(self.ops.table(torch.zeros(1 << 12, 32)))
            logits = self.ops.logits(
                self.ops.final_norm(x, delta, self.ops.vector(torch.ones(32)), 1e-6), head
            )
            self._result = build(self.ops)  # the last one: its memory is not used again
            return logits

        self.ops.allocate(forward, 1, layout, blocks, 1 << 12)

    def run(self, *sequences: SequenceStep) -> Floats:
        """One step; the value of `build`: [T, its columns]."""
        self.ops.run(sequences, np.zeros(1, np.int64))
        tokens = sum(len(s.tokens) for s in sequences)
        address = self.ops._library.tps_program_floats(
            self.ops._program, self.ops._buffers[self._result]
        )
        floats = ctypes.c_float * (tokens * self._result.width)
        rows = np.ctypeslib.as_array(floats.from_address(address)).reshape(tokens, -1)
        result: Floats = rows[:, : self._result.columns].copy()
        return result


NO_HEADS = HeadLayout(
    head_dim=16, heads=range(0), kv_heads=range(0), queries_per_kv=1, by_shard=(range(0),)
)


def rows_step(count: int, start: int = 0) -> SequenceStep:
    """Rows 0, 1, ... of the embedding."""
    blocks = np.arange(64, dtype="<i4").tobytes()
    return SequenceStep(0, start, list(range(count)), blocks, None)


def tensor(values: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def normed(x: npt.NDArray[Any], eps: float = 1e-6) -> Doubles:
    wide = x.astype(np.float64)
    result: Doubles = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + eps)
    return result


def linear(
    weight: npt.NDArray[Any],
    x: npt.NDArray[Any],
    dtype: Precision,
    channel: npt.NDArray[Any] | None = None,
    threads: int = 1,
) -> Floats:
    """norm(x) * channel times `weight` transposed: the norm is what makes a linear's input."""
    return linear_bench(weight, x, dtype, channel, threads).run(rows_step(len(x)))


def linear_bench(
    weight: npt.NDArray[Any],
    x: npt.NDArray[Any],
    dtype: Precision,
    channel: npt.NDArray[Any] | None = None,
    threads: int = 1,
) -> Bench:
    """For `linear` of some of the rows of x."""
    bench = Bench(dtype, threads=threads)
    scale = np.ones(x.shape[1]) if channel is None else channel

    def build(ops: NativeOps) -> Value:
        embedded = ops.embed(ops.table(tensor(x)))
        _, value = ops.add_norm(embedded, None, ops.vector(tensor(scale)), 1e-6)
        return ops.linear(value, ops.weight(source(tensor(weight))))

    bench.record(build, NO_HEADS)
    return bench


def unpacked(weight: npt.NDArray[Any], dtype: Precision) -> Floats:
    """What a packed weight [N, K] stands for: its product with each unit vector."""
    columns = weight.shape[1]
    # The norm of a unit vector is sqrt(K); eps is nothing beside a mean of 1.
    unit = np.eye(columns) * columns**0.5
    return linear(weight, unit, dtype, channel=np.full(columns, columns**-0.5)).T


def groups(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return x.reshape(len(x), -1, 32)


def largest_of_groups(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The largest magnitude of each element's group, in the shape of x."""
    largest = np.abs(groups(x)).max(axis=2, keepdims=True)
    return np.broadcast_to(largest, groups(x).shape).reshape(x.shape)


def as_stored(weight: npt.NDArray[Any], dtype: Precision) -> Doubles:
    """A weight of floats rounded to `dtype`."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    stored: Doubles = tensor(weight).to(kind).double().numpy()
    return stored


# --- packing: what a weight stands for ------------------------------------------------------------


def weights_of_all_kinds() -> Floats:
    """Groups of: like numbers, zeros, one outlier, powers of two, tiny numbers, one sign."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((21, 32 * 6)).astype(np.float32) * 0.02
    weight[:, 32:64] = 0
    weight[:, 64] = 50
    weight[:, 96:128] = 2.0 ** rng.integers(-12, 3, (21, 32))
    weight[:, 128:160] *= 1e-2 ** rng.random((21, 1))
    weight[:, 160:192] = np.abs(weight[:, 160:192]) + 0.01
    return weight


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_accuracy_of_packed_floats_is_that_of_their_format(dtype: Precision) -> None:
    weight = weights_of_all_kinds()
    stored = as_stored(weight, dtype)
    np.testing.assert_allclose(unpacked(weight, dtype), stored, rtol=1e-6, atol=1e-12)


def test_accuracy_of_packed_int8_is_half_a_step() -> None:
    weight = weights_of_all_kinds()
    half_step = largest_of_groups(weight) / 127 / 2
    # Scales are IEEE halves: in steps of 2^-24 at least, and of 2^-11 of their size.
    slack = 1.01 * half_step + np.abs(weight) * 2**-11 + 1e-9
    assert (np.abs(unpacked(weight, "int8") - weight) <= slack).all()


def test_accuracy_of_packed_int4_is_a_step() -> None:
    weight = weights_of_all_kinds()
    error = np.abs(unpacked(weight, "int4") - weight)
    step = largest_of_groups(weight) / 6.65  # the coarsest of the scales that are tried
    assert (error <= 1.01 * step + 1e-9).all()
    # Far better than that on the whole: the usual scale, which maps the extreme to -8, at least.
    usual = largest_of_groups(weight) / 8
    assert np.sqrt((error**2).mean()) <= np.sqrt(((usual / 2) ** 2).mean())


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("magnitude", [1e-4, 1e-5, 1e-6, 1e-7, 1e-9, 1e-40, 0.0])
def test_accuracy_of_packed_tiny_weights(dtype: Precision, magnitude: float) -> None:
    """Where the scale, an IEEE half, is itself coarse: a multiple of 2^-24."""
    rng = np.random.default_rng(1)
    weight = (rng.uniform(-1, 1, (16, 64)) * magnitude).astype(np.float32)
    largest_error = np.abs(unpacked(weight, dtype) - weight).max()
    if dtype == "int8":
        assert largest_error <= max(magnitude / 127, 2**-24) * (0.5 + 1e-3) + 2**-25
    else:
        assert largest_error <= max(magnitude / 6.65, 4 * 2**-24) * 1.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_is_to_the_bit_the_same_for_a_token_alone_and_among_any_number(
    dtype: Precision,
) -> None:
    rng = np.random.default_rng(8)
    weight, x = rng.standard_normal((90, 160)), rng.standard_normal((66, 160))
    bench = linear_bench(weight, x, dtype, threads=2)
    among_all = bench.run(rows_step(len(x)))
    for count in range(1, len(x)):
        assert np.array_equal(bench.run(rows_step(count)), among_all[:count]), count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 31])
def test_accuracy_of_a_weight_that_is_not_finite_does_not_become_a_number(
    dtype: Precision, bad: float, place: int
) -> None:
    rng = np.random.default_rng(8)
    weight, x = rng.standard_normal((40, 64)), rng.standard_normal((3, 64))
    weight[7, 32 + place] = bad
    y = linear(weight, x, dtype)
    assert not np.isfinite(y[:, 7]).any()
    assert np.isfinite(np.delete(y, 7, axis=1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_of_an_outlier_leaves_other_groups_alone(dtype: Precision) -> None:
    weight = np.random.default_rng(2).standard_normal((16, 96)).astype(np.float32)
    calm = unpacked(weight, dtype)
    weight[:, 40] = 6e4
    stormy = unpacked(weight, dtype)
    assert np.array_equal(stormy[:, :32], calm[:, :32])
    assert np.array_equal(stormy[:, 64:], calm[:, 64:])
    np.testing.assert_allclose(stormy[:, 40], 6e4, rtol=0.01 if dtype != "int4" else 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_of_powers_of_two_is_exact_where_the_format_holds_them(dtype: Precision) -> None:
    # One magnitude a group, and both signs: 127 steps of int8, 8 or -8 of 16 levels.
    weight = np.repeat(2.0 ** np.arange(-6, 6), 32)[None].repeat(16, axis=0).astype(np.float32)
    if dtype != "int4":
        weight[:, ::3] *= -1
    # int8: 127 steps of a scale that is rounded to 11 bits.
    rtol = {"int8": 2**-11, "int4": 2**-11}.get(dtype, 1e-6)
    np.testing.assert_allclose(unpacked(weight, dtype), weight, rtol=rtol)


# --- linear ---------------------------------------------------------------------------------------


def multiplies_bf16() -> bool:
    """Whether this level of instructions rounds the activations of bf16 weights to bf16."""
    library = native_library()
    assert library is not None
    return isa_of(library) in ("avx512bf16", "amx")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "tokens"), [(1, 32, 1), (16, 64, 3), (77, 320, 7), (200, 1024, 50)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_accuracy_of_a_linear(
    dtype: Precision, rows: int, columns: int, tokens: int, threads: int
) -> None:
    rng = np.random.default_rng([rows, columns])
    weight = rng.standard_normal((rows, columns)).astype(np.float32) * columns**-0.5
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    x[:, 5] *= 30  # activations have outliers
    ours = linear(weight, x, dtype, threads=threads)
    inputs = normed(x)
    meant = unpacked(weight, dtype) if dtype in ("int8", "int4") else as_stored(weight, dtype)
    theirs = inputs @ meant.astype(np.float64).T
    # Rounding of sums, and half a step of each activation where they are rounded as well.
    allowed = np.abs(inputs) @ np.abs(meant).T * 1e-6 * np.sqrt(columns) + 1e-7
    if dtype in ("int8", "int4"):
        allowed += (largest_of_groups(inputs) / 127 / 2 * 1.001) @ np.abs(meant).T
    if dtype == "bf16" and multiplies_bf16():
        allowed += (np.abs(inputs) * 2**-9 * 1.001) @ np.abs(meant).T
    assert (np.abs(ours - theirs) <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 7, 8, 15, 16, 30, 31])
def test_accuracy_of_one_number_that_is_not_finite_reaches_every_output(
    dtype: Precision, bad: float, place: int
) -> None:
    rng = np.random.default_rng(3)
    weight, x = rng.standard_normal((40, 64)) + 5, rng.standard_normal((3, 64))
    channel = np.ones(64)
    channel[32 + place] = bad  # in every row, behind the norm
    assert not np.isfinite(linear(weight, x, dtype, channel=channel)).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_accuracy_of_a_residual_that_overflowed_is_not_hidden_by_the_norm(
    dtype: Precision, bad: float
) -> None:
    rng = np.random.default_rng(4)
    weight, x = rng.standard_normal((40, 64)) + 5, rng.standard_normal((4, 64))
    x[2, 3] = bad
    y = linear(weight, x, dtype)
    assert not np.isfinite(y[2]).any()
    assert np.isfinite(y[[0, 1, 3]]).all(), "other tokens have nothing to do with it"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-37, 1e-38, 1e-41, 0.0])
def test_accuracy_of_tiny_activations(dtype: Precision, magnitude: float) -> None:
    weight = np.random.default_rng(5).standard_normal((16, 64)).astype(np.float32)
    x = np.ones((2, 64), np.float32)
    channel = np.full(64, magnitude, np.float32)
    ours = linear(weight, x, dtype, channel=channel)
    theirs = normed(x) * channel @ weight.astype(np.float64).T
    # In int8 a group is 0 whose largest number is less than 2^-100.
    size = np.abs(weight).sum(axis=1)
    largest_error = magnitude * size * (0.2 if dtype == "int4" else 0.02) + 2.0**-100 * size
    assert (np.abs(ours - theirs) <= largest_error).all()


# --- between the linears --------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e4, 1e15])
@pytest.mark.parametrize("size", [32, 96, 2048])
def test_accuracy_of_norms(scale: float, size: int) -> None:
    rng = np.random.default_rng(6)
    x = (rng.standard_normal((5, size)) * scale).astype(np.float32)
    delta = (rng.standard_normal((5, size)) * scale).astype(np.float32)
    weight = rng.standard_normal(size).astype(np.float32)
    bench = Bench()

    def build(ops: NativeOps) -> Value:
        first, second = (ops.embed(ops.table(tensor(rows))) for rows in (x, delta))
        return ops.add_norm(first, second, ops.vector(tensor(weight)), 1e-5)[1]

    bench.record(build, NO_HEADS)
    np.testing.assert_allclose(
        bench.run(rows_step(5)), normed(x + delta, 1e-5) * weight, rtol=1e-5, atol=1e-30
    )


def swiglu(gate: npt.NDArray[Any], up: npt.NDArray[Any]) -> Floats:
    bench = Bench()
    both = np.concatenate([gate, up], axis=1)
    bench.record(lambda ops: ops.swiglu(ops.embed(ops.table(tensor(both)))), NO_HEADS)
    return bench.run(rows_step(len(both)))


@pytest.mark.parametrize("rows", [16, 33, 40, 96, 1000])
def test_accuracy_of_swiglu(rows: int) -> None:
    rng = np.random.default_rng(rows)
    gate = (rng.standard_normal((7, rows)) * 8).astype(np.float32)
    up = rng.standard_normal((7, rows)).astype(np.float32)
    wide = gate.astype(np.float64)
    np.testing.assert_allclose(swiglu(gate, up), wide / (1 + np.exp(-wide)) * up, rtol=2e-6)


def test_accuracy_of_swiglu_at_its_ends() -> None:
    gate = np.array([[0, -0.0, 1e-30, -1e-30, 20, -20, 80, -80, 87, -87, 89, -89, 1e4, -1e4]])
    gate = np.concatenate([gate, [[3e38, -3e38]]], axis=1).astype(np.float32)
    wide = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        theirs = wide / (1 + np.exp(-wide))
    # Below -88 the exact value is too small to matter, and ours need only be small.
    np.testing.assert_allclose(
        swiglu(gate, np.ones_like(gate)), theirs, rtol=2e-6, atol=3e38 * np.exp(-88.0)
    )
    tame = gate[:, :12]
    np.testing.assert_allclose(
        swiglu(tame, np.ones_like(tame)), theirs[:, :12], rtol=2e-6, atol=1e-34
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_accuracy_of_swiglu_keeps_what_is_not_finite(bad: float) -> None:
    ones = np.ones((1, 48))
    for place in (0, 17, 47):
        spoilt = ones.copy()
        spoilt[0, place] = bad
        for result in (swiglu(spoilt, ones), swiglu(ones, spoilt)):
            assert not np.isfinite(result[0, place])
            assert np.isfinite(np.delete(result[0], place)).all()


# --- attention ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """Random queries, keys and values [T, heads, head_dim] of one sequence, and how they are kept."""

    heads: int
    kv_heads: int
    head_dim: int
    kv_dtype: KVPrecision = "fp32"
    window: int | None = None
    rotated: bool = True
    sharpness: float = 1.0

    @property
    def layout(self) -> HeadLayout:
        return HeadLayout(
            head_dim=self.head_dim,
            heads=range(self.heads),
            kv_heads=range(self.kv_heads),
            queries_per_kv=self.heads // self.kv_heads,
            by_shard=(range(self.heads),),
        )

    def qkv(self, tokens: int) -> Floats:
        rng = np.random.default_rng([self.heads, self.head_dim])
        rows = rng.standard_normal((tokens, (self.heads + 2 * self.kv_heads) * self.head_dim))
        rows[:, : self.heads * self.head_dim] *= self.sharpness
        return rows.astype(np.float32)

    def angles(self, tokens: int) -> npt.NDArray[Any]:
        frequency = 1e4 ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        return np.arange(tokens)[:, None] * frequency * (1 if self.rotated else 0)

    def attend(self, qkv: Floats, chunk: int, threads: int = 1) -> Floats:
        """By the native kernels, in steps of `chunk` tokens: [T, heads * head_dim]."""
        tokens, layout = len(qkv), self.layout
        angles = self.angles(tokens)
        rope = RopeTable(tensor(np.cos(angles)), tensor(np.sin(angles)))
        bench = Bench("fp32", self.kv_dtype, self.window, threads)

        def build(ops: NativeOps) -> Value:
            return ops.attention(ops.embed(ops.table(tensor(qkv))), rope, 0, layout)

        bench.record(build, layout, blocks=64)
        blocks = np.random.default_rng(0).permutation(64).astype("<i4").tobytes()
        rows = []
        for start in range(0, tokens, chunk):
            ids = list(range(start, min(start + chunk, tokens)))
            rows.append(bench.run(SequenceStep(0, start, ids, blocks, None)))
        return np.concatenate(rows)

    def expected(self, qkv: Floats) -> Doubles:
        """A plain softmax in float64."""
        tokens, d = len(qkv), self.head_dim
        wide = qkv.astype(np.float64).reshape(tokens, -1, d)
        rotated = self.heads + self.kv_heads
        cos, sin = (f(self.angles(tokens))[:, None] for f in (np.cos, np.sin))
        left, right = wide[:, :rotated, : d // 2].copy(), wide[:, :rotated, d // 2 :].copy()
        wide[:, :rotated, : d // 2] = left * cos - right * sin
        wide[:, :rotated, d // 2 :] = right * cos + left * sin
        q = wide[:, : self.heads]
        k, v = (
            np.repeat(part, self.heads // self.kv_heads, axis=1)
            for part in (wide[:, self.heads : rotated], wide[:, rotated:])
        )
        scores = np.einsum("thd,shd->hts", q, k) * d**-0.5
        t, s = np.arange(tokens)[:, None], np.arange(tokens)
        hidden = s > t
        if self.window is not None:
            hidden |= s <= t - self.window
        scores[:, hidden] = -np.inf
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        mixed: Doubles = np.einsum("hts,shd->thd", weights, v).reshape(tokens, -1)
        return mixed


KV_TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.5e-2, "int8": 2e-2}


@pytest.mark.parametrize(
    "heads",
    [
        Heads(1, 1, 16),
        Heads(6, 2, 48),
        Heads(4, 4, 64, "bf16"),
        Heads(20, 1, 32, "fp16"),
        Heads(8, 2, 128, "int8"),
        Heads(3, 1, 80, "int8", window=40),
        Heads(4, 2, 96, "bf16", window=1),
        Heads(4, 2, 64, "fp32", window=100),
        Heads(2, 1, 256, "fp16", window=17),
        Heads(4, 2, 64, "fp32", sharpness=30.0),
        Heads(4, 2, 64, "fp32", rotated=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [1, 50, 300])
def test_accuracy_of_attention(heads: Heads, chunk: int) -> None:
    qkv = heads.qkv(300)
    error = heads.attend(qkv, chunk, threads=1 + chunk % 2) - heads.expected(qkv)
    size = np.sqrt((heads.expected(qkv) ** 2).mean())
    assert np.abs(error).max() <= 6 * KV_TOLERANCE[heads.kv_dtype] * size * max(
        1, heads.sharpness / 10
    )
    assert np.sqrt((error**2).mean()) <= KV_TOLERANCE[heads.kv_dtype] * size


def test_accuracy_of_rope_far_from_the_start() -> None:
    # A token that sees only itself gives its value back; what is rotated is seen in the scores.
    heads = Heads(2, 1, 64, window=3)
    qkv = heads.qkv(900)
    error = heads.attend(qkv, 128) - heads.expected(qkv)
    assert np.abs(error).max() < 1e-3  # angles of 900 radians, in float32


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_accuracy_of_attention_with_extreme_scores(kv_dtype: KVPrecision) -> None:
    heads = Heads(2, 1, 64, kv_dtype, sharpness=1e4)
    qkv = heads.qkv(100)
    qkv[:, 128:192] = np.round(qkv[:, 128:192] * 4)  # keys that every format holds, or nearly
    result = heads.attend(qkv, 32)
    assert np.isfinite(result).all()
    largest_value = np.abs(qkv[:, 192:]).max()
    assert np.abs(result).max() <= 1.01 * largest_value


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-41, 1e-5, 1e3])
def test_accuracy_of_keys_and_values_of_any_size(kv_dtype: KVPrecision, magnitude: float) -> None:
    heads = Heads(2, 1, 32, kv_dtype)
    qkv = heads.qkv(40)
    qkv[:, 64:96] *= min(magnitude, 1)
    qkv[:, 96:] *= magnitude
    error = np.abs(heads.attend(qkv, 40) - heads.expected(qkv)).max()
    smallest_half = 2.0**-24 if kv_dtype == "fp16" else 1e-37
    assert error <= 5 * magnitude * KV_TOLERANCE[kv_dtype] * 4 + smallest_half


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(
    # A key with infinity may have the score -infinity, and so no weight.
    ("part", "bad"),
    [(part, np.nan) for part in ("query", "key", "value")] + [("query", np.inf), ("value", np.inf)],
)
def test_accuracy_of_attention_keeps_what_is_not_finite(
    kv_dtype: KVPrecision, part: str, bad: float
) -> None:
    heads = Heads(1, 1, 32, kv_dtype)
    for place in (0, 9, 31):
        qkv = heads.qkv(30)
        qkv[20, {"query": 0, "key": 32, "value": 64}[part] + place] = bad
        result = heads.attend(qkv, 1)
        assert np.isfinite(result[:20]).all()
        assert not np.isfinite(result[20]).all()
        if part != "query":
            assert not np.isfinite(result[29]).all(), "it is seen by all tokens that come later"


# --- the best logit -------------------------------------------------------------------------------


def best(logits: npt.NDArray[Any]) -> Doubles:
    """The best logit of each row, by a head that gives rows of logits as they are."""
    tokens, columns = logits.shape
    width = -(-tokens // 32) * 32
    bench = Bench()
    unit = np.eye(tokens, width) * width**0.5
    padded = np.zeros((columns, width))
    padded[:, :tokens] = logits.T
    ops = bench.ops

    def forward() -> Value:
        x = ops.embed(ops.table(tensor(unit)))
        zeros = ops.embed(ops.table(torch.zeros(tokens, width)))
        channel = ops.vector(torch.full((width,), width**-0.5))
        head = ops.weight(source(tensor(padded)), token_ids=[range(columns)])
        return ops.logits(ops.final_norm(x, zeros, channel, 1e-6), head)

    ops.allocate(forward, 1, NO_HEADS, 1, tokens)
    blocks = np.zeros(1, "<i4").tobytes()
    steps = [SequenceStep(0, 0, [row], blocks, GREEDY) for row in range(tokens)]
    result = ops.run(steps, np.zeros(1, np.int64))
    assert np.array_equal(result.best[:, 0], result.logits[range(tokens), argmax(result.logits)])
    found: Doubles = result.best.copy()
    return found


def argmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    columns: npt.NDArray[np.int64] = logits.argmax(axis=1)
    return columns


@pytest.mark.parametrize("columns", [1, 15, 16, 250, 256, 257, 1000])
def test_the_best_logit_is_the_first_of_the_highest(columns: int) -> None:
    rng = np.random.default_rng(columns)
    logits = np.round(rng.standard_normal((33, columns)) * 2)  # with equals
    logits[0] = -7
    assert np.array_equal(best(logits)[:, 1], argmax(logits))


# --- all of it ------------------------------------------------------------------------------------


def relative(ours: Floats, theirs: Floats) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_spot_check_of_one_arithmetic_and_of_a_whole_model(
    dtype: Precision, tmp_path: Path
) -> None:
    """The rest is in test_one_arithmetic.py; this is for levels that are not this machine's best."""
    folder = write_checkpoint(tmp_path / "model", Shape(96, 200, 6, 2, 48, vocab=130))
    texts = Texts(130, spoiler=129)
    whole, by_seven = chunks(0, 40, 40, 42), chunks(0, 7, 40, 42)
    crowd = [[Piece(text, 0, 40) for text in (3, 0, 1, 2, 4)]]
    model = Model(folder, dtype)
    alone = logits_of(model, texts, [whole, by_seven, crowd], Setting(threads=2), tmp_path)
    three = logits_of(model, texts, [whole, crowd], Setting(3, 1, "shm"), tmp_path)
    for other in (*alone, *three):
        for key in other.keys() & alone[0].keys():
            assert np.array_equal(other[key], alone[0][key]), key
    (exact,) = logits_of(Model(folder, "fp32", "fp32"), texts, [whole], Setting(), tmp_path)
    bound = {"fp32": 0.02, "bf16": 0.05, "fp16": 0.02, "int8": 0.1, "int4": 0.6}[dtype]
    assert relative(alone[0][0, 42], exact[0, 42]) < bound


GoldenLogits = Callable[[Precision, KVPrecision], Floats]
GOLDEN_TOKENS = 120  # of each golden text, its prompt included


@pytest.fixture(scope="module")
def golden_logits(
    story_model: Path, golden: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> GoldenLogits:
    """By precision: the logits for all tokens of the golden texts, along these texts."""
    folder = tmp_path_factory.mktemp("golden")
    prompts = [len(case["prompt_ids"]) for case in golden]
    known = {
        text: (case["prompt_ids"] + case["new_ids"])[:GOLDEN_TOKENS]
        for text, case in enumerate(golden)
    }
    ways = [chunks(text, n, n, len(known[text]) - 1) for text, n in enumerate(prompts)]

    def compute(dtype: Precision, kv_dtype: KVPrecision) -> Floats:
        model, texts = Model(story_model, dtype, kv_dtype), Texts(2048, known)
        found = logits_of(model, texts, ways, Setting(), folder)
        return np.stack([row for logits in found for row in logits.values()])

    return functools.cache(compute)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "bound"),
    [
        ("bf16", "bf16", 1e-2),
        ("fp16", "fp16", 1e-2),
        ("int8", "bf16", 2e-2),
        ("int8", "int8", 2e-2),
        ("int4", "bf16", 0.3),
    ],
)
def test_the_story_models_logits_are_close_to_those_of_fp32(
    dtype: Precision, kv_dtype: KVPrecision, bound: float, golden_logits: GoldenLogits
) -> None:
    pairs = zip(golden_logits(dtype, kv_dtype), golden_logits("fp32", "fp32"), strict=True)
    errors = [relative(ours, exact) for ours, exact in pairs]
    print(f"{dtype}, KV {kv_dtype}: relative L2 {np.mean(errors):.5f}, at most {max(errors):.5f}")
    assert np.mean(errors) <= bound


def test_the_story_models_golden_texts_are_what_fp32_chooses(
    golden_logits: GoldenLogits, golden: list[dict[str, Any]]
) -> None:
    new = [case["new_ids"][: GOLDEN_TOKENS - len(case["prompt_ids"])] for case in golden]
    assert np.array_equal(argmax(golden_logits("fp32", "fp32")), np.concatenate(new))


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "share", "margin"),
    [
        ("bf16", "bf16", 0.01, 0.1),
        ("fp16", "fp16", 0.005, 0.02),
        ("int8", "bf16", 0.04, 0.25),
        ("int8", "int8", 0.04, 0.25),
        ("int4", "bf16", 0.3, 2.0),
    ],
)
def test_the_story_models_next_token_differs_from_fp32_only_where_two_are_nearly_as_likely(
    dtype: Precision,
    kv_dtype: KVPrecision,
    share: float,
    margin: float,
    golden_logits: GoldenLogits,
) -> None:
    """For at most `share` of the tokens, and where the best two logits are closer than `margin`."""
    exact = golden_logits("fp32", "fp32")
    best_two = np.sort(exact, axis=1)[:, -2:]
    differs = argmax(golden_logits(dtype, kv_dtype)) != argmax(exact)
    margins = (best_two[:, 1] - best_two[:, 0])[differs]
    print(f"{dtype}, KV {kv_dtype}: {differs.sum()} of {differs.size}, margins {np.sort(margins)}")
    assert differs.mean() <= share
    assert (margins < margin).all()


# --- a lost peer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_names_the_peer_that_is_gone(threads: int, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", Shape(64, 96, 3, 1, 16))
    owned = assign_shards(2, VIRTUAL_SHARDS)
    setup = CommSetup(
        kind="shm",
        rank=0,
        owned=[(own.start, own.stop) for own in owned],
        deadline_s=0.5,
    )
    with contextlib.closing(open_communicator(setup, create_shm_region(2))) as comm:
        ops = Model(folder).load(comm, list(owned), threads, blocks=64)
        for _ in range(2):
            with pytest.raises(CommError) as caught:
                ops.run([rows_step(5)], np.zeros(1, np.int64))
            assert caught.value.rank == 1


# --- levels of instructions -----------------------------------------------------------------------


def in_new_process(
    isa: str, *arguments: str, prefetch: str = ""
) -> subprocess.CompletedProcess[str]:
    """The kernels are chosen once for each process."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=PROJECT,
        env=os.environ | {"TPSERVE_ISA": isa, "TPSERVE_PREFETCH": prefetch},
        capture_output=True,
        text=True,
        timeout=LEVEL_DEADLINE_S,
    )


LOAD = "from worker.native.api import isa_of, native_library; print(isa_of(native_library()))"


@pytest.fixture(scope="module")
def levels() -> list[str]:
    """Those of the library that this machine runs, best first, as the error for a wrong one says."""
    said = in_new_process("none-such", "-c", LOAD).stderr.splitlines()[-1]
    match = re.search(r"ConfigError: TPSERVE_ISA is none-such, this machine runs (.*)$", said)
    assert match, said
    return match[1].split(", ")


def test_an_unknown_or_impossible_level_is_refused_by_name(levels: list[str]) -> None:
    assert levels[-1] == "scalar"
    impossible = [level for level in LEVELS[os.uname().machine] if level not in levels]
    for level in [*impossible[:1], "AVX2"]:
        refused = in_new_process(level, "-c", LOAD)
        assert refused.returncode != 0
        problem = refused.stderr.splitlines()[-1]
        assert problem.endswith(
            f"ConfigError: TPSERVE_ISA is {level}, this machine runs {', '.join(levels)}"
        )


def test_the_best_level_is_chosen_unless_another_is_asked_for(levels: list[str]) -> None:
    assert in_new_process("", "-c", LOAD).stdout.strip() == levels[0]
    assert in_new_process("scalar", "-c", LOAD).stdout.strip() == "scalar"


@pytest.mark.slow
def test_every_level_is_as_accurate(levels: list[str]) -> None:
    for level in levels[1:]:
        tests = [__file__, str(Path(__file__).with_name("test_head.py"))]
        options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "accuracy or tells"]
        run = in_new_process(level, "-m", "pytest", *options, *tests)
        assert run.returncode == 0, f"{level}: {run.stdout[-3000:]}"
        assert " passed" in run.stdout


# --- prefetching ----------------------------------------------------------------------------------


def digest_of_linears() -> str:
    """Of products in every precision, of one token and more, with whole streams and chunks of row blocks and not."""
    digest = hashlib.sha256()
    random = np.random.default_rng(5)
    for dtype in DTYPES:
        for rows, columns in ((16, 32), (80, 96), (720, 544)):
            weight = random.standard_normal((rows, columns), np.float32)
            for tokens in (1, 2, 7, 13):
                x = random.standard_normal((tokens, columns), np.float32)
                digest.update(linear(weight, x, dtype).tobytes())
    return digest.hexdigest()


def test_prefetching_changes_no_bit(levels: list[str]) -> None:
    show = f"from {__name__} import digest_of_linears; print(digest_of_linears())"
    for level in levels[:2]:
        near, far = (in_new_process(level, "-c", show, prefetch=p) for p in ("near", "far"))
        assert near.returncode == 0, near.stderr[-2000:]
        assert near.stdout == far.stdout
        assert len(near.stdout.strip()) == 64


def test_an_unknown_way_of_prefetching_is_refused() -> None:
    refused = in_new_process("", "-c", LOAD, prefetch="Far")
    assert refused.stderr.splitlines()[-1].endswith(
        "ConfigError: TPSERVE_PREFETCH is Far; it can be near or far"
    )
