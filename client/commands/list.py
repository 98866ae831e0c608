"""`tpserve list`: which models the cache has."""

import argparse
import time

from client.commands.common import write_json
from client.tables import write_table
from shared.hub_cache import CachedModel, cached_models
from shared.hub_progress import readable_bytes

_COMMIT_CHARACTERS = 8
_UNITS = ((86_400, "days"), (3_600, "hours"), (60, "minutes"))


def run(args: argparse.Namespace) -> int:
    """Print a row, or an object, for each revision of each model."""
    models = cached_models()
    if args.json:
        write_json(models)
    else:
        columns = ["name", "revision", "size", "last used"]
        write_table("models in the cache", columns, [_row(model) for model in models])
    return 0


def _row(model: CachedModel) -> list[str]:
    refs = f" ({', '.join(model.refs)})" if model.refs else ""
    return [
        model.name,
        model.revision[:_COMMIT_CHARACTERS] + refs,
        readable_bytes(model.size_bytes),
        _ago(time.time() - model.last_used),
    ]


def _ago(seconds: float) -> str:
    for length, unit in _UNITS:
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
