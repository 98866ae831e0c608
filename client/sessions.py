"""Conversations and stories that the server keeps: the part of both clients that is about them."""

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar, Unpack

from msgspec import UNSET, UnsetType

from client.requests import SamplingOptions, new_id
from client.streams import AsyncStream, Stream
from client.turns import Turns
from shared.messages import Kind, SamplingParams
from shared.protocol import Event, JobRequest, Request
from shared.session_messages import (
    ConfigureSession,
    CreateSession,
    DeleteSession,
    ExportSession,
    GetSession,
    ImportSession,
    ListSessions,
    Redo,
    Rollback,
    SearchSessions,
    SelectBranch,
    SessionExport,
    SessionExported,
    SessionGone,
    SessionHit,
    SessionHits,
    SessionState,
    Undo,
    WriteStory,
)
from shared.session_messages import Sessions as Page

E = TypeVar("E", bound=Event)


class Ask(Protocol):
    """Of the client that waits."""

    def __call__(self, request: Request, answer: type[E]) -> E:
        """Send a request and wait for its one answer."""


class AsyncAsk(Protocol):
    """Of the one in an event loop."""

    def __call__(self, request: Request, answer: type[E]) -> Awaitable[E]:
        """Send a request and wait for its one answer."""


def _create(
    kind: Kind, title: str, model: str | None, system: str | None, options: SamplingOptions
) -> CreateSession:
    params = SamplingParams(**options)
    return CreateSession(
        id=new_id(), kind=kind, title=title, model=model, system=system, params=params
    )


