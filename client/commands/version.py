"""`tpserve --version`."""

import argparse
from importlib.metadata import version


def run(_args: argparse.Namespace) -> int:
    """Print it."""
    print(f"tpserve {version('tpserve')}")
    return 0
