"""The accelerator of a worker: which one it is, how torch is to compute on it, what memory is left.

Everything that asks torch.cuda about the machine is here.
"""

import os

import torch

from shared.errors import ConfigError
from shared.memory import free_bytes

TEST_DEVICE = "TPSERVE_TEST_DEVICE"
"""Environment variable for tests: the torch device of all workers of `--device cuda`, as cpu, or cuda:0
for several workers on one GPU."""

TEST_ROOM = "TPSERVE_TEST_DEVICE_ROOM"
"""Environment variable for tests: steps of more tokens than this find no memory on a device."""


def check_room(tokens: int) -> None:
    """Raises torch.OutOfMemoryError, as a device would, for steps that a test has no room for."""
    most = os.environ.get(TEST_ROOM)
    if most is not None and tokens > int(most):
        raise torch.OutOfMemoryError(f"{TEST_ROOM} is {most}, the step has {tokens} tokens")


def device_of(rank: int, world: int) -> torch.device:
    """The GPU of a worker. Raises ConfigError when there is none for each of `world` workers."""
    chosen = os.environ.get(TEST_DEVICE)
    if chosen is not None:
        return _prepared(torch.device(chosen))
    if torch.version.cuda is None:
        raise ConfigError(
            f"--device cuda needs a torch that is built for CUDA; this is {torch.__version__}:"
            " install one, or use --device cpu"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < world:
        raise ConfigError(
            f"--device cuda needs a GPU for each of {world} workers, and torch sees {count}:"
            " use fewer --workers, or --device cpu"
        )
    return _prepared(torch.device("cuda", rank))


def describe(device: torch.device) -> str:
    """The device in a few words."""
    if device.type != "cuda":
        return str(device)
    return torch.cuda.get_device_name(device)


def free_memory(device: torch.device | None) -> int:
    """Bytes that new tensors may take there; None: in this machine's memory."""
    if device is None or device.type != "cuda":
        return free_bytes()
    torch.cuda.empty_cache()  # what torch only keeps for itself counts as free
    free, _ = torch.cuda.mem_get_info(device)
    return free


def _prepared(device: torch.device) -> torch.device:
    """Sums of products are float32, whatever the products are of."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
