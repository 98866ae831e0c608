"""`tpserve load`: one more model for the running server."""

import argparse
import sys
from collections.abc import Callable

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from client.commands.common import connect, write_json
from client.requests import LoadOptions
from shared.errors import InvalidRequestError
from shared.messages import Loading


def run(args: argparse.Namespace) -> int:
    """Show how far each worker is, on a terminal; then what is loaded."""
    name, separator, path = args.model.partition("=")
    if not (name and separator and path):
        raise InvalidRequestError(f"{args.model!r} is not NAME=PATH, such as chat=/data/TinyLlama")
    given = {key: getattr(args, key) for key in ("dtype", "kv_dtype", "max_model_len")}
    try:
        options = msgspec.convert({k: v for k, v in given.items() if v is not None}, LoadOptions)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(str(error)) from None
    console = Console(stderr=True)
    with connect(args) as client, Progress(*_COLUMNS, console=console, transient=True) as bars:
        shown = _bars(bars) if sys.stderr.isatty() else _ignore
        model = client.load(name, path, on_progress=shown, **options)
    if args.json:
        write_json(model)
    else:
        memory = sum(model.weight_bytes) / 1e6
        print(f"{name}: {model.model_type} as {model.dtype}, {memory:,.1f} MB of weights", end="")
        print(f", context {model.max_model_len}")
    return 0


_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    DownloadColumn(),
    TimeRemainingColumn(),
)


def _ignore(_: Loading) -> None: ...


def _bars(bars: Progress) -> Callable[[Loading], None]:
    """A bar for each worker."""
    tasks: dict[int, TaskID] = {}
    waiting = bars.add_task("waiting", total=None)

    def show(event: Loading) -> None:
        bars.update(waiting, description=event.phase, visible=event.phase != "reading")
        for rank in event.ranks:
            if rank.rank not in tasks:
                tasks[rank.rank] = bars.add_task(f"worker {rank.rank}")
            bars.update(tasks[rank.rank], completed=rank.bytes_done, total=rank.bytes_total)

    return show
