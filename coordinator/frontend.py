"""The clients' side of the coordinator: one ROUTER socket, requests in, events out."""

import logging
from collections import deque
from collections.abc import Iterator

import zmq

from shared.errors import TpserveError
from shared.messages import (
    BadRequestError,
    Event,
    Failed,
    Request,
    decode_request,
    encode,
)
from shared.sockets import client_facing

log = logging.getLogger("coordinator.frontend")

_MESSAGES_AT_ONCE = 256
"""Requests taken from the socket before the engine gets on with its steps."""


class Frontend:
    """Receives requests, sends events, and notices clients that are gone."""

    def __init__(self, context: zmq.Context[zmq.SyncSocket], address: str) -> None:
        """Bind. Raises ConfigError when the address is taken."""
        self.socket = client_facing(context, address)
        self.last_client_gone = False
        """After a send that failed: the client is gone, and did not only stop reading."""
        self._owed: deque[tuple[bytes, Event]] = deque()
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

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

    def send(self, client: bytes, event: Event) -> bool:
        """Send an event; False when the client is gone or has stopped reading."""
        try:
            self.socket.send_multipart((client, encode(event)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self.last_client_gone = error.errno == zmq.EHOSTUNREACH
            return False
        return True

    def send_when_possible(self, client: bytes, event: Event) -> None:
        """For a job's last event to a client that has stopped reading: keep it until it reads."""
        self._owed.append((client, event))

    def send_owed(self) -> None:
        """Try again what could not be sent; forget it when the client is gone."""
        for _ in range(len(self._owed)):
            client, event = self._owed.popleft()
            if not self.send(client, event) and not self.last_client_gone:
                self._owed.append((client, event))

    def refuse(self, client: bytes, request_id: str, error: TpserveError) -> None:
        """Answer a request with an error."""
        log.info("refused request %r: %s", request_id, error.message)
        self.send(client, failed(request_id, error))

    def close(self) -> None:
        """Unbind; what was sent still has a moment to leave."""
        self.socket.close(linger=500)


def failed(request_id: str, error: TpserveError) -> Failed:
    """The event that tells a client of an error."""
    return Failed(
        id=request_id,
        code=error.code,
        message=error.message,
        retry_after_s=error.retry_after_s,
    )
