"""Turns of sessions: what is answered by a stream, the same in both clients."""

from collections.abc import Callable
from typing import Generic, TypeVar, Unpack

from client.requests import SamplingOptions, new_id
from client.streams import AsyncStream, Stream
from shared.messages import SamplingParams
from shared.protocol import JobRequest
from shared.session_messages import ContinueTurn, EditTurn, Regenerate, SendTurn

S = TypeVar("S", bound=Stream | AsyncStream)


def _params(options: SamplingOptions) -> SamplingParams | None:
    """None: the session's own."""
    return SamplingParams(**options) if options else None


class Turns(Generic[S]):
    """Called without await in an event loop, too: they only send."""

    def __init__(self, start: Callable[[JobRequest], S]) -> None:
        self._start = start

    def send(
        self,
        session: int,
        text: str = "",
        *,
        stream: bool = True,
        wait: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> S:
        """Say something and have it answered; in a story, write a piece and have it continued."""
        request = SendTurn(
            id=new_id(),
            session=session,
            text=text,
            stream=stream,
            wait=wait,
            params=_params(options),
        )
        return self._start(request)

    def regenerate(
        self,
        session: int,
        message: int | None = None,
        *,
        stream: bool = True,
        wait: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> S:
        """Another answer beside `message`, or after it if it is the user's. None: the last one."""
        request = Regenerate(
            id=new_id(),
            session=session,
            message=message,
            stream=stream,
            wait=wait,
            params=_params(options),
        )
        return self._start(request)

    def edit(
        self,
        session: int,
        message: int,
        text: str,
        *,
        stream: bool = True,
        wait: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> S:
        """Put `text` beside one of the user's messages and have it answered."""
        request = EditTurn(
            id=new_id(),
            session=session,
            message=message,
            text=text,
            stream=stream,
            wait=wait,
            params=_params(options),
        )
        return self._start(request)

    def go_on(
        self,
        session: int,
        *,
        stream: bool = True,
        wait: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> S:
        """Write on at the last answer, which was cut short; the stream has only what is new."""
        request = ContinueTurn(
            id=new_id(), session=session, stream=stream, wait=wait, params=_params(options)
        )
        return self._start(request)
