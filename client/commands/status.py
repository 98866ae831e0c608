"""`tpserve status`: workers, queue, memory, rates."""

import argparse

import msgspec

from client.commands.common import connect, write_json
from client.commands.models import model_rows
from client.tables import write_table
from shared.messages import Status

_ENVELOPE = ("event", "id", "v")


def run(args: argparse.Namespace) -> int:
    """Print tables, or one object with the fields of the `status` event."""
    with connect(args) as client:
        status = client.status()
    if args.json:
        fields = msgspec.to_builtins(status)
        write_json({name: value for name, value in fields.items() if name not in _ENVELOPE})
    else:
        _show(status)
    return 0


def _show(status: Status) -> None:
    queued = ", ".join(f"{kind} {count}" for kind, count in status.queued.items())
    server = {
        "version": status.version,
        "ready": "yes" if status.ready else "no",
        "uptime": f"{status.uptime_s:.0f} s",
        "pid": str(status.pid),
        "starts of the workers": str(status.epoch),
        "all-reduce": status.comm,
        "queued": queued,
        "running": str(status.running),
        "steps": str(status.steps),
        "tokens generated": str(status.tokens_generated),
        "KV blocks": f"{status.kv_blocks_used} of {status.kv_blocks_total} used",
    }
    workers = [
        [
            str(worker.rank),
            str(worker.pid),
            ",".join(map(str, worker.virtual_shards)),
            f"{worker.memory_bytes / (1 << 20):.1f} MiB",
        ]
        for worker in status.workers
    ]
    write_table("server", ["", ""], [[name, value] for name, value in server.items()])
    write_table("workers", ["rank", "pid", "virtual shards", "memory"], workers)
    write_table("models", *model_rows(status.models))
