"""`tpserve health`: is the server ready."""

import argparse

from client.commands.common import connect
from client.render import one_line

EXIT_NOT_READY = 1


def run(args: argparse.Namespace) -> int:
    """Print the answer; exit with 1 when it is no."""
    with connect(args) as client:
        health = client.health()
    print("ready" if health.ready else f"not ready: {one_line(health.reason)}")
    return 0 if health.ready else EXIT_NOT_READY
