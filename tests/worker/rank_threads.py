"""Ranks in threads of one process, with real communicators over shared memory."""

import os
import threading
from collections.abc import Callable

from shared.sharding import assign_shards
from shared.shm import create_shm_region
from shared.worker_messages import CommSetup
from worker.comm.base import Communicator
from worker.comm.open import open_communicator

VIRTUAL_SHARDS = 8


def run_ranks(world: int, job: Callable[[Communicator, list[range]], None]) -> None:
    """Run `job` on every rank, with its communicator and the virtual shards of all ranks."""
    owned = assign_shards(world, VIRTUAL_SHARDS)
    region = create_shm_region(world)
    failures: list[BaseException] = []

    def rank_main(rank: int) -> None:
        setup = CommSetup(
            kind="local" if world == 1 else "shm",
            rank=rank,
            owned=[(own.start, own.stop) for own in owned],
            deadline_s=60,
        )
        comm = open_communicator(setup, None if world == 1 else os.dup(region))
        try:
            job(comm, list(owned))
        except BaseException as failure:  # noqa: BLE001 - carried over to the test's thread
            failures.append(failure)
        finally:
            comm.close()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(region)
    if failures:
        raise failures[0]
