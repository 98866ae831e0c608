"""What Prometheus gets: counts of this process, and the coordinator's status as it is now."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from shared.messages import Done, Status

_METHODS = ("GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT", "PATCH")
_TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80)
_TPOT_BUCKETS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1, 2)
_QUEUE_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters and histograms of the requests that went through this gateway."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "tpserve_http_requests",
            "HTTP requests that have ended",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._streams = Counter(
            "tpserve_http_streams",
            "Streamed answers by how they ended",
            ("outcome",),
            registry=self._registry,
        )
        self._ttft = self._histogram(
            "tpserve_time_to_first_token_seconds",
            "From the acceptance of a request to its first token",
            _TTFT_BUCKETS,
        )
        self._tpot = self._histogram(
            "tpserve_time_per_output_token_seconds",
            "Mean time between the tokens of an answer after the first one",
            _TPOT_BUCKETS,
        )
        self._queue = self._histogram(
            "tpserve_request_queue_time_seconds",
            "From the acceptance of a request to its first step",
            _QUEUE_BUCKETS,
        )

    def request_ended(self, method: str, route: str, status: int) -> None:
        """An HTTP request is over; status 0: without an answer."""
        name = method if method in _METHODS else "other"
        self._requests.labels(name, route, str(status)).inc()

    def stream_ended(self, outcome: str) -> None:
        """A streamed answer is over."""
        self._streams.labels(outcome).inc()

    def job_done(self, done: Done) -> None:
        """A job has ended well."""
        timings = done.timings
        self._queue.labels(done.model).observe(timings.queue_s)
        self._ttft.labels(done.model).observe(timings.ttft_s)
        if any(len(choice.token_ids) > 1 for choice in done.choices):
            self._tpot.labels(done.model).observe(timings.time_per_token_s)

    def exposition(self, status: Status | None) -> bytes:
        """All in Prometheus' text format; `status` None: the coordinator does not answer."""
        now = CollectorRegistry()
        now.register(_StatusCollector(status))
        return generate_latest(self._registry) + generate_latest(now)

    def _histogram(self, name: str, what: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, what, ("model",), registry=self._registry, buckets=buckets)


class _StatusCollector(Collector):
    """One answer to `status` as metrics."""

    def __init__(self, status: Status | None) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Everything that the answer tells."""
        status = self._status
        ready = status is not None and status.ready
        yield _gauge("tpserve_up", "Whether the coordinator answers", status is not None)
        yield _gauge("tpserve_ready", "Whether tokens come through all ranks", ready)
        if status is None:
            return
        info = InfoMetricFamily("tpserve_build", "What is running")
        info.add_metric(
            (), {"version": status.version, "comm": status.comm, "kernels": status.kernels}
        )
        yield info
        yield _gauge("tpserve_num_requests_running", "Sequences that are written", status.running)
        waiting = GaugeMetricFamily(
            "tpserve_num_requests_waiting", "Jobs in the queue", labels=("kind",)
        )
        for kind, count in status.queued.items():
            waiting.add_metric((kind,), count)
        yield waiting
        used = status.kv_blocks_used / status.kv_blocks_total if status.kv_blocks_total else 0.0
        yield _gauge("tpserve_kv_cache_usage_perc", "KV blocks in use, 0 to 1", used)
        yield _gauge("tpserve_kv_blocks", "KV blocks of all models", status.kv_blocks_total)
        yield _gauge("tpserve_uptime_seconds", "Of the coordinator", status.uptime_s)
        yield _counter("tpserve_worker_starts", "How often the workers were started", status.epoch)
        totals = status.totals
        yield _counter(
            "tpserve_prompt_tokens", "Tokens of the prompts that were started", totals.prompt_tokens
        )
        yield _counter("tpserve_generation_tokens", "New tokens", totals.tokens_generated)
        yield _counter("tpserve_texts_embedded", "Texts that got a vector", totals.texts_embedded)
        yield _counter("tpserve_jobs_done", "Jobs that ended well", totals.jobs_done)
        yield _counter(
            "tpserve_jobs_resumed", "Jobs that went on with new workers", totals.jobs_resumed
        )
        yield _counter(
            "tpserve_jobs_given_up", "Jobs that killed their workers", totals.jobs_given_up
        )
        yield _counter("tpserve_steps", "Forward passes", totals.steps)
        yield _counter(
            "tpserve_sequence_steps", "Sequences over all forward passes", totals.sequence_steps
        )
        compute = CounterMetricFamily(
            "tpserve_worker_compute_seconds", "Time in kernels", labels=("rank",)
        )
        reduce = CounterMetricFamily(
            "tpserve_worker_all_reduce_seconds", "Time in collectives", labels=("rank",)
        )
        memory = GaugeMetricFamily(
            "tpserve_worker_memory_bytes", "Resident memory of its own", labels=("rank",)
        )
        for worker in status.workers:
            rank = (str(worker.rank),)
            compute.add_metric(rank, worker.compute_s)
            reduce.add_metric(rank, worker.comm_s)
            memory.add_metric(rank, worker.memory_bytes)
        yield from (compute, reduce, memory)


def _gauge(name: str, what: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, what, value=float(value))


def _counter(name: str, what: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, what, value=float(value))
