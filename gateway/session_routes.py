"""The routes of sessions: conversations and stories that the server keeps, and their turns."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter
from msgspec import Meta, Struct
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response

from client.zmq_client import AsyncStream
from gateway.body import read_object, read_query
from gateway.context import Gateway, ask, note, once, owned, user
from gateway.errors import json_response
from gateway.event_stream import DONE, EventStream, data, unless_gone
from gateway.jobs import JobEvent, accepted, results
from gateway.openapi import COORDINATOR, JOB_ERRORS, operation
from gateway.openapi_types import answer_of, body_of
from gateway.plain import named, plain, request_from
from shared.errors import (
    DatabaseError,
    SessionBusyError,
    SessionNotFoundError,
    SessionsOffError,
    TpserveError,
)
from shared.messages import Done, Started
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
    SessionExport,
    SessionExported,
    SessionGone,
    SessionHits,
    Sessions,
    SessionState,
    StoredId,
    TurnRequest,
    TurnStored,
    Undo,
    WriteStory,
)

Route = Callable[[Request, int], Awaitable[Response]]

CHANGES: Mapping[str, type[Rollback | SelectBranch | Undo | Redo]] = {
    "rollback": Rollback,
    "branch": SelectBranch,
    "undo": Undo,
    "redo": Redo,
}
TURNS: Mapping[str, type[TurnRequest]] = {
    "send": SendTurn,
    "regenerate": Regenerate,
    "edit": EditTurn,
    "continue": ContinueTurn,
}

STATE = answer_of(SessionState, "SessionStateBody")
PATH = {"session": StoredId}
ERRORS = (*COORDINATOR, DatabaseError, SessionsOffError)
ABOUT_ONE = (*ERRORS, SessionNotFoundError, SessionBusyError)
STORED = msgspec.defstruct(
    "StoredTurn", [("answer", int | None)], bases=(answer_of(TurnStored, "Stored"),), kw_only=True
)
TURN = msgspec.defstruct(
    "EndedTurn",
    [
        ("stored", STORED),
        ("result", answer_of(Done, "TurnResult")),
    ],
)


class PageQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which sessions to list."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 50
    cursor: Annotated[str, Meta(max_length=64)] | None = None


class SearchQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """What to look for."""

    query: Annotated[str, Meta(min_length=1, max_length=256)]
    limit: Annotated[int, Meta(ge=1, le=1000)] = 50


class _IdConvertor(Convertor[int]):
    regex = "[0-9]{1,19}"

    def convert(self, value: str) -> int:
        return int(value)

    def to_string(self, value: int) -> str:
        return str(value)


# So that the other paths below /api/sessions are no sessions.
register_url_convertor("stored_id", _IdConvertor())


def session_routes(gateway: Gateway) -> APIRouter:
    """Everything under /api/sessions."""
    router = APIRouter(prefix="/api/sessions")

    @router.get(
        "",
        **operation(
            "Sessions, those changed last first",
            query=PageQuery,
            answer=answer_of(Sessions, "SessionPage"),
            errors=ERRORS,
        ),
    )
    async def sessions(request: Request) -> Response:
        wanted = read_query(request, PageQuery)
        question = ListSessions(
            id=once(request), user=user(request), limit=wanted.limit, cursor=wanted.cursor
        )
        return json_response(plain(await ask(gateway, request, question, Sessions)))

    @router.post(
        "",
        **operation(
            "Start a session",
            body=body_of(CreateSession, "CreateSessionBody"),
            answer=STATE,
            status=201,
            errors=ERRORS,
        ),
    )
    async def create(request: Request) -> Response:
        wanted = request_from(CreateSession, await _body(gateway, request), **owned(request))
        return json_response(plain(await ask(gateway, request, wanted, SessionState)), 201)

    @router.get(
        "/search",
        **operation(
            "Where all words occur together",
            query=SearchQuery,
            answer=answer_of(SessionHits, "SearchResult"),
            errors=ERRORS,
        ),
    )
    async def search(request: Request) -> Response:
        wanted = read_query(request, SearchQuery)
        question = SearchSessions(
            id=once(request), user=user(request), text=wanted.query, limit=wanted.limit
        )
        return json_response(plain(await ask(gateway, request, question, SessionHits)))

    @router.post(
        "/import",
        **operation(
            "Make a session of an exported one",
            body=SessionExport,
            answer=STATE,
            status=201,
            errors=ERRORS,
        ),
    )
    async def import_(request: Request) -> Response:
        exported = await _body(gateway, request)
        wanted = request_from(ImportSession, {"data": exported}, **owned(request))
        return json_response(plain(await ask(gateway, request, wanted, SessionState)), 201)

    @router.get(
        "/{session:stored_id}",
        **operation("A session and its selected path", path=PATH, answer=STATE, errors=ABOUT_ONE),
    )
    async def get(request: Request, session: int) -> Response:
        wanted = request_from(GetSession, {}, session=session, **owned(request))
        return json_response(plain(await ask(gateway, request, wanted, SessionState)))

    @router.delete(
        "/{session:stored_id}",
        **operation(
            "Delete a session",
            path=PATH,
            answer=answer_of(SessionGone, "DeletedSession"),
            errors=ABOUT_ONE,
        ),
    )
    async def delete(request: Request, session: int) -> Response:
        wanted = request_from(DeleteSession, {}, session=session, **owned(request))
        return json_response(plain(await ask(gateway, request, wanted, SessionGone)))

    @router.patch(
        "/{session:stored_id}",
        **operation(
            "Change a session's title, model, system or params",
            path=PATH,
            body=body_of(ConfigureSession, "ConfigureSessionBody"),
            answer=STATE,
            errors=ABOUT_ONE,
        ),
    )
    async def configure(request: Request, session: int) -> Response:
        body = await _body(gateway, request)
        wanted = request_from(ConfigureSession, body, session=session, **owned(request))
        return json_response(plain(await ask(gateway, request, wanted, SessionState)))

    @router.put(
        "/{session:stored_id}/text",
        **operation(
            "Make a story's whole text another one",
            path=PATH,
            body=body_of(WriteStory, "WriteStoryBody"),
            answer=STATE,
            errors=ABOUT_ONE,
        ),
    )
    async def write(request: Request, session: int) -> Response:
        body = await _body(gateway, request)
        wanted = request_from(WriteStory, body, session=session, **owned(request))
        return json_response(plain(await ask(gateway, request, wanted, SessionState)))

    @router.get(
        "/{session:stored_id}/export",
        **operation("All of a session", path=PATH, answer=SessionExport, errors=ABOUT_ONE),
    )
    async def export(request: Request, session: int) -> Response:
        wanted = request_from(ExportSession, {}, session=session, **owned(request))
        return json_response((await ask(gateway, request, wanted, SessionExported)).data)

    for name, change in CHANGES.items():
        router.add_api_route(
            f"/{{session:stored_id}}/{name}",
            _changing(gateway, change),
            methods=["POST"],
            **operation(
                change.__doc__ or "",
                path=PATH,
                body=body_of(change, f"{change.__name__}Body"),
                optional_body=True,
                answer=STATE,
                errors=ABOUT_ONE,
            ),
        )
    for name, turn in TURNS.items():
        router.add_api_route(
            f"/{{session:stored_id}}/{name}",
            _taking(gateway, turn),
            methods=["POST"],
            **operation(
                turn.__doc__ or "",
                path=PATH,
                body=body_of(turn, f"{turn.__name__}Body", stream=False),
                optional_body=True,
                answer=TURN,
                streams=True,
                errors=(*ABOUT_ONE, *JOB_ERRORS),
            ),
        )
    return router


def _changing(gateway: Gateway, kind: type[Rollback | SelectBranch | Undo | Redo]) -> Route:
    async def change(request: Request, session: int) -> Response:
        body = await _body(gateway, request, optional=True)
        wanted = request_from(kind, body, session=session, **owned(request))
        return json_response(plain(await ask(gateway, request, wanted, SessionState)))

    return change


def _taking(gateway: Gateway, kind: type[TurnRequest]) -> Route:
    async def take_turn(request: Request, session: int) -> Response:
        # Unlike over ZeroMQ, an answer is whole unless a stream is asked for.
        body = {"stream": False, **await _body(gateway, request, optional=True)}
        wanted = request_from(kind, body, session=session, **owned(request))
        note(request, session=wanted.session)
        stream = gateway.client.start(wanted)
        if not wanted.stream:
            return json_response(await _whole_turn(gateway, request, stream))
        events = await unless_gone(request.receive, accepted([stream]))
        return EventStream(
            _turn_events(gateway, request, events),
            ping_s=gateway.settings.ping,
            slow_reader_s=gateway.settings.slow_reader,
            on_end=gateway.metrics.stream_ended,
        )

    return take_turn


async def _whole_turn(gateway: Gateway, request: Request, stream: AsyncStream) -> dict[str, Any]:
    (done,) = await unless_gone(request.receive, results([stream]))
    gateway.metrics.job_done(done)
    note(request, model=done.model)
    if stream.stored is None:
        raise TpserveError("the coordinator has not said what it stored of the turn")
    return {"stored": plain(stream.stored), "result": plain(done)}


async def _turn_events(
    gateway: Gateway, request: Request, events: AsyncGenerator[JobEvent, None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for _, event in events:
            if isinstance(event, Started):
                note(request, model=event.model)
            if isinstance(event, Done):
                gateway.metrics.job_done(event)
            yield data(named(event))
    yield DONE


async def _body(gateway: Gateway, request: Request, *, optional: bool = False) -> dict[str, Any]:
    limits = gateway.settings
    return await read_object(request, limits.max_body_bytes, limits.body_timeout, optional=optional)
