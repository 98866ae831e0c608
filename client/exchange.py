"""Requests and answers of one connection, without the connection: what both clients share.

Knows which requests are open, which event answers which of them, and when silence means that the
server is gone. Does no I/O and never waits: frames to send go to the `send` it is given, what has
arrived is handed to `take_in`.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Set

from client.requests import frame_of, new_id
from shared.errors import ConnectionLostError, TpserveError
from shared.messages import PROTOCOL_VERSION, Cancel, GetHealth
from shared.protocol import TERMINAL_EVENTS, CancellableRequest, Event, Request, decode_events


class Exchange:
    """The open requests of one connection and their unread events.

    A server is alive as long as frames come. When it has been quiet for half of `silence_s` it is
    asked for its health; if that stays without an answer for the other half, the connection is
    lost. On a new connection a first such question goes out at once, and must be answered within
    `timeout_s`.
    """

    def __init__(
        self,
        send: Callable[[bytes], None],
        address: str,
        timeout_s: float,
        silence_s: float,
    ) -> None:
        self._send = send
        self._address = address
        self._timeout_s = timeout_s
        self._silence_s = silence_s
        self._unread: dict[str, deque[Event]] = {}
        self._jobs: set[str] = set()
        self._garbage: deque[str] = deque()
        self._thread = threading.get_ident()
        self._lost: str | None = None
        self._heard = False
        self._quiet_since = time.monotonic()
        self._asked_at: float | None = None
        self._ask_health()

    @property
    def lost(self) -> bool:
        """Nothing more will arrive; what has arrived can still be read."""
        return self._lost is not None

    @property
    def awaited(self) -> Set[str]:
        """Ids of the requests whose answer is not finished, or not read to its end."""
        return self._unread.keys()

    @property
    def heard(self) -> bool:
        """Whether the server has ever said anything on this connection."""
        return self._heard

    @property
    def patience_s(self) -> float:
        """How long to wait for frames before `take_in` has something to do without any."""
        return max(0.0, self._deadline() - time.monotonic())

    def open(self, request: Request) -> None:
        """Send a request; its events are kept from now on."""
        frame = frame_of(request)
        self._cancel_garbage()
        if not self._unread:
            self._quiet_since = time.monotonic()
        self._send(frame)
        self._unread[request.id] = deque()
        if isinstance(request, CancellableRequest):
            self._jobs.add(request.id)

    def next_event(self, request_id: str) -> Event | None:
        """The next unread event of an open request; None when it has yet to arrive.

        Raises ConnectionLostError when it never will.
        """
        events = self._unread[request_id]
        if events:
            return events.popleft()
        self.raise_if_lost()
        return None

    def raise_if_lost(self) -> None:
        """Raises ConnectionLostError when nothing more will arrive."""
        if self._lost is not None:
            raise ConnectionLostError(self._lost)

    def cancel(self, job: str) -> None:
        """Ask for the end of a job; its `cancelled` event is still to come."""
        if not self.lost and job in self._jobs:
            # Nobody reads the answer to this request: the job's own last event tells the same.
            self._send(frame_of(Cancel(id=new_id(), job=job)))

    def close(self, request_id: str) -> None:
        """Forget a request: events that still come for it are dropped; a job is cancelled."""
        if request_id in self._unread:
            self.cancel(request_id)
            del self._unread[request_id]
            self._jobs.discard(request_id)

    def close_garbage(self, request_id: str) -> None:
        """`close` for finalisers: they may run in any thread, but the socket belongs to one."""
        self._garbage.append(request_id)
        if threading.get_ident() == self._thread:
            self._cancel_garbage()

    def take_in(self, frames: Iterable[bytes], disconnected: bool) -> Set[str]:
        """Sort what has arrived; the ids of requests that now have something to read."""
        fresh: set[str] = set()
        for frame in frames:
            self._heard, self._quiet_since, self._asked_at = True, time.monotonic(), None
            try:
                for event in decode_events(frame):
                    self._sort(event, fresh)
            except TpserveError as error:
                self.lose(error.message)
            if self.lost:
                break
        self._cancel_garbage()
        if disconnected:
            self.lose(self._silent("closed the connection"))
        elif self._unread and not self.lost:
            self._mind_the_silence()
        return self.awaited if self.lost else fresh

    def _sort(self, event: Event, fresh: set[str]) -> None:
        if event.v != PROTOCOL_VERSION:
            self.lose(
                f"the server at {self._address} speaks protocol version {event.v}, "
                f"this client {PROTOCOL_VERSION}: install matching versions"
            )
            return
        if isinstance(event, TERMINAL_EVENTS):
            self._jobs.discard(event.id)
        if event.id in self._unread:
            self._unread[event.id].append(event)
            fresh.add(event.id)

    def lose(self, reason: str) -> None:
        """Give the connection up: whoever waits for an event gets `reason` as an error."""
        if self._lost is None:
            self._lost = reason

    def cancel_all(self) -> None:
        """Cancel every job that has not ended."""
        for job in list(self._jobs):
            self.cancel(job)

    def _ask_health(self) -> None:
        self._send(frame_of(GetHealth(id=new_id())))
        self._asked_at = time.monotonic()

    def _deadline(self) -> float:
        if self._asked_at is None:
            return self._quiet_since + self._silence_s / 2
        return self._asked_at + (self._silence_s / 2 if self._heard else self._timeout_s)

    def _mind_the_silence(self) -> None:
        if time.monotonic() < self._deadline():
            return
        if self._asked_at is None:
            self._ask_health()
        else:
            self.lose(self._silent(f"has been silent for {self._silence_s:g} s"))

    def _silent(self, what: str) -> str:
        if self._heard:
            return f"the server at {self._address} {what}: did it stop or crash?"
        return (
            f"no tpserve server answers at {self._address} (waited up to {self._timeout_s:g} s): "
            "is the server running? ./launch.sh"
        )

    def _cancel_garbage(self) -> None:
        while self._garbage:
            self.close(self._garbage.popleft())
