"""The OpenAPI document, made of the structs that requests are read into and answers are written from.

A route carries an `operation`, in which a Python type may stand for a schema; `document` puts the
operations of all routes together and replaces the types.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec
from msgspec import NODEFAULT, Struct
from starlette.routing import BaseRoute, Route

from gateway.errors import (
    BodyTimeoutError,
    BodyTooLargeError,
    ForbiddenOriginError,
    InvalidKeyError,
    MediaTypeError,
    UnsupportedParameterError,
)
from shared.errors import (
    ConnectionLostError,
    ContextLengthError,
    InvalidRequestError,
    JobKillsWorkersError,
    ModelNotFoundError,
    NotReadyError,
    QueueFullError,
    TpserveError,
    UnloadedError,
    WorkerLostError,
)

Errors = Collection[type[TpserveError]]
_ALWAYS: Errors = (InvalidRequestError, ForbiddenOriginError, QueueFullError, TpserveError)
_WITH_BODY: Errors = (MediaTypeError, BodyTooLargeError, BodyTimeoutError)
COORDINATOR: Errors = (ConnectionLostError,)
"""Of routes whose answer comes from there."""
JOB_ERRORS: Errors = (
    ConnectionLostError,
    ContextLengthError,
    JobKillsWorkersError,
    ModelNotFoundError,
    NotReadyError,
    UnloadedError,
    UnsupportedParameterError,
    WorkerLostError,
)
"""Of routes that have a model write."""


class ErrorDetail(Struct, frozen=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class Error(Struct, frozen=True):
    """The answer to whatever is refused or fails."""

    error: ErrorDetail


def operation(
    summary: str,
    *,
    answer: type | None,
    status: int = 200,
    streams: bool = False,
    events_only: bool = False,
    body: type | None = None,
    optional_body: bool = False,
    query: type[Struct] | None = None,
    path: Mapping[str, Any] | None = None,
    errors: Errors = COORDINATOR,
    needs_key: bool = True,
    unready: type[Struct] | None = None,
) -> dict[str, Any]:
    """What the document says of a route, as keyword arguments of its decorator.

    answer: None: text. streams: events come instead when `stream` asks for them;
    events_only: always. unready: what a 503
    answers with, if not an error.
    """
    content: dict[str, Any] = (
        {"text/plain": {"schema": str}}
        if answer is None
        else {"application/json": {"schema": answer}}
    )
    responses = {str(status): {"description": "The answer.", "content": content}}
    if streams or events_only:
        events: dict[str, Any] = {"text/event-stream": {}}
        told = {"description": "Server-Sent Events: see docs/http.md.", "content": events}
        if events_only:
            responses["200"] = told
        elif status == 200:
            content |= events
        else:
            responses["200"] = told
    possible = [*_ALWAYS, *errors]
    told_of: dict[str, Any] = {"summary": summary, "responses": responses}
    if body is not None:
        possible += _WITH_BODY
        told_of["requestBody"] = {
            "required": not optional_body,
            "content": {"application/json": {"schema": body}},
        }
    if needs_key:
        possible.append(InvalidKeyError)
    else:
        told_of["security"] = []
    responses |= _error_responses(possible)
    if unready is not None:
        answer_then = {"application/json": {"schema": unready}}
        responses["503"] = {"description": "Not now.", "content": answer_then}
    parameters = [_parameter("path", name, kind) for name, kind in (path or {}).items()]
    for field in msgspec.structs.fields(query) if query is not None else ():
        parameters.append(_parameter("query", field.encode_name, field.type, field.required))
    if parameters:
        told_of["parameters"] = parameters
    return {"openapi_extra": told_of}


def trimmed(
    kind: type[Struct],
    name: str,
    without: Collection[str],
    *,
    renamed: Mapping[str, str] = MappingProxyType({}),
    **defaults: object,
) -> type[Struct]:
    """A struct of the same fields but for some, to be described; `defaults` change theirs."""
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for field in msgspec.structs.fields(kind):
        if field.name in without:
            continue
        called = renamed.get(field.name, field.name)
        if field.name in defaults:
            fields.append((called, field.type, defaults[field.name]))
        elif field.default_factory is not NODEFAULT:
            given = msgspec.field(default_factory=field.default_factory)
            fields.append((called, field.type, given))
        elif field.default is not NODEFAULT:
            fields.append((called, field.type, field.default))
        else:
            fields.append((called, field.type))
    return msgspec.defstruct(
        name,
        fields,
        namespace={"__doc__": kind.__doc__},
        module=kind.__module__,
        kw_only=True,
        forbid_unknown_fields=kind.__struct_config__.forbid_unknown_fields,
    )


def document(routes: Iterable[BaseRoute], version: str, *, has_keys: bool) -> dict[str, Any]:
    """The whole document, without Python types."""
    paths: dict[str, Any] = {}
    for route in routes:
        extra = getattr(route, "openapi_extra", None)
        if extra is not None and isinstance(route, Route):
            path = re.sub(r":\w+}", "}", route.path)
            for method in route.methods or ():
                paths.setdefault(path, {})[method.lower()] = extra
    types = list(_types(paths))
    schemas, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    found: dict[str, Any] = {"schemas": components}
    whole: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "tpserve", "version": version},
        "paths": _resolved(paths, iter(schemas)),
        "components": found,
    }
    if has_keys:
        found["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        whole["security"] = [{"key": []}]
    return whole


def _parameter(where: str, name: str, kind: Any, required: bool = True) -> dict[str, Any]:
    return {"in": where, "name": name, "required": required, "schema": kind}


def _error_responses(errors: Errors) -> dict[str, Any]:
    codes: dict[int, set[str]] = {}
    for error in errors:
        codes.setdefault(error.http_status, set()).add(error.code)
    return {
        str(status): {
            "description": "The code is " + " or ".join(sorted(codes[status])) + ".",
            "content": {"application/json": {"schema": Error}},
        }
        for status in sorted(codes)
    }


def _types(tree: Any) -> Iterable[Any]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "schema":
                yield value
            else:
                yield from _types(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _types(value)


def _resolved(tree: Any, schemas: Iterable[dict[str, Any]]) -> Any:
    """The tree with the next one of `schemas` in place of each type, in the order of `_types`."""
    remaining = iter(schemas)
    if isinstance(tree, dict):
        return {
            key: next(remaining) if key == "schema" else _resolved(value, remaining)
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [_resolved(value, remaining) for value in tree]
    return tree
