"""`tpserve pull`: a model of the hub into the cache."""

import argparse
import sys

from client.render import one_line
from shared.hub import local_folder, resolve_model


def run(args: argparse.Namespace) -> int:
    """Download what is missing and print the folder; progress goes to standard error."""
    if local_folder(args.spec):
        _say(f"{args.spec} is a folder here: nothing to download")
    print(resolve_model(args.spec, offline=args.offline, report=_say))
    return 0


def _say(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)
