"""ZeroMQ sockets with limits and linger set: the only place that creates them."""

import socket as unix
from typing import TypeVar

import zmq

from shared.errors import ConfigError
from shared.messages import MAX_MESSAGE_BYTES

HANDSHAKE_TIMEOUT_MS = 5_000
CLIENT_HIGH_WATER_MARK = 10_000
"""Events that may wait for one client (frontend) or one server (client) before sends block or fail."""
WORKER_HIGH_WATER_MARK = 1_000

S = TypeVar("S", bound=zmq.SyncSocket)


def client_facing(context: zmq.Context[zmq.SyncSocket], address: str) -> zmq.SyncSocket:
    """A bound ROUTER for clients. Raises ConfigError when the address cannot be bound."""
    socket = context.socket(zmq.ROUTER)
    _limit(socket, MAX_MESSAGE_BYTES, CLIENT_HIGH_WATER_MARK)
    # Without it a send to a client that has gone is dropped in silence and its job runs on.
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    _bind(socket, address)
    return socket


def worker_facing(context: zmq.Context[zmq.SyncSocket], address: str) -> zmq.SyncSocket:
    """A bound ROUTER for workers; a worker's identity is its rank."""
    socket = context.socket(zmq.ROUTER)
    _limit(socket, -1, WORKER_HIGH_WATER_MARK)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    _bind(socket, address)
    return socket


def dealer(context: zmq.Context[S], address: str, identity: bytes | None = None) -> S:
    """A DEALER connected to `address`; works with a plain or an asyncio context.

    Raises ConfigError when the address is malformed.
    """
    socket = context.socket(zmq.DEALER)
    _limit(socket, -1, CLIENT_HIGH_WATER_MARK)
    if identity is not None:
        socket.setsockopt(zmq.IDENTITY, identity)
    try:
        socket.connect(address)
    except zmq.ZMQError as error:
        socket.close(0)
        raise ConfigError(f"cannot connect to {address!r}: {error.strerror}") from None
    return socket


def pair(context: zmq.Context[zmq.SyncSocket]) -> zmq.SyncSocket:
    """An unbound PAIR for one link of the workers' mesh."""
    socket = context.socket(zmq.PAIR)
    _limit(socket, -1, WORKER_HIGH_WATER_MARK)
    return socket


def _somebody_listens(path: str) -> bool:
    """ZeroMQ would take a live server's path away from it without a word."""
    with unix.socket(unix.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def _limit(socket: zmq.Socket, max_bytes: int, high_water_mark: int) -> None:  # type: ignore[type-arg]
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    socket.setsockopt(zmq.SNDHWM, high_water_mark)
    socket.setsockopt(zmq.RCVHWM, high_water_mark)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)


def _bind(socket: zmq.SyncSocket, address: str) -> None:
    if address.startswith("ipc://") and _somebody_listens(address.removeprefix("ipc://")):
        socket.close(0)
        raise ConfigError(f"cannot listen on {address!r}: already in use")
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        socket.close(0)
        reason = "already in use" if error.errno == zmq.EADDRINUSE else error.strerror
        raise ConfigError(f"cannot listen on {address!r}: {reason}") from None
