"""Sessions from request to answer: calls of the database, and turns, whose job stands between two.

A turn stores what the user said, has the desk run an ordinary job, and stores the answer before its
client hears of the end. Belongs to the engine's thread; the database has its own.
"""

import select
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Connection

from coordinator import turns
from coordinator.desk import Desk
from coordinator.frontend import failed
from coordinator.job import Job
from coordinator.session_files import export_session, import_session
from coordinator.session_search import search
from coordinator.session_tree import NewMessage, Shelf
from coordinator.store import Store
from coordinator.stories import write_story
from coordinator.turns import BegunTurn
from shared.errors import SessionBusyError, SessionsOffError, TpserveError
from shared.messages import Done, Failed, Progress
from shared.protocol import Event
from shared.session_messages import (
    ConfigureSession,
    ContinueTurn,
    CreateSession,
    DeleteSession,
    EditTurn,
    ExportSession,
    GetSession,
    ImportSession,
    ListSessions,
    Redo,
    Regenerate,
    Rollback,
    SearchSessions,
    SelectBranch,
    SendTurn,
    SessionExported,
    SessionGone,
    SessionRequest,
    TurnRequest,
    TurnStored,
    Undo,
    WriteStory,
)

T = TypeVar("T")

_MAX_WAITING_TURNS = 16
"""Of one session."""
_REPORT_INTERVAL_S = 1.0
_CLOSE_TIMEOUT_S = 10.0
_CLOSE_TICK_S = 0.05


@dataclass(eq=False)
class _Turn:
    """One that has not ended."""

    client: bytes
    request: TurnRequest
    begun: BegunTurn | None = None
    """None: it waits, or the database has yet to store what the user said."""
    ended_early: Event | None = None
    """Its last event, when that came before it had begun."""

    @property
    def key(self) -> tuple[str, int]:
        """Under which it is kept."""
        return self.request.user, self.request.session


