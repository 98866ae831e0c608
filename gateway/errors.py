"""Errors that only HTTP has, and the JSON that OpenAI's clients expect for any error."""

import math
from typing import Any

import msgspec
from starlette.responses import Response

from shared.errors import InvalidRequestError, TpserveError

TYPE_OF_STATUS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""What OpenAI calls the families of errors; see `error_body` for the others."""


class ParameterError(InvalidRequestError):
    """A parameter of the request is wrong; `param` is its path, such as messages[0].role."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class UnsupportedParameterError(ParameterError):
    """A parameter that other servers know and this one does not."""

    code = "unsupported_parameter"


class InvalidKeyError(TpserveError):
    """A request without a key, or with a wrong one."""

    code = "invalid_api_key"
    http_status = 401


class ForbiddenOriginError(TpserveError):
    """A request that a foreign web page, or a name that is not ours, has led here."""

    code = "forbidden"
    http_status = 403


class NoRouteError(TpserveError):
    """A path that is not served."""

    code = "unknown_url"
    http_status = 404


class MethodError(TpserveError):
    """A path that takes other methods."""

    code = "method_not_allowed"
    http_status = 405


class BodyTimeoutError(TpserveError):
    """The body of a request did not come in time."""

    code = "request_timeout"
    http_status = 408


class BodyTooLargeError(TpserveError):
    """A body over the limit."""

    code = "request_too_large"
    http_status = 413


class MediaTypeError(TpserveError):
    """A body that is not declared as JSON."""

    code = "unsupported_media_type"
    http_status = 415


def error_body(error: TpserveError) -> dict[str, Any]:
    """`{"error": ...}` in the shape of OpenAI's API."""
    status = error.http_status
    family = "server_error" if status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.message,
            "type": TYPE_OF_STATUS.get(status, family),
            "param": getattr(error, "param", None),
            "code": error.code,
        }
    }


def error_response(error: TpserveError) -> Response:
    """The answer that tells of an error, with Retry-After where a time is known."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error_body(error), error.http_status, headers)


def json_response(
    content: Any, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Any plain data or message struct as JSON."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")
