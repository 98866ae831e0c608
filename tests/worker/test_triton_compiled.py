"""All variants of the Triton kernels become machine code for Hopper GPUs, which no GPU is needed for."""

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker.interpreter import INTERPRETED

if importlib.util.find_spec("triton") is None:
    pytest.skip("there is no Triton: tests/triton.sh installs it", allow_module_level=True)
if INTERPRETED:
    pytest.skip("with TRITON_INTERPRET=1 nothing is compiled", allow_module_level=True)

ALIGNED = ("size", "cache_stride", "inner", "outputs")
"""Numbers that real models have as multiples of 16, which a launch looks for."""
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLOATS = [*TYPES]
SHARED_MEMORY = 227 << 10
"""Bytes that a program on an H100 or H200 may have."""


def resources(kernel: Any, arguments: dict[str, Any], warps: int, stages: int, folder: Path) -> str:
    """Compile for sm_90 and return what the program takes. Strings in `arguments` are types, others values.

    As at a launch, sizes and addresses are known to be multiples of 16.
    """
    triton: Any = importlib.import_module("triton")
    backends: Any = importlib.import_module("triton.backends.compiler")
    compiler: Any = importlib.import_module("triton.compiler")
    constants = {name: v for name, v in arguments.items() if not isinstance(v, str)}
    signature = {name: "constexpr" if name in constants else v for name, v in arguments.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in ALIGNED
    }
    source = compiler.ASTSource(kernel, signature, constants, aligned)
    target = backends.GPUTarget("cuda", 90, 32)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.metadata.shared <= SHARED_MEMORY
    assert ".target sm_90" in compiled.asm["ptx"]
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(binary)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def registers(usage: str) -> int:
    """Of a thread. Nothing may have spilled into memory."""
    assert re.search(r"STACK:0\b", usage), usage
    assert re.search(r"LOCAL:0\b", usage), usage
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, usage
    return int(found[1])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("has_delta", [True, False])
@pytest.mark.parametrize(("block", "warps"), [(2048, 4), (8192, 8)])
def test_add_norm(block: int, warps: int, has_delta: bool, dtype: str, tmp_path: Path) -> None:
    from worker.ops.triton.elementwise import add_norm_kernel

    arguments = {
        **{"x": "*fp32", "delta": f"*{dtype}", "weight": "*fp32", "total": "*fp32"},
        **{"normed": f"*{dtype}", "size": "i32", "eps": "fp32"},
        **{"has_delta": has_delta, "block": block},
    }
    assert registers(resources(add_norm_kernel, arguments, warps, 3, tmp_path)) < 256


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("normed", "head_dim", "half"), [(False, 64, 32), (True, 160, 128)])
def test_rotation_and_kv_write(
    normed: bool, head_dim: int, half: int, kv_dtype: str, dtype: str, tmp_path: Path
) -> None:
    from worker.ops.triton.elementwise import rotate_and_store_kernel

    arguments = {
        **{"qkv": f"*{dtype}", "cos": "*fp32", "sin": "*fp32", "places": "*i64"},
        **{"query_norm": "*fp32", "key_norm": "*fp32", "queries": f"*{dtype}"},
        **{"keys": f"*{kv_dtype}", "values": f"*{kv_dtype}", "heads": "i32", "kv_heads": "i32"},
        **{"cache_stride": "i64", "eps": "fp32"},
        **{"normed": normed, "head_dim": head_dim, "half_block": half},
    }
    assert registers(resources(rotate_and_store_kernel, arguments, 1, 3, tmp_path)) < 256


@pytest.mark.parametrize("dtype", FLOATS)
def test_swiglu(dtype: str, tmp_path: Path) -> None:
    from worker.ops.triton.elementwise import swiglu_kernel

    arguments = {"gate_up": f"*{dtype}", "out": f"*{dtype}", "size": "i32", "block": 1024}
    assert registers(resources(swiglu_kernel, arguments, 4, 3, tmp_path)) < 256


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("head_dim", "members"), [(64, 16), (80, 16), (128, 32)])
def test_attention(head_dim: int, members: int, kv_dtype: str, dtype: str, tmp_path: Path) -> None:
    from worker.ops.triton.attention import (
        SPLIT,
        attend_join_kernel,
        attend_split_kernel,
        tile_of,
    )

    block_d = 1 << (head_dim - 1).bit_length()
    arguments: dict[str, Any] = {
        **{"q": f"*{dtype}", "keys": f"*{kv_dtype}", "values": f"*{kv_dtype}", "table": "*i64"},
        **{"positions": "*i64", "tops": "*fp32", "sums": "*fp32", "mixed": "*fp32"},
        **{"scale": "fp32", "heads": "i32", "queries_per_kv": "i32", "first_query": "i32"},
        **{"table_stride": "i32", "cache_stride": "i64", "positions_stride": "i32"},
        **{"window": "i32", "splits": "i32", "head_dim": head_dim, "block_d": block_d},
        **{"members": members, "split_tokens": SPLIT, "page": 16},
        "tile": tile_of(block_d, TYPES[dtype]),
    }
    usage = resources(attend_split_kernel, arguments, 4, 3, tmp_path)
    if dtype != "fp32":  # which has no tensor cores, and is for tests rather than for speed
        assert registers(usage) < 256
    arguments = {
        **{"tops": "*fp32", "sums": "*fp32", "mixed": "*fp32", "positions": "*i64"},
        **{"out": f"*{dtype}", "heads": "i32", "positions_stride": "i32", "window": "i32"},
        **{"splits": "i32", "head_dim": head_dim, "block_d": block_d, "split_tokens": SPLIT},
    }
    assert registers(resources(attend_join_kernel, arguments, 1, 3, tmp_path)) < 256


@pytest.mark.parametrize("dtype", [*FLOATS, "int8"])
@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("tile", ["FIXED", "FEW_ROWS", "MANY_ROWS"])
def test_products(tile: str, sharded: bool, dtype: str, tmp_path: Path) -> None:
    products: Any = importlib.import_module("worker.ops.triton.products")
    of = getattr(products, tile)
    compute, weight = ("bf16", "i8") if dtype == "int8" else (dtype, dtype)
    arguments = {
        **{"x": f"*{compute}", "weight": f"*{weight}", "scales": f"*{compute}", "bounds": "*i32"},
        **{"out": "*fp32" if sharded else f"*{compute}", "rows": "i32"},
        **{"outputs": "i32", "inner": "i32", "scaled": dtype == "int8", "sharded": sharded},
        **{
            "aligned": sharded,
            "block_m": of.rows,
            "block_n": of.outputs,
            "block_k": of.inner_of(TYPES[compute]),
        },
    }
    usage = resources(products.product_kernel, arguments, of.warps, 3, tmp_path)
    assert registers(usage) < 256


@pytest.mark.parametrize("dtype", [*FLOATS, "int8"])
def test_products_of_one_row(dtype: str, tmp_path: Path) -> None:
    from worker.ops.triton.products import one_row_kernel

    compute, weight = ("bf16", "i8") if dtype == "int8" else (dtype, dtype)
    arguments = {
        **{"x": f"*{compute}", "weight": f"*{weight}", "scales": f"*{compute}"},
        **{"out": f"*{compute}", "outputs": "i32", "inner": "i32", "scaled": dtype == "int8"},
        **{"block_n": 4, "block_k": 1024},
    }
    assert registers(resources(one_row_kernel, arguments, 4, 3, tmp_path)) < 256
