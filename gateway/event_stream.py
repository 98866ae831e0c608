"""Server-Sent Events: sends what comes as it comes, and gives up clients that do not read.

What waits for a client is bounded: a client that takes nothing for some seconds, or lets too much
pile up, is cut off. So is a job whose client has gone.
"""

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Literal, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gateway.errors import error_body
from shared.errors import SlowReaderError, TpserveError

log = logging.getLogger("gateway.event_stream")

MAX_UNSENT_BYTES = 1 << 20
"""That may wait for one client in this process."""
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
Outcome = Literal["done", "failed", "client_gone", "slow_reader", "stopped"]

_DROP_UNSENT = struct.pack("ii", 1, 0)
"""For SO_LINGER: on, for 0 s."""

T = TypeVar("T")


def data(content: Any) -> bytes:
    """One event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


async def client_gone(receive: Receive) -> None:
    """Wait until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Wait for `work`, but end it when the client goes. Raises ClientDisconnect, and what it raises."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(client_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _end(task, gone)


class EventStream(Response):
    """A response of events, with pings while none come; an error in their midst becomes an event."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        ping_s: float,
        slow_reader_s: float,
        on_end: Callable[[Outcome], None],
    ) -> None:
        super().__init__(
            media_type="text/event-stream",
            # Proxies must not wait for the end; nginx looks at the second one.
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        del self.headers["content-length"]
        self._events = events
        self._ping_s, self._slow_reader_s = ping_s, slow_reader_s
        self._on_end = on_end
        self._outcome: Outcome = "done"
        self._unsent = bytearray()
        self._ended = False
        self._changed = asyncio.Event()
        self._busy = False
        """Whether the connection is taking a piece."""
        self._turned = 0.0
        """When it began to, or had taken the last one; in the loop's time."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; returns early, with the connection cut, for a client that cannot follow."""
        self._turned = asyncio.get_running_loop().time()
        tasks = {
            asyncio.create_task(self._collect()),
            asyncio.create_task(self._send_all(send)),
        }
        gone = asyncio.create_task(client_gone(receive))
        try:
            while tasks and not gone.done():
                done, _ = await asyncio.wait(
                    {*tasks, gone}, timeout=self._mind(), return_when=asyncio.FIRST_COMPLETED
                )
                for task in done & tasks:
                    task.result()
                tasks -= done
            if tasks:
                self._outcome = "client_gone"
        except SlowReaderError as error:
            self._outcome = "slow_reader"
            log.warning("a client was cut off: %s", error.message)
            _reset(scope["state"]["transport"])
        except asyncio.CancelledError:
            self._outcome = "stopped"
            raise
        finally:
            await _end(*tasks, gone)
            await self._events.aclose()
            self._on_end(self._outcome)

    async def _collect(self) -> None:
        try:
            async for event in self._events:
                self._unsent += event
                self._changed.set()
                if len(self._unsent) > MAX_UNSENT_BYTES:
                    raise SlowReaderError(f"{len(self._unsent)} bytes wait for it")
        except SlowReaderError:
            raise
        except TpserveError as error:
            self._outcome = "failed"
            self._unsent += data(error_body(error))
        self._ended = True
        self._changed.set()

    async def _send_all(self, send: Send) -> None:
        start: Message = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await self._send(send, start)
        while self._unsent or not self._ended:
            if not self._unsent:
                self._changed.clear()
                await self._changed.wait()
                continue
            piece = bytes(self._unsent)
            self._unsent.clear()
            await self._send(send, {"type": "http.response.body", "body": piece, "more_body": True})
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: Message) -> None:
        now = asyncio.get_running_loop().time
        self._busy, self._turned = True, now()
        await send(message)
        self._busy, self._turned = False, now()

    def _mind(self) -> float:
        """Ping a client that gets nothing; in how many seconds to look again.

        Raises SlowReaderError for one that takes nothing. A look now and then spares every event a
        timer of its own.
        """
        waited = asyncio.get_running_loop().time() - self._turned
        if self._busy:
            if waited >= self._slow_reader_s:
                raise SlowReaderError(f"it has read nothing for {self._slow_reader_s:g} s")
            return self._slow_reader_s - waited
        if waited >= self._ping_s:
            self._unsent += PING
            self._changed.set()
            waited = 0.0
        return min(self._ping_s - waited, self._slow_reader_s)


async def _end(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel what still runs and wait until it has stopped."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _reset(transport: asyncio.Transport) -> None:
    """Cut the connection off so that the kernel does not go on sending to who does not read."""
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _DROP_UNSENT)
    transport.abort()