class SessionDesk:
    """See the module."""

    def __init__(self, store: Store | None, desk: Desk) -> None:
        """store: None when the server keeps no sessions."""
        self._store, self._desk = store, desk
        self._turns: dict[tuple[str, int], _Turn] = {}
        """By user and session; the database has yet to say whether it is that user's."""
        self._waiting: dict[tuple[str, int], deque[_Turn]] = {}
        """Turns that follow one of `_turns`, in order of arrival; empty ones are removed."""
        self._next_report = 0.0

    @property
    def wake_fd(self) -> int | None:
        """Becomes readable when `take_stored` has something to do."""
        return None if self._store is None else self._store.wake_fd

    def answer(self, client: bytes, request: SessionRequest) -> None:
        """Take a request. Raises SessionsOffError, SessionBusyError, QueueFullError, and for turns
        what the desk raises.
        """
        if self._store is None:
            raise SessionsOffError(
                "this server keeps no sessions: it was started with --database none, or its database "
                "could not be opened (see its log)"
            )
        self._store.refuse_if_full()
        match request:
            case SendTurn() | Regenerate() | EditTurn() | ContinueTurn():
                self._take(client, request)
            case ListSessions() | GetSession() | SearchSessions() | ExportSession():
                self._ask(client, request, _look_up, reads=True)
            case _:
                if not isinstance(request, CreateSession | ImportSession | ConfigureSession):
                    self._refuse_if_busy(request.user, request.session)
                self._ask(client, request, _change)

    def take_stored(self) -> None:
        """Go on with what the database has done."""
        if self._store is not None:
            for go_on in self._store.finished():
                go_on()

    def report_progress(self) -> None:
        """Once a second tell those whose turn waits for others of its session that all is well."""
        now = time.monotonic()
        if now < self._next_report:
            return
        self._next_report = now + _REPORT_INTERVAL_S
        for waiting in self._waiting.values():
            for before, turn in enumerate(waiting, start=1):
                event = Progress(id=turn.request.id, position=before, new_tokens=0)
                self._desk.publish(turn.client, event)

    def close(self) -> None:
        """Let what was begun be stored; clients are told. Their jobs have ended."""
        if self._store is None:
            return
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        while self._turns and (left_s := deadline - time.monotonic()) > 0:
            select.select([self._store.wake_fd], [], [], min(left_s, _CLOSE_TICK_S))
            self.take_stored()
        self._store.close(max(0.0, deadline - time.monotonic()))
        self.take_stored()

    def _ask(
        self,
        client: bytes,
        request: SessionRequest,
        work: Callable[[Shelf, SessionRequest], Event],
        reads: bool = False,
    ) -> None:
        def then(outcome: Event | TpserveError) -> None:
            if isinstance(outcome, TpserveError):
                self._desk.refuse(client, request.id, outcome)
            else:
                self._desk.publish(client, outcome)

        self._submit(request.user, lambda shelf: work(shelf, request), then, reads=reads)

    def _submit(
        self,
        user: str,
        work: Callable[[Shelf], T],
        then: Callable[[T | TpserveError], None],
        *,
        reads: bool = False,
    ) -> None:
        assert self._store is not None, "requests are refused without one"

        def in_store(connection: Connection) -> T:
            return work(Shelf(connection, user))

        self._store.submit(in_store, then, reads=reads)

    def _refuse_if_busy(self, user: str, session: int) -> None:
        if (user, session) in self._turns:
            raise SessionBusyError(
                f"an answer is being written in session {session}: wait for its end, or cancel it"
            )

    # --- turns ------------------------------------------------------------------------------------

    def _take(self, client: bytes, request: TurnRequest) -> None:
        """Begin a turn, or have it wait."""
        turn = _Turn(client, request)
        if not request.wait:
            self._refuse_if_busy(*turn.key)
        elif len(self._waiting.get(turn.key, ())) >= _MAX_WAITING_TURNS:
            raise SessionBusyError(
                f"{_MAX_WAITING_TURNS} turns wait in session {request.session} already, which is "
                "the limit: wait for the end of one, or cancel it"
            )
        self._desk.promise(client, request.id, lambda event, job: self._ended(turn, event, job))
        if turn.key in self._turns:
            self._waiting.setdefault(turn.key, deque()).append(turn)
        else:
            self._begin(turn)

    def _begin(self, turn: _Turn) -> None:
        request = turn.request
        self._turns[turn.key] = turn
        self._submit(
            request.user,
            lambda shelf: turns.begin(shelf, request),
            lambda outcome: self._begun(turn, outcome),
        )

    def _begun(self, turn: _Turn, outcome: BegunTurn | TpserveError) -> None:
        client, request = turn.client, turn.request
        if isinstance(outcome, TpserveError):
            self._desk.withdraw(client, request.id)
            if turn.ended_early is None:
                self._desk.refuse(client, request.id, outcome)
            else:
                self._desk.publish(client, turn.ended_early)
            self._go_on_after(turn)
            return
        turn.begun = outcome
        if turn.ended_early is not None:
            self._ended(turn, turn.ended_early, None)
            return
        try:
            self._desk.submit(client, outcome.job)
        except TpserveError as error:
            self._ended(turn, failed(request.id, error), None)

    def _ended(self, turn: _Turn, event: Event, job: Job | None) -> None:
        """The job's last event has come: store first, then pass it on."""
        begun = turn.begun
        if turn in self._waiting.get(turn.key, ()):
            self._leave(turn)
            self._desk.publish(turn.client, event)
            return
        if begun is None:
            turn.ended_early = event
            return
        answers = _answers(event, job)

        def store(shelf: Shelf) -> TurnStored:
            said = begun.user_message
            ids = turns.end(shelf, begun, answers) if answers else []
            if not answers and isinstance(event, Failed):
                turns.take_back(shelf, begun)
                said = None
            return TurnStored(id=event.id, session=begun.session, user_message=said, answers=ids)

        self._submit(turn.request.user, store, lambda outcome: self._stored(turn, event, outcome))

    def _stored(self, turn: _Turn, event: Event, outcome: TurnStored | TpserveError) -> None:
        if isinstance(outcome, TurnStored):
            self._desk.publish(turn.client, outcome)
            self._desk.publish(turn.client, event)
        else:
            message = f"the answer was not stored: {outcome.message}"
            code = event.code if isinstance(event, Failed) else outcome.code
            self._desk.publish(turn.client, Failed(id=event.id, code=code, message=message))
        self._go_on_after(turn)

    def _go_on_after(self, ended: _Turn) -> None:
        """The session's next turn, if one waits, has its turn."""
        del self._turns[ended.key]
        if ended.key in self._waiting:
            turn = self._waiting[ended.key][0]
            self._leave(turn)
            self._begin(turn)

    def _leave(self, turn: _Turn) -> None:
        """A turn waits no more."""
        waiting = self._waiting[turn.key]
        waiting.remove(turn)
        if not waiting:
            del self._waiting[turn.key]


def _answers(event: Event, job: Job | None) -> list[NewMessage]:
    """What there is of a job's answers, in order of index."""
    if job is None:
        return []
    done = event if isinstance(event, Done) else None
    return [
        NewMessage(
            role="assistant",
            content=sequence.text,
            prompt_tokens=job.prompt_tokens,
            completion_tokens=sequence.new_tokens,
            timings=done.timings if done is not None else None,
            model=job.model,
            finish_reason=sequence.finish_reason,
            partial=sequence.finish_reason is None,
        )
        for sequence in job.sequences
        if sequence.text or sequence.finish_reason is not None
    ]


def _look_up(shelf: Shelf, request: SessionRequest) -> Event:
    match request:
        case ListSessions():
            return shelf.page(request.id, request.limit, request.cursor)
        case SearchSessions():
            return search(shelf, request)
        case ExportSession():
            return SessionExported(id=request.id, data=export_session(shelf, request.session))
        case GetSession():
            return shelf.state(request.id, request.session)
    raise AssertionError(f"{request} changes something")


def _change(shelf: Shelf, request: SessionRequest) -> Event:
    match request:
        case CreateSession():
            return shelf.state(request.id, shelf.create(request))
        case ImportSession():
            return shelf.state(request.id, import_session(shelf, request.data))
        case DeleteSession():
            shelf.delete(request.session)
            return SessionGone(id=request.id, session=request.session)
        case ConfigureSession():
            shelf.configure(request)
        case Rollback():
            shelf.rollback(request.session, request.message)
        case SelectBranch():
            shelf.branch(request.session, request.message)
        case Undo():
            shelf.undo(request.session, 1)
        case Redo():
            shelf.undo(request.session, -1)
        case WriteStory():
            write_story(shelf, request)
        case _:
            raise AssertionError(f"{request} is a turn or changes nothing")
    return shelf.state(request.id, request.session)
