"""The HTTP API's process: started beside the coordinator, watched, started again, ended.

The coordinator listens and hands the open socket down: an address that is taken is noticed before
anything is started, and a gateway that has died gives its place to the next, with the clients that
wait there. The coordinator serves on whatever becomes of it.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Self

from shared.config import Settings, Sourced
from shared.errors import ConfigError
from shared.http_address import (
    HttpAddress,
    address_of,
    is_loopback,
    listen_http,
    parse_http_address,
)
from shared.processes import GIVES_MEMORY_BACK, describe_exit

log = logging.getLogger("coordinator.gateway_process")

GATEWAY_COMMAND = (sys.executable, "-P", "-m", "gateway")
MAX_RESTARTS_PER_MINUTE = 3
KEY_VARIABLES = ("TPSERVE_API_KEYS", "TPSERVE_HTTP_API_KEY_FILE")
"""Where the gateway finds the keys of clients."""
_USAGE_ERROR = 2
_STOP_GRACE_S = 3


class GatewayProcess:
    """A socket that listens for HTTP, and the process that answers there."""

    def __init__(self, listener: socket.socket, zmq_address: str, settings: Settings) -> None:
        self._listener = listener
        self.url = address_of(listener).url
        self._command = [
            *GATEWAY_COMMAND,
            *("--fd", str(listener.fileno()), "--http", settings.http),
            *("--server", zmq_address, "--parent", str(os.getpid())),
            *("--log-level", settings.log_level, "--grace", str(_STOP_GRACE_S)),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        # The kernel ends the child when the thread that made it ends, so one thread makes them all.
        self._keeper = threading.Thread(target=self._keep, name="gateway", daemon=True)

    def start(self) -> Self:
        """Start the process; it is kept up from now on."""
        self._keeper.start()
        return self

    def stop(self) -> None:
        """End the process; answers under way have a moment to finish."""
        with self._lock:
            self._stopping.set()
            if self._process is not None:
                self._process.send_signal(signal.SIGTERM)
        self._keeper.join(_STOP_GRACE_S + 2)
        if self._process is not None:
            self._process.kill()  # does nothing to one that has ended
        self._keeper.join()
        self._listener.close()

    def _keep(self) -> None:
        starts: deque[float] = deque(maxlen=MAX_RESTARTS_PER_MINUTE + 1)
        while True:
            starts.append(time.monotonic())
            with self._lock:
                if self._stopping.is_set():
                    return
                self._process = subprocess.Popen(
                    self._command,
                    env={**GIVES_MEMORY_BACK, **os.environ},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # its one line is the coordinator's to print
                    pass_fds=(self._listener.fileno(),),
                    process_group=0,  # Ctrl-C at a terminal is for the coordinator alone
                )
            code = self._process.wait()
            if self._stopping.is_set():
                return
            how = describe_exit(code)
            too_often = len(starts) > MAX_RESTARTS_PER_MINUTE and starts[-1] - starts[0] < 60
            if code == _USAGE_ERROR or too_often:
                log.error("the gateway %s: there is no HTTP API until the server is restarted", how)
                self._listener.close()  # or clients would wait there for an answer
                return
            log.error("the gateway %s: it is started again", how)


def listen(sourced: Sourced, environ: Mapping[str, str]) -> socket.socket | None:
    """The socket for HTTP; None: it is switched off.

    When the default port is taken and nobody asked for it, any free one has to do. Raises ConfigError
    when an address that somebody chose cannot be had, or strangers could come in without a key.
    """
    http = sourced.settings.http
    if not http:
        return None
    address = parse_http_address(http)
    if not is_loopback(address.host) and not any(environ.get(name) for name in KEY_VARIABLES):
        raise ConfigError(
            f"http is {http!r}: whoever can reach {address.host} could use this server; set "
            f"{' or '.join(KEY_VARIABLES)}, or listen at 127.0.0.1"
        )
    try:
        return listen_http(address)
    except ConfigError:
        if sourced.sources["http"] != "default":
            raise
        listener = listen_http(HttpAddress(address.host, 0))
        log.warning("port %d is taken: HTTP is at %s", address.port, address_of(listener).url)
        return listener
