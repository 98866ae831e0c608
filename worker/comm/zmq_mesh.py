"""Collectives over ZeroMQ: a full mesh of PAIR sockets, one link for each two ranks.

Of ranks i < j, rank i binds `{addresses[i]}-{j}` and rank j connects to it; addresses are ipc://
paths. In each round every link carries one message each way: the round's number as a little-endian
uint64, then the rows.
"""

import contextlib
import time
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zmq

from shared import sockets
from shared.errors import ConfigError
from shared.worker_messages import CommSetup
from worker.comm.base import Row, TreeCommunicator

_BLOCK_BYTES = 1 << 20
_HEADER_BYTES = 8
_SCHEME = "ipc://"


class ZmqCommunicator(TreeCommunicator):
    """One of the ranks of a mesh of sockets."""

    def __init__(self, setup: CommSetup) -> None:
        """Binds and connects; peers may come later. Raises ConfigError for a bad address."""
        super().__init__(setup, _BLOCK_BYTES)
        if len(setup.addresses) != self.world:
            raise ConfigError(
                f"--comm zmq needs an address for each of {self.world} ranks,"
                f" got {len(setup.addresses)}"
            )
        self._context = zmq.Context()
        self._links: dict[int, zmq.SyncSocket] = {}
        self._bound: list[Path] = []
        self._round = 0
        try:
            for peer in range(self.world):
                if peer != self.rank:
                    self._links[peer] = self._link(setup.addresses, peer)
        except ConfigError:
            self.close()
            raise

    def close(self) -> None:
        """See Communicator."""
        for link in self._links.values():
            link.close(0)
        self._context.term()
        for path in self._bound:  # libzmq leaves them
            path.unlink(missing_ok=True)

    def _link(self, addresses: Sequence[str], peer: int) -> zmq.SyncSocket:
        low, high = sorted((self.rank, peer))
        address = f"{addresses[low]}-{high}"
        if not address.startswith(_SCHEME):
            raise ConfigError(f"--comm zmq needs ipc:// addresses, got {addresses[low]!r}")
        link = sockets.pair(self._context)
        try:
            if self.rank == low:
                link.bind(address)
                self._bound.append(Path(address.removeprefix(_SCHEME)))
            else:
                link.connect(address)
        except zmq.ZMQError as error:
            link.close(0)
            raise ConfigError(
                f"cannot reach rank {peer} by {address!r}: {error.strerror}"
            ) from None
        return link

    def _all_gather(
        self,
        operation: str,
        rows: Sequence[Row],
        rows_per_rank: tuple[int, ...],
        parts: Sequence[slice] | None = None,
    ) -> Sequence[Row]:
        deadline = time.monotonic() + self._deadline_s
        self._round += 1
        # Messages are new memory, which ZeroMQ may go on reading for as long as it likes.
        if parts is None:
            messages = [self._compose(rows)] * self.world
        else:
            messages = [self._compose([row[part] for row in rows]) for part in parts]
        self._send(messages, deadline, operation)
        size = (messages[self.rank].size - _HEADER_BYTES) // len(rows)
        gathered: list[Row] = []
        for rank, count in enumerate(rows_per_rank):
            message = messages[rank]
            if rank != self.rank:
                message = self._receive(rank, count * size, deadline, operation)
            gathered.extend(message[_HEADER_BYTES:].view(rows[0].dtype).reshape(count, -1))
        return gathered

    def _compose(self, rows: Sequence[Row]) -> npt.NDArray[np.uint8]:
        message = np.empty(_HEADER_BYTES + len(rows) * rows[0].nbytes, np.uint8)
        message[:_HEADER_BYTES].view(np.uint64)[0] = self._round
        payload = message[_HEADER_BYTES:].view(rows[0].dtype).reshape(len(rows), -1)
        for target, row in zip(payload, rows, strict=True):
            target[:] = row
        return message

    def _send(
        self, messages: Sequence[npt.NDArray[np.uint8]], deadline: float, operation: str
    ) -> None:
        """To each peer as soon as it is connected: nobody has to wait because another is missing."""
        unsent = set(self._links)
        while True:
            for peer in tuple(unsent):
                with contextlib.suppress(zmq.Again):
                    self._links[peer].send(messages[peer].data, zmq.NOBLOCK, copy=False)
                    unsent.remove(peer)
            if not unsent:
                return
            self._wait(unsent, zmq.POLLOUT, deadline, operation)

    def _receive(
        self, peer: int, size: int, deadline: float, operation: str
    ) -> npt.NDArray[np.uint8]:
        """The peer's message of this round. `size`: of its rows."""
        self._wait({peer}, zmq.POLLIN, deadline, operation)
        link = self._links[peer]
        if size < zmq.COPY_THRESHOLD:
            message = np.frombuffer(link.recv(zmq.NOBLOCK), np.uint8)
        else:
            message = np.frombuffer(link.recv(zmq.NOBLOCK, copy=False).buffer, np.uint8)
        if message.size != _HEADER_BYTES + size:
            reason = f"sent {message.size - _HEADER_BYTES} bytes instead of {size}"
            raise self._fail(peer, operation, reason)
        number = int(message[:_HEADER_BYTES].view(np.uint64)[0])
        if number != self._round:
            raise self._fail(peer, operation, f"sent round {number} instead of {self._round}")
        return message

    def _wait(self, peers: Set[int], event: int, deadline: float, operation: str) -> None:
        """Until one of the links is ready."""
        remaining_ms = int(max(0.0, deadline - time.monotonic()) * 1000)
        # Half the cost of Socket.poll, which makes a Poller for each call.
        if not zmq.zmq_poll([(self._links[peer], event) for peer in peers], remaining_ms):
            raise self.lost(min(peers), operation)
