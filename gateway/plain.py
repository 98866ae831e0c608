"""The coordinator's events as the objects that HTTP answers with, and requests from HTTP's bodies."""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from gateway.body import convert
from gateway.errors import ParameterError
from shared.messages import BaseRequest
from shared.protocol import Event

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
    return content


def request_from(kind: type[R], body: Mapping[str, Any], **ours: object) -> R:
    """A request whose fields a client has given, but for `ours`. Raises ParameterError."""
    for name in ("op", "v", *ours):
        if name in body:
            raise ParameterError(name, f"{name} is not known: leave it out")
    return convert({**body, "op": kind.__struct_config__.tag, **ours}, kind)
