"""What the server has done and how long it took, and the `status` answer made of it."""

import os
import time
from collections import deque
from collections.abc import Mapping
from importlib.metadata import version

import numpy as np

from coordinator.cluster import Cluster
from coordinator.jobs import KINDS
from coordinator.served_model import ServedModel
from shared.config import Settings
from shared.messages import Percentiles, Status, Timings, Totals, WorkerStatus

VERSION = version("tpserve")
_LAST_JOBS = 512


class Metrics:
    """Sums since the start, and the timings of the last jobs."""

    def __init__(self) -> None:
        self.started_at = time.monotonic()
        self.totals = Totals()
        self._timings: deque[Timings] = deque(maxlen=_LAST_JOBS)
        self._finished_at: deque[float] = deque(maxlen=64)

    def job_done(self, timings: Timings | None) -> None:
        """A job ended well; timings: of one that generates."""
        self.totals.jobs_done += 1
        if timings is not None:
            self._timings.append(timings)
        self._finished_at.append(time.monotonic())

    def retry_after_s(self) -> float:
        """When a place in the queue may be free: the time between jobs that ended lately."""
        if len(self._finished_at) < 2:
            return 1.0
        spent = time.monotonic() - self._finished_at[0]
        return min(60.0, max(1.0, spent / len(self._finished_at)))

    def percentiles(self, name: str) -> Percentiles:
        """Of one field of the last jobs' timings."""
        if not self._timings:
            return Percentiles(0.0, 0.0)
        values = np.percentile([getattr(timings, name) for timings in self._timings], (50, 99))
        return Percentiles(float(values[0]), float(values[1]))


def describe(
    request_id: str,
    settings: Settings,
    models: Mapping[str, ServedModel],
    cluster: Cluster,
    ready: bool,
    metrics: Metrics,
) -> Status:
    """The answer to a status request."""
    schedulers = [m.scheduler for m in models.values() if m.scheduler is not None]
    return Status(
        id=request_id,
        version=VERSION,
        ready=ready,
        uptime_s=time.monotonic() - metrics.started_at,
        pid=os.getpid(),
        epoch=cluster.epoch,
        comm=settings.comm if settings.workers > 1 else "local",
        kernels=cluster.kernels,
        workers=[
            WorkerStatus(
                rank=worker.rank,
                pid=worker.process.pid,
                virtual_shards=list(cluster.owned[worker.rank]),
                memory_bytes=worker.memory_bytes(),
                compute_s=cluster.compute_s[worker.rank],
                comm_s=cluster.comm_s[worker.rank],
            )
            for worker in cluster.supervisor.workers
        ],
        models=[model.info() for model in models.values()],
        queued={kind: sum(m.queue.count(kind) for m in models.values()) for kind in KINDS},
        running=sum(len(scheduler.running) for scheduler in schedulers),
        totals=metrics.totals,
        queue_time=metrics.percentiles("queue_s"),
        ttft=metrics.percentiles("ttft_s"),
        time_per_token=metrics.percentiles("time_per_token_s"),
        kv_blocks_used=sum(scheduler.pool.used for scheduler in schedulers),
        kv_blocks_total=sum(scheduler.pool.total for scheduler in schedulers),
    )
