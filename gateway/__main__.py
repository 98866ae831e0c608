"""`python -m gateway`: read the settings, listen, serve HTTP until a signal."""

import gc
import os
import socket
import sys

from gateway.app import build_app
from gateway.logs import set_up_logs
from gateway.server import make_server
from gateway.settings import argument_parser, checked_keys, load_settings
from shared.errors import ConfigError
from shared.http_address import address_of, listen_http
from shared.processes import die_with

EXIT_USAGE = 2


def main() -> int:
    """Entry of the gateway process; the exit code."""
    flags = argument_parser().parse_args()
    if "parent" in flags:
        die_with(flags.parent)
    try:
        settings = load_settings(flags, os.environ)
        keys = checked_keys(settings)
        listener = (
            socket.socket(fileno=flags.fd) if "fd" in flags else listen_http(settings.address)
        )
    except ConfigError as error:
        print(f"tpserve gateway: error: {error.message}", file=sys.stderr)
        return EXIT_USAGE
    set_up_logs(settings.log_format, settings.log_level)
    app = build_app(settings, keys)
    gc.freeze()  # what is here to stay is not looked at again by each collection
    make_server(app, settings, address_of(listener)).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
