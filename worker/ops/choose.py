"""Which arithmetic a model gets: that of the device, else the native library where it is and can, else
torch."""

import ctypes
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache

import torch

from shared.errors import ConfigError, ModelError
from shared.model_config import ModelConfig
from shared.worker_messages import LoadModel
from worker.comm.base import Communicator
from worker.comm.device import Accelerator
from worker.native.api import Pool, isa_of
from worker.ops.base import Ops
from worker.ops.device_kernels import DeviceKernels, TorchKernels
from worker.ops.device_ops import DeviceOps
from worker.ops.native import NativeOps, why_not_native
from worker.ops.torch_ops import TorchOps
from worker.shard_cache import ShardCache

log = logging.getLogger("worker.ops")

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICE_KERNELS = "TPSERVE_DEVICE_KERNELS"
"""Environment variable: triton or torch are the kernels of --device cuda; unset: the first that works."""
_DEVICE_DTYPES = {**TORCH_DTYPES, "int8": torch.int8}


def make_ops(
    order: LoadModel,
    config: ModelConfig,
    comm: Communicator,
    pool: Pool | None,
    owned: Sequence[range],
    progress: Callable[[int], None],
    cache: ShardCache | None = None,
) -> Ops:
    """For the model that `order` names. `pool`: None where there is no native library.

    progress: is told the weight bytes so far with every weight. cache: of packed weights.

    Raises ModelError when only the native kernels know the precision and they cannot be used.
    """
    problem = "the native library is not there" if pool is None else why_not_native(config)
    if pool is not None and problem is None:
        # Threads of its own: those of the pool may be busy with steps of other models.
        packers = Pool(pool.library, order.threads, crowded=True)
        window = config.sliding_window
        return NativeOps(
            *(comm, pool, owned, order.dtype, order.kv_dtype, window),
            packers=packers,
            progress=progress,
            cache=cache,
        )
    for option, precision in (("--dtype", order.dtype), ("--kv-dtype", order.kv_dtype)):
        if precision not in TORCH_DTYPES:
            raise ModelError(
                f"{option} {precision} needs the native kernels, and {problem}; use one of"
                f" {', '.join(TORCH_DTYPES)}"
            )
    if pool is not None:
        log.warning("%s is computed by torch: %s", order.path, problem)
    dtype, kv_dtype = TORCH_DTYPES[order.dtype], TORCH_DTYPES[order.kv_dtype]
    return TorchOps(comm, dtype, kv_dtype, config.sliding_window, progress)


def make_device_ops(
    order: LoadModel,
    config: ModelConfig,
    accelerator: Accelerator,
    owned: Sequence[range],
    progress: Callable[[int], None],
) -> DeviceOps:
    """For the model that `order` names, on a device.

    Raises ModelError for a precision it has not, ConfigError as `device_kernels` does.
    """
    choices = (
        ("--dtype", order.dtype, _DEVICE_DTYPES),
        ("--kv-dtype", order.kv_dtype, TORCH_DTYPES),
    )
    for option, precision, known in choices:
        if precision not in known:
            raise ModelError(
                f"{option} {precision} is not there with --device cuda; use one of"
                f" {', '.join(known)}"
            )
    dtype, kv_dtype = _DEVICE_DTYPES[order.dtype], TORCH_DTYPES[order.kv_dtype]
    return DeviceOps(
        accelerator,
        device_kernels(accelerator.device, accelerator.deterministic),
        [len(shards) for shards in owned],
        dtype,
        kv_dtype,
        config.sliding_window,
        progress,
    )


def device_kernels(device: torch.device, deterministic: bool) -> DeviceKernels:
    """Triton's on GPUs where it can be used, else torch's functions.

    The environment's TPSERVE_DEVICE_KERNELS can name them, as triton or torch. Raises ConfigError where
    those are not there, or only others are deterministic.
    """
    wanted = os.environ.get(DEVICE_KERNELS, "")
    if wanted not in ("", "triton", "torch"):
        raise ConfigError(f"{DEVICE_KERNELS} is {wanted!r}; it can be triton or torch")
    reason = f"{DEVICE_KERNELS} is torch" if wanted == "torch" else why_not_triton(device)
    if reason is None:
        # Of the GPU only: it takes seconds to import, and builds of torch for the CPU come without it.
        from worker.ops.triton.kernels import TritonKernels

        return TritonKernels(deterministic=deterministic)
    if deterministic:
        raise ConfigError(f"--deterministic needs the Triton kernels, and {reason}")
    if wanted == "triton":
        raise ConfigError(f"{DEVICE_KERNELS} is triton, and {reason}")
    if device.type == "cuda" and wanted != "torch":
        log.warning("the device computes with torch's functions: %s", reason)
    return TorchKernels()


@cache
def why_not_triton(device: torch.device) -> str | None:
    """None: it works. A device that is no GPU has it in its interpreter only (TRITON_INTERPRET=1)."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"they are for GPUs, not for {device}"
    try:
        from worker.ops.triton.elementwise import swiglu

        # Also compiles what launches a kernel, for which Triton wants a C compiler.
        swiglu(torch.zeros((1, 2), device=device))
    except ImportError as error:
        return f"Triton is not there ({error})"
    except Exception as error:  # noqa: BLE001 - compilers and drivers have many ways to fail
        return f"Triton does not work here ({type(error).__name__}: {error})"
    return None


def describe(library: ctypes.CDLL | None) -> str:
    """The kernels in a word or two."""
    return "torch" if library is None else f"native {isa_of(library)}"
