"""The address of the HTTP API: what it may be, and the socket that listens there."""

import ipaddress
import re
import socket
from typing import NamedTuple

from shared.errors import ConfigError

DEFAULT_HTTP = "127.0.0.1:8000"
SEND_BUFFER_BYTES = 256 << 10
"""Of each connection: what the kernel keeps of a stream for a client that does not read."""
_BACKLOG = 256


class HttpAddress(NamedTuple):
    """Where to listen; port 0 is any free one."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """As clients write it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


def parse_http_address(text: str) -> HttpAddress:
    """HOST:PORT. Raises ConfigError."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]/]+):(\d{1,5})", text)
    if match is None or int(match[2]) > 65535:
        raise ConfigError(
            f"http is {text!r}: write HOST:PORT, such as {DEFAULT_HTTP} or [::1]:8000"
        )
    return HttpAddress(match[1].strip("[]"), int(match[2]))


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen_http(address: HttpAddress) -> socket.socket:
    """A socket that listens. Raises ConfigError when the address is taken or not of this machine."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family)
    try:
        # A port whose last connections are still being closed may be had, one in use may not.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen at http {address.host}:{address.port}: {error.strerror}; "
            "choose another with --http HOST:PORT (port 0: any free one)"
        ) from None
    return listener


def address_of(listener: socket.socket) -> HttpAddress:
    """Where a socket listens."""
    host, port = listener.getsockname()[:2]
    return HttpAddress(host, port)
