"""The process's listening side: uvicorn, with the limits that it does not have itself."""

import asyncio
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway.errors import error_body
from gateway.settings import HttpSettings
from shared.errors import InvalidRequestError, QueueFullError, TpserveError
from shared.http_address import HttpAddress

MAX_HEADER_BYTES = 16 << 10


class Server(uvicorn.Server):
    """Says where it listens; SIGINT and SIGTERM end it with exit code 0, a second one at once."""

    def __init__(self, config: uvicorn.Config, address: HttpAddress) -> None:
        super().__init__(config)
        self._address = address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, and tell so."""
        await super().startup(sockets)
        if self.started:
            print(f"gateway {self._address.url}", flush=True)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Unlike uvicorn's own, this one does not raise the signal again in the end."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        yield

    def _stop(self, number: int, frame: Any) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def connection_class(settings: HttpSettings) -> type[H11Protocol]:
    """Connections with the limits of these settings."""

    class Connection(H11Protocol):
        """Bounded in number, in time for headers, and in time for a peer that reads nothing."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """A client has come."""
            super().connection_made(transport)
            # EventStream cuts off who does not read; the kernel does so for all other answers.
            transport.get_extra_info("socket").setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.slow_reader * 1000)
            )
            self.app_state = {**self.app_state, "transport": transport}
            self._header_timer: asyncio.TimerHandle | None = None
            self._expect_headers()
            if len(self.connections) > settings.max_connections:
                transport.write(_refusal(_too_many(settings.max_connections)))
                transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            """It has gone."""
            self._have_headers()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """Part of a request has come."""
            if self.transport.is_closing():
                return
            served = self.cycle
            super().data_received(data)
            if self.cycle is not served:
                self._have_headers()
            elif served is not None and served.response_complete:
                self._expect_headers()

        def send_400_response(self, msg: str) -> None:
            """Refuse what is not HTTP, in the shape of other errors, and end the connection."""
            served = self.cycle
            if served is None or not served.response_started or served.response_complete:
                self.transport.write(_refusal(InvalidRequestError(msg)))
            self.transport.close()
            if served is not None:  # what it still has to say can no longer be sent
                served.disconnected = True
                served.message_event.set()

        def _unsupported_upgrade_warning(self) -> None:
            """Who asks for another protocol is answered in this one, which is no news for the log."""

        def timeout_keep_alive_handler(self) -> None:
            """It was idle for too long."""
            if self.transport.get_write_buffer_size():
                self.transport.abort()  # or it would stay for as long as the peer reads nothing
            else:
                super().timeout_keep_alive_handler()

        def _expect_headers(self) -> None:
            """The time runs from a request's first byte on: more of them do not prolong it."""
            if self._header_timer is None:
                timeout = settings.header_timeout
                self._header_timer = self.loop.call_later(timeout, self.transport.abort)

        def _have_headers(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

    return Connection


def make_server(app: ASGIApp, settings: HttpSettings, address: HttpAddress) -> Server:
    """A server for `app`, to be run with a socket that listens at `address`."""
    config = uvicorn.Config(
        app,
        loop="uvloop",
        # Not httptools: it takes a body after an Upgrade header, as Java's clients send it, for another
        # protocol, and spares some 0.1 ms of a request and nothing of a token.
        http=connection_class(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=settings.keep_alive,
        timeout_graceful_shutdown=settings.grace,
    )
    return Server(config, address)


def _too_many(limit: int) -> TpserveError:
    return QueueFullError(f"{limit} connections are open, which is the limit: try again later")


def _refusal(error: TpserveError) -> bytes:
    """An answer that ends the connection before there is a request to pass on."""
    body = msgspec.json.encode(error_body(error))
    status = HTTPStatus(error.http_status)
    retry = "Retry-After: 1\r\n" if isinstance(error, QueueFullError) else ""
    head = (
        f"HTTP/1.1 {status} {status.phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{retry}Connection: close\r\n\r\n"
    )
    return head.encode() + body
