"""The answer to one story, chat or turn request while it arrives: text, events, the final result."""

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import aclosing, closing
from types import TracebackType
from typing import Self

from client.connection import AsyncConnection, Connection
from client.errors import JobCancelledError, expect
from client.exchange import Exchange
from shared.job_messages import FollowJob
from shared.messages import Cancelled, Done, Failed, Token
from shared.protocol import Event, JobRequest
from shared.session_messages import TurnStored


class _Answer:
    """One job as far as its events have been read. Sends, but never waits."""

    def __init__(self, exchange: Exchange, request: JobRequest) -> None:
        self._exchange = exchange
        self._closed = False
        self.id = request.id
        """The request's id; logs of the server name the job by it."""
        self.text = ""
        """What has been generated, without the prompt."""
        self.token_ids: list[int] = []
        self.end: Done | Failed | Cancelled | None = None
        """The job's last event, once it is read."""
        self.stored: TurnStored | None = None
        """Of a turn: what its session has got by it, once `end` is there."""
        self._whole = not isinstance(request, FollowJob) and not request.stream
        exchange.open(request)

    def cancel(self) -> None:
        """End the job early; what was generated until then still arrives.

        Does not wait. May be called from a signal handler of the thread that reads the stream.
        """
        self._exchange.cancel(self.id)

    def close(self) -> None:
        """Read no more. A job that has not ended is cancelled."""
        self._closed = True
        self._exchange.close(self.id)

    def __del__(self) -> None:
        self._exchange.close_garbage(self.id)

    def _read(self, event: Event) -> str:
        """Take note of an event and return the text that it adds. Raises what `failed` says."""
        if isinstance(event, Token):
            if event.index:
                return ""  # of another answer than the first: see `events`
            self.text += event.text
            self.token_ids += event.token_ids
            return event.text
        if isinstance(event, Done | Cancelled):
            # An answer that is not streamed comes whole, with its last event.
            added = event.text if self._whole else ""
            self.text, self.token_ids, self.end = event.text, event.token_ids, event
            return added
        if isinstance(event, TurnStored):
            self.stored = event
        if isinstance(event, Failed):
            self.end = event
            expect(event, Done)
        return ""

    @property
    def _unfinished(self) -> bool:
        return self.end is None and not self._closed

    def _result(self) -> Done:
        if isinstance(self.end, Done | Failed):
            return expect(self.end, Done)
        if self.end is None:
            self._exchange.raise_if_lost()
        raise JobCancelledError(self.text, self.token_ids)


class Stream(_Answer):
    """Iterate over it for the pieces of text as they come; leaving the loop early cancels the job.

    With n > 1 these are the first answer's; `events` has all of them, and so has the result.

    Any wait raises the error that ended the job, or ConnectionLostError. A cancelled job just ends
    the iteration.
    """

    def __init__(self, connection: Connection, request: JobRequest) -> None:
        self._connection = connection
        super().__init__(connection.exchange, request)

    def __iter__(self) -> Iterator[str]:
        with closing(self._steps()) as steps:
            for _, text in steps:
                if text:
                    yield text

    def events(self) -> Iterator[Event]:
        """The job's events, from the first unread one to the last."""
        with closing(self._steps()) as steps:
            for event, _ in steps:
                yield event

    def result(self) -> Done:
        """Wait for the end. Raises JobCancelledError when the job was cancelled."""
        for _ in self._steps():
            pass
        return self._result()

    def _steps(self) -> Generator[tuple[Event, str], None, None]:
        try:
            while self._unfinished:
                event = self._connection.next_event(self.id)
                yield event, self._read(event)
        finally:
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncStream(_Answer):
    """`Stream` for `async for`, in the event loop that its client was used in first."""

    def __init__(self, connection: AsyncConnection, request: JobRequest) -> None:
        self._connection = connection
        super().__init__(connection.exchange, request)

    async def __aiter__(self) -> AsyncIterator[str]:
        async with aclosing(self._steps()) as steps:
            async for _, text in steps:
                if text:
                    yield text

    async def events(self) -> AsyncIterator[Event]:
        """The job's events, from the first unread one to the last."""
        async with aclosing(self._steps()) as steps:
            async for event, _ in steps:
                yield event

    async def result(self) -> Done:
        """Wait for the end. Raises JobCancelledError when the job was cancelled."""
        async for _ in self._steps():
            pass
        return self._result()

    async def _steps(self) -> AsyncGenerator[tuple[Event, str], None]:
        try:
            while self._unfinished:
                event = await self._connection.next_event(self.id)
                yield event, self._read(event)
        finally:
            self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
