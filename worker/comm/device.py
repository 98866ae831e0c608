"""The collectives of a forward pass whose tensors stay on a device.

Sums are of whole partial products, one for each rank: how many ranks there are changes the last bits.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from shared.worker_messages import CommSetup
from worker.comm.base import Communicator


class Collectives(Protocol):
    """Every rank makes the same calls in the same order."""

    world: int
    capturable: bool
    """Whether calls may be part of a CUDA graph."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, the same on each; `x` may be overwritten. Raises CommError."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape and dtype from every rank -> [world, *shape]. Raises CommError."""


@dataclass(frozen=True)
class Accelerator:
    """Where a rank computes, and how its tensors meet those of the others."""

    device: torch.device
    collectives: Collectives
    deterministic: bool = False
    """Whether results must not depend on the batch, or on the number of ranks."""


class Alone:
    """A world of one rank."""

    world = 1
    capturable = True

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See Collectives."""
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See Collectives."""
        return x[None]


class ThroughHost:
    """Over any communicator, by way of the host's memory: slow, and good for every device."""

    capturable = False

    def __init__(self, comm: Communicator) -> None:
        self._comm, self.world = comm, comm.world

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See Collectives."""
        every = self._comm.exchange_small(x.float().cpu().numpy())
        return torch.from_numpy(every.sum(axis=0)).to(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See Collectives."""
        every = self._comm.exchange_small(x.cpu().numpy())
        return torch.from_numpy(every).to(x)


def open_collectives(setup: CommSetup, comm: Communicator, device: torch.device) -> Collectives:
    """For tensors on `device`, with nccl over a group of their own, else through `comm`.

    Raises CommError when a rank does not come in time, ConfigError when the setup cannot work.
    """
    if comm.world == 1:
        return Alone()
    if setup.kind == "nccl":
        # Importing torch.distributed takes a second or more; only this transport needs it.
        from worker.comm.torch_dist import GroupCollectives

        return GroupCollectives(setup, device)
    return ThroughHost(comm)
