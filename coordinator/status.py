"""What `status` answers: a look at every part of the server."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

from coordinator.cluster import Cluster
from coordinator.served_model import ServedModel
from shared.config import Settings
from shared.messages import Kind, Status, WorkerStatus

_KINDS: tuple[Kind, ...] = ("story", "chat")


@dataclass
class Counters:
    """What has happened since the server started."""

    started_at: float = field(default_factory=time.monotonic)
    steps: int = 0
    tokens: int = 0


def describe(
    request_id: str,
    settings: Settings,
    models: Mapping[str, ServedModel],
    cluster: Cluster,
    ready: bool,
    counters: Counters,
) -> Status:
    """The answer to a status request."""
    schedulers = [m.scheduler for m in models.values() if m.scheduler is not None]
    return Status(
        id=request_id,
        version=version("tpserve"),
        ready=ready,
        uptime_s=time.monotonic() - counters.started_at,
        pid=os.getpid(),
        epoch=cluster.epoch,
        comm=settings.comm if settings.workers > 1 else "local",
        workers=[
            WorkerStatus(
                rank=worker.rank,
                pid=worker.process.pid,
                virtual_shards=list(cluster.owned[worker.rank]),
                memory_bytes=worker.memory_bytes(),
            )
            for worker in cluster.supervisor.workers
        ],
        models=[model.info() for model in models.values()],
        queued={kind: sum(m.queue.count(kind) for m in models.values()) for kind in _KINDS},
        running=sum(len(scheduler.running) for scheduler in schedulers),
        steps=counters.steps,
        tokens_generated=counters.tokens,
        kv_blocks_used=sum(scheduler.pool.used for scheduler in schedulers),
        kv_blocks_total=sum(scheduler.pool.total for scheduler in schedulers),
    )
