"""The coordinator's events as the objects that HTTP answers with, and requests from HTTP's bodies."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

from gateway.body import convert
from gateway.errors import ParameterError
from shared.messages import BaseRequest
from shared.protocol import Event
from shared.session_messages import TurnStored

R = TypeVar("R", bound=BaseRequest)

ENVELOPE = ("event", "id", "v")
"""Of an event: what only the way over ZeroMQ needs."""


def plain(event: Event) -> dict[str, Any]:
    """The fields of an event that answers a request."""
    content = named(event)
    del content["event"]
    return content


def named(event: Event) -> dict[str, Any]:
    """The same with its name as `event`, for a stream."""
    content: dict[str, Any] = msgspec.to_builtins(event)
    content.pop("id")
    content.pop("v", None)
    if isinstance(event, TurnStored):
        content["answer"] = event.answers[0] if event.answers else None
    return content


def request_from(
    kind: type[R],
    body: Mapping[str, Any],
    *,
    renamed: Mapping[str, str] = MappingProxyType({}),
    **ours: object,
) -> R:
    """A request whose fields a client has given, but for `ours`. Raises ParameterError.

    renamed: what bodies call a field, and what the request does.
    """
    for name in {"op", "v", *ours, *renamed.values()}.difference(renamed):
        if name in body:
            raise ParameterError(name, f"{name} is not known: leave it out")
    given = {renamed.get(name, name): value for name, value in body.items()}
    try:
        return convert({**given, "op": kind.__struct_config__.tag, **ours}, kind)
    except ParameterError as error:
        for name, ours_is in renamed.items():
            if error.param == ours_is:
                raise ParameterError(name, name + error.message.removeprefix(ours_is)) from None
        raise
