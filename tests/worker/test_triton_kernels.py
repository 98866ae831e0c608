"""The Triton kernels against torch's functions: on a GPU, and in the interpreter (tests/triton.sh)."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from shared.messages import BLOCK_TOKENS
from tests.worker.interpreter import INTERPRETED
from worker.ops.base import HeadLayout, HeadNorms
from worker.ops.device_kernels import DeviceKernels, Heads, Int8Weight, TorchKernels
from worker.ops.device_step import DeviceDecode, DeviceSpan, DeviceStep

if importlib.util.find_spec("triton") is None:
    pytest.skip("there is no Triton: tests/triton.sh installs it", allow_module_level=True)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative to the largest number."""
TORCH = TorchKernels()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("kernels run on the CPU with TRITON_INTERPRET=1 only: tests/triton.sh sets it")
    if request.param == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("torch sees no GPU, or kernels are interpreted")
    torch.manual_seed(1)
    return torch.device(request.param)


def kernels(deterministic: bool = False) -> DeviceKernels:
    from worker.ops.triton.kernels import TritonKernels

    return TritonKernels(deterministic=deterministic)


def close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype, factor: float = 1) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert theirs.isfinite().all()
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error <= factor * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 100), (2, 256), (17, 33), (1, 5000)])
@pytest.mark.parametrize("has_delta", [True, False])
def test_add_norm(
    rows: int, size: int, has_delta: bool, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight = torch.randn(rows, size, device=device), torch.randn(size, device=device)
    delta = torch.randn(rows, size, device=device).to(dtype) if has_delta else None
    ours = kernels().add_norm(x.clone(), delta, weight, 1e-5, dtype)
    theirs = TORCH.add_norm(x, delta, weight, 1e-5, dtype)
    assert torch.equal(ours[0], theirs[0])
    close(ours[1], theirs[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (5, 100), (2, 1024), (1, 1500)])
def test_swiglu(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = (3 * torch.randn(rows, 2 * size, device=device)).to(dtype)
    ours = kernels().swiglu(gate_up)
    close(ours, TORCH.swiglu(gate_up.float()).to(dtype), dtype)


def layout_of(heads: range, queries_per_kv: int, head_dim: int) -> HeadLayout:
    first, last = heads.start // queries_per_kv, (heads.stop - 1) // queries_per_kv
    return HeadLayout(head_dim, heads, range(first, last + 1), queries_per_kv, (heads,))


LAYOUTS = [
    layout_of(range(4), 1, 16),
    layout_of(range(8), 4, 64),
    layout_of(range(6), 3, 80),
    layout_of(range(2, 9), 4, 24),  # KV heads with 2, 4 and 1 query heads
    layout_of(range(20), 20, 8),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotation_and_kv_write(
    layout: HeadLayout,
    normed: bool,
    kv_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    tokens, d, kv_heads = 5, layout.head_dim, len(layout.kv_heads)
    width = (len(layout.heads) + 2 * kv_heads) * d
    qkv = torch.randn(tokens, width, device=device).to(dtype)
    angles = 6 * torch.rand(tokens, 1, d // 2, device=device)
    places = torch.tensor([3, 40, 0, 17, 63], device=device)
    norms = None
    if normed:
        norms = HeadNorms(torch.randn(d, device=device), torch.randn(d, device=device), 1e-6)
    written = []
    for of in (kernels(), TORCH):
        cache = [torch.full((kv_heads, 64, d), 7.0, device=device, dtype=kv_dtype) for _ in "kv"]
        keys, values = cache
        q = of.rotate_and_store(
            qkv, (angles.cos(), angles.sin()), places, norms, keys, values, layout
        )
        written.append((q, *cache))
    (q, k, v), (their_q, their_k, their_v) = written
    close(q, their_q, dtype)
    close(k, their_k, kv_dtype)
    assert torch.equal(v, their_v)
    untouched = torch.ones(64, dtype=torch.bool)
    untouched[places.cpu()] = False
    assert (k[:, untouched.to(device)] == 7).all()


class Cache:
    """A paged cache in which only what sequences have written is a number."""

    def __init__(
        self, lengths: Sequence[int], layout: HeadLayout, dtype: torch.dtype, device: torch.device
    ) -> None:
        width = max(-(-n // BLOCK_TOKENS) for n in lengths) + 1
        blocks = torch.randperm(len(lengths) * width).view(len(lengths), width)
        shape = (len(layout.kv_heads), (blocks.numel() + 1) * BLOCK_TOKENS, layout.head_dim)
        self.keys = torch.full(shape, torch.nan)
        self.values = torch.full(shape, torch.nan)
        for row, length in enumerate(lengths):
            at = torch.arange(length)
            places = blocks[row][at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS
            self.keys[:, places] = torch.randn(shape[0], length, shape[2])
            self.values[:, places] = torch.randn(shape[0], length, shape[2])
        self.table = blocks.to(device)
        self.keys, self.values = (m.to(device, dtype) for m in (self.keys, self.values))

    def step(self, positions: Sequence[int], window: int | None) -> DeviceStep:
        """Of one token of each sequence."""
        at = torch.tensor(positions, device=self.table.device)
        return DeviceStep.of_decode(at * 0, at, self.table, window)


LENGTHS = [1, 15, 16, 17, 64, 127, 128, 129, 300]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 7, 130])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_attention(
    layout: HeadLayout, window: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    cache = Cache(LENGTHS, layout, dtype, device)
    step = cache.step([n - 1 for n in LENGTHS], window)
    q = torch.randn(len(LENGTHS), len(layout.heads), layout.head_dim, device=device).to(dtype)
    ours = kernels().attend(q, cache.keys, cache.values, step, Heads.of(layout, device))
    exact = (q.float(), cache.keys.float(), cache.values.float())
    theirs = TORCH.attend(*exact, step, Heads.of(layout, device))
    close(ours, theirs.to(dtype), dtype, factor=2)


def test_a_cache_may_have_another_precision(device: torch.device) -> None:
    layout = LAYOUTS[1]
    cache = Cache(LENGTHS, layout, torch.float16, device)
    step, heads = cache.step([n - 1 for n in LENGTHS], None), Heads.of(layout, device)
    q = torch.randn(len(LENGTHS), 8, 64, device=device)
    ours = kernels().attend(q, cache.keys, cache.values, step, heads)
    close(ours, TORCH.attend(q, cache.keys, cache.values, step, heads), torch.float32)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("window", [None, 20])
def test_prompts_and_single_tokens_of_one_step(
    window: int | None, deterministic: bool, device: torch.device
) -> None:
    layout = LAYOUTS[3]
    cache, heads = Cache([150, 37, 40], layout, torch.float32, device), Heads.of(layout, device)
    positions = torch.tensor([149, *range(37), *range(30, 40)], device=device)
    step = DeviceStep(
        ids=positions * 0,
        positions=positions,
        places=positions * 0,
        spans=(
            DeviceSpan(slice(1, 38), 0, cache.table[1, :3], window),
            DeviceSpan(slice(38, 48), 30, cache.table[2, :3], window),
        ),
        decode=DeviceDecode(
            torch.tensor([0], device=device), cache.table[:1], positions[:1], window
        ),
        logit_rows=None,
        pooled=(),
    )
    q = torch.randn(len(positions), len(layout.heads), layout.head_dim, device=device)
    ours = kernels(deterministic).attend(q, cache.keys, cache.values, step, heads)
    close(ours, TORCH.attend(q, cache.keys, cache.values, step, heads), torch.float32)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize(
    ("rows", "inner", "outputs"),
    [(1, 300, 37), (1, 2100, 5), (3, 64, 32), (33, 129, 65), (70, 16, 3)],
)
def test_products(
    rows: int,
    inner: int,
    outputs: int,
    dtype: torch.dtype,
    deterministic: bool,
    device: torch.device,
) -> None:
    compute = torch.bfloat16 if dtype == torch.int8 else dtype
    x = torch.randn(rows, inner, device=device).to(compute)
    matrix = torch.randn(outputs, inner, device=device)
    if dtype == torch.int8:
        weight = Int8Weight.of(matrix, compute)
        exact = weight.values.double() * weight.scales.double()[:, None]
        ours = kernels(deterministic).linear(x, weight)
    else:
        exact = matrix.to(compute).double()
        ours = kernels(deterministic).linear(x, matrix.to(compute))
    close(ours, (x.double() @ exact.T).to(compute), compute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_virtual_shards(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(5, 212, device=device).to(dtype)
    weight = torch.randn(37, 212, device=device).to(dtype)
    for widths in ([32, 160, 20], [7, 0, 205]):
        ours = kernels(True).shard_products(x, weight, widths)
        pieces = zip(
            torch.split(x.double(), widths, 1), torch.split(weight.double(), widths, 1), strict=True
        )
        theirs = torch.stack([a @ b.T for a, b in pieces]).float()
        close(ours, theirs, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype, device: torch.device) -> None:
    fixed = kernels(True)
    x = torch.randn(33, 300, device=device).to(dtype)
    weight = torch.randn(70, 300, device=device).to(dtype)
    whole = fixed.linear(x, weight)
    shards = fixed.shard_products(x, weight, [128, 172])
    for rows in (slice(0, 1), slice(7, 10), slice(0, 32), slice(32, 33)):
        assert torch.equal(fixed.linear(x[rows], weight), whole[rows])
        assert torch.equal(fixed.shard_products(x[rows], weight, [128, 172]), shards[:, rows])
    assert torch.equal(fixed.linear(x, weight[5:23].contiguous()), whole[:, 5:23])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_has_the_same_bits_in_every_batch(
    dtype: torch.dtype, device: torch.device
) -> None:
    layout = LAYOUTS[1]
    cache, heads = Cache(LENGTHS, layout, dtype, device), Heads.of(layout, device)
    positions = torch.tensor([n - 1 for n in LENGTHS], device=device)
    q = torch.randn(len(LENGTHS), 8, 64, device=device).to(dtype)

    def attend(rows: slice, width: int) -> torch.Tensor:
        step = DeviceStep.of_decode(
            positions[rows], positions[rows], cache.table[rows, :width], None
        )
        return kernels(True).attend(q[rows], cache.keys, cache.values, step, heads)

    whole = attend(slice(0, len(LENGTHS)), 20)
    for row, length in enumerate(LENGTHS):
        alone = attend(slice(row, row + 1), -(-length // BLOCK_TOKENS))
        assert torch.equal(alone[0], whole[row])


def test_what_a_kernel_gets_may_be_empty(device: torch.device) -> None:
    ours: Any = kernels()
    nothing = torch.zeros((0, 8), device=device)
    weight = torch.zeros((4, 8), device=device)
    assert ours.linear(nothing, weight).shape == (0, 4)
    assert ours.swiglu(nothing).shape == (0, 4)
    assert ours.add_norm(nothing, None, weight[0], 1e-5, torch.float32)[1].shape == (0, 8)
