"""Which communicator a worker gets."""

import os

from shared.errors import ConfigError
from shared.worker_messages import CommSetup
from worker.comm.base import Communicator
from worker.comm.local import LocalCommunicator
from worker.comm.shm import ShmCommunicator
from worker.comm.zmq_mesh import ZmqCommunicator
from worker.native.library import load_library


def open_communicator(
    setup: CommSetup, shm_fd: int | None, crowded: bool | None = None
) -> Communicator:
    """Join the other ranks of `setup`.

    shm_fd: the region made by `shared.shm.create_shm_region`, which is closed here; only for shm.
    crowded: do the ranks have more threads that compute than there are cores? Waiting ranks then
    give way sooner. None, for ranks of one thread: as this process is bound to cores, or not.
    Raises ConfigError when the setup cannot work, CommError when a rank does not come in time to a
    transport that has a rendezvous (gloo). Otherwise the first collective waits for the ranks.
    """
    match setup.kind:
        case "local":
            return LocalCommunicator(setup)
        case "shm":
            if shm_fd is None:
                raise ConfigError("--comm shm needs the file descriptor of a shared memory region")
            if crowded is None:
                crowded = len(setup.owned) > len(os.sched_getaffinity(0))
            return ShmCommunicator(setup, shm_fd, load_library(), crowded)
        case "zmq":
            return ZmqCommunicator(setup)
        case "gloo" | "nccl":  # NCCL moves device tensors only: worker/comm/device.py
            # Importing torch.distributed takes a second or more; only this transport needs it.
            from worker.comm.torch_dist import GlooCommunicator

            return GlooCommunicator(setup)
