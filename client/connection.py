"""One ZeroMQ connection to a server and how to wait on it, blocking or in an event loop.

What goes over it is the business of client/exchange.py.
"""

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Set
from typing import Any, Generic, TypeVar

import zmq
import zmq.asyncio

from client.exchange import Exchange
from shared.errors import ConfigError, ConnectionLostError
from shared.protocol import Event
from shared.sockets import dealer

CLOSING_LINGER_MS = 200
"""For the cancel requests of a client that is closed."""
HEARTBEAT_INTERVAL_MS = 5_000
HEARTBEAT_TIMEOUT_MS = 15_000
"""Either side takes the other for gone when nothing came from its machine for so long."""

S = TypeVar("S", bound=zmq.Socket[Any])


class _Connection(ABC, Generic[S]):
    """A DEALER, the monitor that tells when its peer has gone, and the exchange over it.

    Owns its ZeroMQ context. Raises ConfigError when the address is malformed.
    """

    def __init__(
        self, context: zmq.Context[S], address: str, timeout_s: float, silence_s: float
    ) -> None:
        self._context = context
        # An option of a socket counts from its next connect on, so the context has to set it.
        context.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
        context.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        context.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
        try:
            self._socket = dealer(context, address)
        except ConfigError:
            context.term()
            raise
        # ZeroMQ reconnects in silence, but the server forgets our jobs with the connection.
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._plain_socket, self._plain_monitor = _plain(self._socket), _plain(self._monitor)
        self.exchange = Exchange(self._send, address, timeout_s, silence_s)

    @property
    def usable(self) -> bool:
        """Whether requests can go over it, as far as is known without waiting."""
        if not self.exchange.lost:
            self._take_in()
        return not self.exchange.lost

    @abstractmethod
    def _send(self, frame: bytes) -> None: ...

    def _take_in(self) -> Set[str]:
        """Hand over what has arrived, without waiting; ids of requests that have an event now."""
        # The monitor comes first: then what the server said before it left is among the frames.
        disconnected = _readable(self._plain_monitor)
        frames = []
        while _readable(self._plain_socket):
            frames.append(self._plain_socket.recv(zmq.NOBLOCK))
        fresh = self.exchange.take_in(frames, disconnected)
        if self.exchange.lost:
            self._close_sockets(linger_ms=0)
        return fresh

    def _close(self) -> None:
        if not self.exchange.lost:
            self.exchange.cancel_all()
            self.exchange.lose("this client was closed")
            self._close_sockets(CLOSING_LINGER_MS if self.exchange.heard else 0)

    def _close_sockets(self, linger_ms: int) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger_ms)
        self._context.term()


class Connection(_Connection[zmq.SyncSocket]):
    """For one thread that waits."""

    def __init__(self, address: str, timeout_s: float, silence_s: float) -> None:
        super().__init__(zmq.Context(), address, timeout_s, silence_s)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def next_event(self, request_id: str) -> Event:
        """Wait for the next event of an open request. Raises ConnectionLostError."""
        while (event := self.exchange.next_event(request_id)) is None:
            self._poller.poll(_milliseconds(self.exchange.patience_s))
            self._take_in()
        return event

    def close(self) -> None:
        """Cancel what is still running and close the socket."""
        self._close()

    def _send(self, frame: bytes) -> None:
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            raise _backlog_error() from None


class AsyncConnection(_Connection[zmq.asyncio.Socket]):
    """For the tasks of one event loop. A task of its own receives while any request is open."""

    def __init__(self, address: str, timeout_s: float, silence_s: float) -> None:
        super().__init__(zmq.asyncio.Context(), address, timeout_s, silence_s)
        self._receiver: asyncio.Task[None] | None = None
        self._waiters: dict[str, asyncio.Future[None]] = {}

    async def next_event(self, request_id: str) -> Event:
        """Wait for the next event of an open request. Raises ConnectionLostError."""
        while (event := self.exchange.next_event(request_id)) is None:
            self._keep_receiving()
            waiter = asyncio.get_running_loop().create_future()
            self._waiters[request_id] = waiter
            try:
                await waiter
            finally:
                del self._waiters[request_id]
        return event

    async def close(self) -> None:
        """Cancel what is still running and close the socket."""
        self._close()
        if self._receiver is not None:
            self._receiver.cancel()
            await asyncio.wait([self._receiver])

    def _keep_receiving(self) -> None:
        if self._receiver is not None and self._receiver.done():
            self._receiver.result()  # an error in it is a bug, and the waiting task must hear of it
            self._receiver = None
        if self._receiver is None:
            self._receiver = asyncio.create_task(self._receive())

    async def _receive(self) -> None:
        poller = zmq.asyncio.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        try:
            while self.exchange.awaited and not self.exchange.lost:
                await poller.poll(_milliseconds(self.exchange.patience_s))
                self._take_in()
        finally:
            self._wake(set(self._waiters))

    def _take_in(self) -> Set[str]:
        fresh = super()._take_in()
        self._wake(fresh)
        return fresh

    def _wake(self, request_ids: Set[str]) -> None:
        for request_id in request_ids:
            waiter = self._waiters.get(request_id)
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def _send(self, frame: bytes) -> None:
        # Not awaited: with NOBLOCK the future is done when it comes back.
        sent = asyncio.ensure_future(self._socket.send(frame, zmq.NOBLOCK))
        if isinstance(sent.exception(), zmq.Again):
            raise _backlog_error()
        sent.result()


def _plain(socket: zmq.Socket[Any]) -> zmq.SyncSocket:
    """A blocking view of any socket."""
    return zmq.Socket.shadow(socket.underlying)


def _readable(socket: zmq.SyncSocket) -> bool:
    return bool(int(socket.get(zmq.EVENTS)) & zmq.POLLIN)


def _milliseconds(seconds: float) -> int:
    return math.ceil(seconds * 1000)


def _backlog_error() -> ConnectionLostError:
    return ConnectionLostError("the server takes no requests: too many wait to be sent")