class Sessions(Turns[Stream]):
    """`Client.sessions`: conversations and stories that the server keeps.

    Every method may raise what `Client` raises, SessionNotFoundError, SessionBusyError,
    DatabaseError, and SessionsOffError when the server keeps none. While a turn is under way,
    another one is refused unless it is told to `wait`; then it follows in order of arrival.
    """

    def __init__(self, ask: Ask, start: Callable[[JobRequest], Stream]) -> None:
        super().__init__(start)
        self._ask = ask

    def create(
        self,
        kind: Kind = "chat",
        *,
        title: str = "",
        model: str | None = None,
        system: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> SessionState:
        """Start a session; `options` are those of its turns that bring none of their own."""
        return self._ask(_create(kind, title, model, system, options), SessionState)

    def page(self, limit: int = 50, cursor: str | None = None) -> Page:
        """The sessions changed last, or those after the page that came with `cursor`."""
        return self._ask(ListSessions(id=new_id(), limit=limit, cursor=cursor), Page)

    def get(self, session: int) -> SessionState:
        """A session and its selected path."""
        return self._ask(GetSession(id=new_id(), session=session), SessionState)

    def rename(self, session: int, title: str) -> SessionState:
        """Give it another title."""
        return self.configure(session, title=title)

    def configure(
        self,
        session: int,
        *,
        title: str | UnsetType = UNSET,
        model: str | UnsetType | None = UNSET,
        system: str | UnsetType | None = UNSET,
        params: SamplingParams | UnsetType = UNSET,
    ) -> SessionState:
        """Change what is set of it, from the next turn on; what is left out stays.

        None: the server's choice of a model, no system prompt.
        """
        request = ConfigureSession(
            id=new_id(), session=session, title=title, model=model, system=system, params=params
        )
        return self._ask(request, SessionState)

    def delete(self, session: int) -> None:
        """Delete it with all messages."""
        self._ask(DeleteSession(id=new_id(), session=session), SessionGone)

    def search(self, text: str, limit: int = 50) -> list[SessionHit]:
        """Where all words of `text` occur together, in messages and titles, the newest first."""
        return self._ask(SearchSessions(id=new_id(), text=text, limit=limit), SessionHits).hits

    def export(self, session: int) -> SessionExport:
        """All of a session."""
        return self._ask(ExportSession(id=new_id(), session=session), SessionExported).data

    def import_(self, data: SessionExport) -> SessionState:
        """Make a session of an exported one."""
        return self._ask(ImportSession(id=new_id(), data=data), SessionState)

    def rollback(self, session: int, message: int | None) -> SessionState:
        """Go back to a message, None: to before the first one. Nothing is deleted."""
        return self._ask(Rollback(id=new_id(), session=session, message=message), SessionState)

    def branch(self, session: int, message: int) -> SessionState:
        """Select a message, for instance another sibling, and what was selected last after it."""
        return self._ask(SelectBranch(id=new_id(), session=session, message=message), SessionState)

    def undo(self, session: int) -> SessionState:
        """Select the path that was selected before."""
        return self._ask(Undo(id=new_id(), session=session), SessionState)

    def redo(self, session: int) -> SessionState:
        """Take an undo back."""
        return self._ask(Redo(id=new_id(), session=session), SessionState)

    def write(self, session: int, text: str) -> SessionState:
        """Make a story's whole text `text`; what it begins with of the old one stays as it is."""
        return self._ask(WriteStory(id=new_id(), session=session, text=text), SessionState)


class AsyncSessions(Turns[AsyncStream]):
    """`Sessions` for an event loop; turns are called without await, they do not wait.

    Raises what `Sessions` raises.
    """

    def __init__(self, ask: AsyncAsk, start: Callable[[JobRequest], AsyncStream]) -> None:
        super().__init__(start)
        self._ask = ask

    async def create(
        self,
        kind: Kind = "chat",
        *,
        title: str = "",
        model: str | None = None,
        system: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> SessionState:
        """Start a session; `options` are those of its turns that bring none of their own."""
        return await self._ask(_create(kind, title, model, system, options), SessionState)

    async def page(self, limit: int = 50, cursor: str | None = None) -> Page:
        """The sessions changed last, or those after the page that came with `cursor`."""
        return await self._ask(ListSessions(id=new_id(), limit=limit, cursor=cursor), Page)

    async def get(self, session: int) -> SessionState:
        """A session and its selected path."""
        return await self._ask(GetSession(id=new_id(), session=session), SessionState)

    async def rename(self, session: int, title: str) -> SessionState:
        """Give it another title."""
        return await self.configure(session, title=title)

    async def configure(
        self,
        session: int,
        *,
        title: str | UnsetType = UNSET,
        model: str | UnsetType | None = UNSET,
        system: str | UnsetType | None = UNSET,
        params: SamplingParams | UnsetType = UNSET,
    ) -> SessionState:
        """Change what is set of it, from the next turn on; what is left out stays.

        None: the server's choice of a model, no system prompt.
        """
        request = ConfigureSession(
            id=new_id(), session=session, title=title, model=model, system=system, params=params
        )
        return await self._ask(request, SessionState)

    async def delete(self, session: int) -> None:
        """Delete it with all messages."""
        await self._ask(DeleteSession(id=new_id(), session=session), SessionGone)

    async def search(self, text: str, limit: int = 50) -> list[SessionHit]:
        """Where all words of `text` occur together, in messages and titles, the newest first."""
        return (
            await self._ask(SearchSessions(id=new_id(), text=text, limit=limit), SessionHits)
        ).hits

    async def export(self, session: int) -> SessionExport:
        """All of a session."""
        return (await self._ask(ExportSession(id=new_id(), session=session), SessionExported)).data

    async def import_(self, data: SessionExport) -> SessionState:
        """Make a session of an exported one."""
        return await self._ask(ImportSession(id=new_id(), data=data), SessionState)

    async def rollback(self, session: int, message: int | None) -> SessionState:
        """Go back to a message, None: to before the first one. Nothing is deleted."""
        return await self._ask(
            Rollback(id=new_id(), session=session, message=message), SessionState
        )

    async def branch(self, session: int, message: int) -> SessionState:
        """Select a message, for instance another sibling, and what was selected last after it."""
        return await self._ask(
            SelectBranch(id=new_id(), session=session, message=message), SessionState
        )

    async def undo(self, session: int) -> SessionState:
        """Select the path that was selected before."""
        return await self._ask(Undo(id=new_id(), session=session), SessionState)

    async def redo(self, session: int) -> SessionState:
        """Take an undo back."""
        return await self._ask(Redo(id=new_id(), session=session), SessionState)

    async def write(self, session: int, text: str) -> SessionState:
        """Make a story's whole text `text`; what it begins with of the old one stays as it is."""
        return await self._ask(WriteStory(id=new_id(), session=session, text=text), SessionState)
