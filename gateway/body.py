"""Reads the body of a request within its limits, and turns JSON into checked types."""

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from gateway.errors import BodyTimeoutError, BodyTooLargeError, MediaTypeError, ParameterError
from shared.errors import InvalidRequestError

T = TypeVar("T")
_UNTOLD = {"content-type", "transfer-encoding"}
"""Headers that a request without a body does not have."""
_SHOWN_CHARACTERS = 80
"""Of a value that is refused."""


async def read_object(
    request: Request, max_bytes: int, timeout_s: float, *, optional: bool = False
) -> dict[str, Any]:
    """The body as a JSON object; with `optional`, no body at all is an empty one.

    Raises MediaTypeError, BodyTooLargeError, BodyTimeoutError, InvalidRequestError, and
    ClientDisconnect when the client has gone.
    """
    headers = request.headers
    if optional and headers.get("content-length", "0") == "0" and _UNTOLD.isdisjoint(headers):
        return {}
    # A page elsewhere can send forms to us without asking the browser; JSON it cannot.
    declared = headers.get("content-type", "")
    if declared.partition(";")[0].strip().lower() != "application/json":
        raise MediaTypeError(
            f"the content type is {declared!r}: send JSON, with Content-Type: application/json"
        )
    try:
        async with asyncio.timeout(timeout_s):
            body = await _read(request, max_bytes)
    except TimeoutError:
        raise BodyTimeoutError(f"the body did not arrive within {timeout_s:g} s") from None
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InvalidRequestError("the body must be a JSON object: {...}")
    return content


async def _read(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    body = bytearray()
    if not declared.isdecimal() or int(declared) <= max_bytes:
        async for piece in request.stream():
            body += piece
            if len(body) > max_bytes:
                break
        else:
            return bytes(body)
    raise BodyTooLargeError(
        f"the body has {declared or f'more than {max_bytes}'} bytes, the limit is {max_bytes}: "
        "shorten it, or start the gateway with a larger --max-body"
    )


def read_query(request: Request, kind: type[T]) -> T:
    """The query of the address as a struct. Raises ParameterError."""
    given = request.query_params
    for name in given:
        if len(given.getlist(name)) > 1:
            raise ParameterError(name, f"{name} is given more than once")
    return convert(dict(given), kind, strict=False)


def convert(values: dict[str, Any], kind: type[T], *, strict: bool = True) -> T:
    """Values as a struct. Raises ParameterError with the name, the value and what is allowed.

    Not strict: numbers and booleans may be strings, as in an address.
    """
    try:
        # JSON has only strings for keys; logit_bias has token ids.
        return msgspec.convert(values, kind, str_keys=True, strict=strict)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at ")
        # `$.temperature`, `$.stop[...]`, `key` in `$.logit_bias`: the name is what programs look for.
        path = where.rpartition("`$")[2].rstrip("`").lstrip(".").removesuffix("[...]")
        unknown = re.fullmatch(r"Object contains unknown field `(.*)`", text)
        missing = re.fullmatch(r"Object missing required field `(.*)`", text)
        if found := unknown or missing:
            what = "is not known: leave it out" if unknown else "is missing"
            name = f"{path}.{found[1]}".lstrip(".")
            raise ParameterError(name, f"{name} {what}") from None
        if not path:  # parameters that do not go together; the text names them
            raise InvalidRequestError(text) from None
        raise ParameterError(path, f"{path} is {shown(_value_at(values, path))}: {text}") from None


def _value_at(values: Any, path: str) -> Any:
    """What stands at `params.stop[2]`; what is around it when that cannot be found."""
    for name in re.findall(r"[^.\[\]]+", path):
        if isinstance(values, dict):
            values = values.get(name)
        elif isinstance(values, list) and name.isdecimal() and int(name) < len(values):
            values = values[int(name)]
    return values


def shown(value: object) -> str:
    """A value for an error message."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


__all__ = ["ClientDisconnect", "convert", "read_object", "shown"]
