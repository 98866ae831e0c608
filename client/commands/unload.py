"""`tpserve unload`: a model's memory back."""

import argparse

from client.commands.common import connect


def run(args: argparse.Namespace) -> int:
    """Wait until it is gone."""
    with connect(args) as client:
        freed = client.unload(args.model, force=args.force)
    print(f"{args.model} is unloaded: {freed / 1e6:,.1f} MB given back")
    return 0
