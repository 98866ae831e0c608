"""The clients' side of the coordinator: one ROUTER socket, requests in, events out."""

import logging
from collections.abc import Iterator

import zmq

from shared.errors import TpserveError
from shared.messages import Failed
from shared.protocol import (
    TERMINAL_EVENTS,
    BadRequestError,
    Event,
    Request,
    decode_request,
    encode_events,
)
from shared.sockets import client_facing

log = logging.getLogger("coordinator.frontend")

_MESSAGES_AT_ONCE = 256
"""Requests taken from the socket before the engine gets on with its steps."""


class Frontend:
    """Receives requests, sends events, and notices clients that are gone.

    Events are collected and go out together, one frame for each client: a send costs more than
    making the event.
    """

    def __init__(self, context: zmq.Context[zmq.SyncSocket], address: str) -> None:
        """Bind. Raises ConfigError when the address is taken."""
        self.socket = client_facing(context, address)
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self._outgoing: dict[bytes, list[Event]] = {}
        self._owed: dict[bytes, list[Event]] = {}

    def requests(self) -> Iterator[tuple[bytes, Request]]:
        """Requests that have arrived, with the client's routing id; bad ones are answered here."""
        for _ in range(_MESSAGES_AT_ONCE):
            try:
                client, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if len(frames) != 1:
                    raise BadRequestError("", f"a request is one frame, this one has {len(frames)}")
                yield client, decode_request(frames[0])
            except BadRequestError as error:
                self.refuse(client, error.request_id, error)

    def publish(self, client: bytes, event: Event) -> None:
        """Have an event sent with the next `flush`."""
        self._outgoing.setdefault(client, []).append(event)

    def refuse(self, client: bytes, request_id: str, error: TpserveError) -> None:
        """Answer a request with an error."""
        log.info("refused request %r: %s", request_id, error.message)
        self.publish(client, failed(request_id, error))

    def flush(self) -> list[tuple[bytes, bool]]:
        """Send what was published; the clients that did not take it, and whether they are gone.

        One that is not gone has stopped reading.
        """
        problems = []
        for client, events in self._outgoing.items():
            problem = self._send(client, events)
            if problem is not None:
                problems.append((client, problem == zmq.EHOSTUNREACH))
            if problem == zmq.EAGAIN:
                self.owe(client, [e for e in events if isinstance(e, TERMINAL_EVENTS)])
        self._outgoing.clear()
        return problems

    def owe(self, client: bytes, events: list[Event]) -> None:
        """Last events of a client's jobs that has stopped reading: kept until it reads again."""
        self._owed.setdefault(client, []).extend(events)

    def send_owed(self) -> None:
        """Try again what could not be sent; forget it when the client is gone."""
        for client in list(self._owed):
            if self._send(client, self._owed[client]) != zmq.EAGAIN:
                del self._owed[client]

    def close(self) -> None:
        """Send the rest and unbind; what was sent still has a moment to leave."""
        self.flush()
        self.socket.close(linger=500)

    def _send(self, client: bytes, events: list[Event]) -> int | None:
        """Send a frame; the error number when the client is gone or has stopped reading."""
        try:
            self.socket.send_multipart((client, encode_events(events)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return error.errno
        return None


def failed(request_id: str, error: TpserveError) -> Failed:
    """The event that tells a client of an error."""
    return Failed(
        id=request_id,
        code=error.code,
        message=error.message,
        retry_after_s=error.retry_after_s,
    )
