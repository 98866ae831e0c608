"""`tpserve rm`: a model out of the cache."""

import argparse
import sys

from shared.errors import ModelError
from shared.hub import parse_hub_model
from shared.hub_cache import plan_removal, remove
from shared.hub_progress import readable_bytes

EXIT_FAILED = 1


def run(args: argparse.Namespace) -> int:
    """Delete it, after asking."""
    model = parse_hub_model(args.spec)
    if model is None:
        raise ModelError(
            f"{args.spec} is no model of the hub (ORG/NAME or ORG/NAME@REVISION); other folders are "
            "not deleted"
        )
    removal = plan_removal(model)
    size = readable_bytes(removal.size_bytes)
    if not args.yes:
        if not sys.stdin.isatty():
            raise ModelError(f"{model} would free {size}: add --yes, as nobody can be asked")
        print(
            f"delete {model} from the cache ({size})? [y/N] ", end="", file=sys.stderr, flush=True
        )
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing is deleted", file=sys.stderr)
            return EXIT_FAILED
    remove(removal)
    print(f"{model} deleted: {size} freed")
    return 0
