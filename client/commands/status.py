"""`tpserve status`: workers, queue, memory, rates; with --watch again and again."""

import argparse
import time

import msgspec

from client.commands.common import connect, write_json
from client.commands.models import model_rows
from client.render import clear_screen
from client.tables import write_table
from client.zmq_client import Client
from shared.messages import Percentiles, Status

_ENVELOPE = ("event", "id", "v")
_WATCH_INTERVAL_S = 1.0


def run(args: argparse.Namespace) -> int:
    """Print tables, or one object with the fields of the `status` event."""
    with connect(args) as client:
        if args.watch:
            _watch(client, args.json)
        elif args.json:
            _show_json(client.status())
        else:
            _show(client.status())
    return 0


def _watch(client: Client, as_json: bool) -> None:
    """Once a second, until Ctrl-C: one JSON object a line, or tables with rates."""
    before: Status | None = None
    while True:
        status = client.status()
        if as_json:
            _show_json(status)
        else:
            clear_screen()
            _show(status)
            if before is not None:
                _show_rates(before, status)
        before = status
        time.sleep(_WATCH_INTERVAL_S)


def _show_json(status: Status) -> None:
    fields = msgspec.to_builtins(status)
    write_json({name: value for name, value in fields.items() if name not in _ENVELOPE})


def _show(status: Status) -> None:
    queued = ", ".join(f"{kind} {count}" for kind, count in status.queued.items())
    server = {
        "version": status.version,
        "ready": "yes" if status.ready else "no",
        "uptime": f"{status.uptime_s:.0f} s",
        "pid": str(status.pid),
        "starts of the workers": str(status.epoch),
        "all-reduce": status.comm,
        "kernels": status.kernels,
        "queued": queued,
        "running": str(status.running),
        "steps": str(status.totals.steps),
        "tokens generated": str(status.totals.tokens_generated),
        "texts embedded": str(status.totals.texts_embedded),
        "jobs done": str(status.totals.jobs_done),
        "jobs resumed / given up": f"{status.totals.jobs_resumed} / {status.totals.jobs_given_up}",
        "queue time p50 / p99": _milliseconds(status.queue_time),
        "first token p50 / p99": _milliseconds(status.ttft),
        "per token p50 / p99": _milliseconds(status.time_per_token),
        "KV blocks": f"{status.kv_blocks_used} of {status.kv_blocks_total} used",
    }
    workers = [
        [
            str(worker.rank),
            str(worker.pid),
            ",".join(map(str, worker.virtual_shards)),
            f"{worker.memory_bytes / (1 << 20):.1f} MiB",
            f"{worker.compute_s:.1f} s",
            f"{worker.comm_s:.1f} s",
        ]
        for worker in status.workers
    ]
    columns = ["rank", "pid", "virtual shards", "memory", "computing", "all-reduce"]
    write_table("server", ["", ""], [[name, value] for name, value in server.items()])
    write_table("workers", columns, workers)
    write_table("models", *model_rows(status.models))


def _show_rates(before: Status, status: Status) -> None:
    """What happened between two answers, a second or so apart."""
    a, b = before.totals, status.totals
    seconds, steps = status.uptime_s - before.uptime_s, b.steps - a.steps
    rates = {
        "steps": f"{steps / seconds:.1f} /s",
        "tokens generated": f"{(b.tokens_generated - a.tokens_generated) / seconds:.1f} /s",
        "tokens computed": f"{(b.tokens_computed - a.tokens_computed) / seconds:.1f} /s",
        "jobs done": f"{(b.jobs_done - a.jobs_done) / seconds:.1f} /s",
    }
    if steps:
        rates["mean batch"] = f"{(b.sequence_steps - a.sequence_steps) / steps:.1f}"
    for name, spent in (
        ("planning", b.plan_s - a.plan_s),
        ("results, requests, text", b.other_s - a.other_s),
        ("waiting", b.wait_s - a.wait_s),
    ):
        rates[f"coordinator: {name}"] = f"{100 * spent / seconds:.1f} %"
    for old, new in zip(before.workers, status.workers, strict=False):
        computing, reducing = new.compute_s - old.compute_s, new.comm_s - old.comm_s
        if old.pid == new.pid and computing + reducing > 0:
            share = 100 * reducing / (computing + reducing)
            rates[f"worker {new.rank}: in all-reduce"] = f"{share:.1f} %"
    write_table("last second", ["", ""], [[name, value] for name, value in rates.items()])


def _milliseconds(percentiles: Percentiles) -> str:
    return f"{1e3 * percentiles.p50:.1f} / {1e3 * percentiles.p99:.1f} ms"
