"""What all routes share."""

import time
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request

from client.zmq_client import AsyncClient
from gateway.event_stream import unless_gone
from gateway.metrics import Metrics
from gateway.settings import HttpSettings
from shared.protocol import Event
from shared.protocol import Request as Question

E = TypeVar("E", bound=Event)

NO_KEYS_USER = "local"
"""Who everybody is when the gateway has no keys; clients over ZeroMQ are the same one."""


@dataclass(frozen=True)
class Gateway:
    """The way to the coordinator, and what is counted on it."""

    settings: HttpSettings
    client: AsyncClient
    metrics: Metrics
    started_at: int = field(default_factory=lambda: int(time.time()))
    """Unix time; what `/v1/models` gives as the creation of every model."""


def request_id(request: Request) -> str:
    """The id by which the logs of gateway and coordinator know this request."""
    given: str = request.state.request_id
    return given


def once(request: Request) -> str:
    """An id for the coordinator, which wants no two requests with the same one at a time."""
    return f"{request_id(request)}-{id(request):x}"


def user(request: Request) -> str:
    """Whose sessions and jobs a request is about: the name of its key, "local" without keys."""
    return getattr(request.state, "user", NO_KEYS_USER)


def owned(request: Request) -> dict[str, Any]:
    """What the coordinator is told of any request about what it keeps for a user."""
    return {"id": once(request), "user": user(request)}


def note(request: Request, **fields: object) -> None:
    """Add to the line that the log gets when the request has ended."""
    request.state.log_fields.update(fields)


async def ask(gateway: Gateway, request: Request, question: Question, answer: type[E]) -> E:
    """The coordinator's one answer, for as long as the HTTP client is there to have it."""
    return await unless_gone(request.receive, gateway.client.ask(question, answer))
