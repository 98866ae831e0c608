"""Log lines for people or for programs, and the id that every request has."""

import asyncio
import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import error_response
from gateway.memory import OpenRequests
from gateway.metrics import Metrics
from shared.errors import InvalidRequestError

log = logging.getLogger("gateway.requests")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,48}")
"""With a job's number after it, it is the id of a ZeroMQ request, which may have 64 characters."""


class ConsoleFormatter(logging.Formatter):
    """A line for people: the message, then the fields."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        """The line without a traceback."""
        fields = _fields(record)
        shown = "".join(f" {name}={value}" for name, value in fields.items())
        return super().formatMessage(record) + shown


class JsonFormatter(logging.Formatter):
    """A JSON object for each line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with a traceback as one of its fields."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up_logs(log_format: str, level: str) -> None:
    """Send all log lines to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else ConsoleFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])


class RequestLog:
    """The outermost layer: names each request, counts it, and logs how it ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._open = OpenRequests()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on under its id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        given = Headers(scope=scope).get("x-request-id")
        valid = given is None or _REQUEST_ID.fullmatch(given) is not None
        request_id = given if given is not None and valid else uuid.uuid4().hex
        state = scope["state"]
        state["request_id"], state["log_fields"] = request_id, {}
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            with self._open:
                if valid:
                    await self._app(scope, receive, send_named)
                else:
                    error = InvalidRequestError(
                        f"X-Request-Id is {given!r:.80}: 1 to 48 letters, digits, dots, _ and -"
                    )
                    await error_response(error)(scope, receive, send_named)
        except asyncio.CancelledError:
            # The grace period is over. Not raised again: uvicorn would log it as a mistake of ours.
            state["transport"].abort()
        finally:
            # The pattern, not the path: there must not be a time series for every typing error.
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.request_ended(scope["method"], route, status)
            log.info(
                "request",
                extra={
                    "fields": {
                        "request_id": request_id,
                        "method": scope["method"],
                        "path": scope["path"],
                        "status": status,
                        "seconds": round(time.monotonic() - started, 3),
                        **state["log_fields"],
                    }
                },
            )


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields
