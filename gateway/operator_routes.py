"""The routes of who runs the server: health, status, metrics, models that come and go."""

import asyncio
from collections.abc import AsyncGenerator
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import APIRouter
from msgspec import Struct
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from client.requests import LoadOptions
from gateway.body import convert, read_object, read_query
from gateway.context import Gateway, note, once
from gateway.errors import json_response
from gateway.event_stream import DONE, EventStream, data, unless_gone
from gateway.openapi import COORDINATOR, operation
from gateway.openapi_types import (
    HealthBody,
    LoadedModel,
    LoadedModels,
    NotReadyBody,
    UnloadedModel,
    VersionBody,
    answer_of,
)
from gateway.plain import plain
from shared.errors import (
    ConfigError,
    ConnectionLostError,
    MemoryPlanError,
    ModelError,
    ModelNotFoundError,
    NotReadyError,
    TpserveError,
)
from shared.messages import Load, Loading, ModelInfo, ModelName, Status

VERSION = version("tpserve")
_ANSWER_TIMEOUT_S = 5.0
"""For questions that a coordinator answers at once."""


class LoadBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model to load."""

    name: ModelName
    path: str
    dtype: str | None = None
    kv_dtype: str | None = None
    max_model_len: int | None = None
    stream: bool = False


class UnloadQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """force: end the model's jobs at once."""

    force: bool = False


def health_routes(gateway: Gateway) -> APIRouter:
    """Health, status, version and metrics."""
    router = APIRouter()

    @router.get(
        "/health/live",
        **operation("This process answers", answer=HealthBody, errors=(), needs_key=False),
    )
    async def live() -> Response:
        return json_response({"status": "live"})

    @router.get(
        "/health/ready",
        **operation(
            "A token came through all ranks",
            answer=HealthBody,
            errors=(),
            needs_key=False,
            unready=NotReadyBody,
        ),
    )
    async def ready() -> Response:
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                health = await gateway.client.health()
        except TimeoutError:
            reason = f"the coordinator has not answered for {_ANSWER_TIMEOUT_S:g} s"
        except ConnectionLostError as error:
            reason = error.message
        else:
            if health.ready:
                return json_response({"status": "ready"})
            reason = health.reason
        return json_response({"status": "not_ready", "reason": reason}, 503)

    @router.get("/version", **operation("Of tpserve", answer=VersionBody, errors=()))
    async def show_version() -> Response:
        return json_response({"version": VERSION})

    @router.get(
        "/api/status",
        **operation("Workers, queue, memory, rates", answer=answer_of(Status, "StatusBody")),
    )
    async def status() -> Response:
        return json_response(plain(await gateway.client.status()))

    @router.get("/metrics", **operation("For Prometheus", answer=None, errors=()))
    async def metrics() -> Response:
        text = gateway.metrics.exposition(await _status(gateway))
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


def document_route(content: dict[str, Any]) -> APIRouter:
    """The OpenAPI document."""
    router = APIRouter()

    @router.get("/openapi.json")
    async def openapi() -> Response:
        return json_response(content)

    return router


async def _status(gateway: Gateway) -> Status | None:
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            return await gateway.client.status()
    except (TimeoutError, TpserveError):
        return None  # what this process counts is worth having without it


def model_routes(gateway: Gateway) -> APIRouter:
    """Load and unload models while the others are served."""
    router = APIRouter(prefix="/api/models")
    limits = gateway.settings

    @router.get("", **operation("Every model with its state", answer=LoadedModels))
    async def models() -> Response:
        return json_response({"models": await gateway.client.models()})

    @router.post(
        "",
        **operation(
            "Load a model",
            body=LoadBody,
            answer=LoadedModel,
            status=201,
            streams=True,
            errors=(*COORDINATOR, ModelError, MemoryPlanError, NotReadyError, ConfigError),
        ),
    )
    async def load(request: Request) -> Response:
        body = await read_object(request, limits.max_body_bytes, limits.body_timeout)
        wanted = convert(body, LoadBody)
        options = _load_options(wanted)
        note(request, model=wanted.name)
        if not wanted.stream:
            loading = gateway.client.load(
                wanted.name, wanted.path, request_id=once(request), **options
            )
            # The load goes on when the client goes: others may wait for the model.
            info = await unless_gone(request.receive, loading)
            return json_response({"model": info}, 201)
        return EventStream(
            _progress(gateway, wanted, options, once(request)),
            ping_s=limits.ping,
            slow_reader_s=limits.slow_reader,
            on_end=gateway.metrics.stream_ended,
        )

    @router.delete(
        "/{name:path}",
        **operation(
            "Unload a model when its jobs have ended",
            path={"name": ModelName},
            query=UnloadQuery,
            answer=UnloadedModel,
            errors=(*COORDINATOR, ModelNotFoundError, NotReadyError),
        ),
    )
    async def unload(request: Request, name: str) -> Response:
        note(request, model=name)
        force = read_query(request, UnloadQuery).force
        freed = gateway.client.unload(name, force=force, request_id=once(request))
        return json_response(
            {"model": name, "freed_bytes": await unless_gone(request.receive, freed)}
        )

    return router


async def _progress(
    gateway: Gateway, wanted: LoadBody, options: LoadOptions, load_id: str
) -> AsyncGenerator[bytes, None]:
    """Events of a load: any number of progress, then the model."""
    told: asyncio.Queue[Loading | None] = asyncio.Queue()

    async def load() -> ModelInfo:
        try:
            return await gateway.client.load(
                wanted.name,
                wanted.path,
                on_progress=told.put_nowait,
                request_id=load_id,
                **options,
            )
        finally:
            told.put_nowait(None)

    task = asyncio.create_task(load())
    try:
        while (event := await told.get()) is not None:
            yield data({"model": event.model, "phase": event.phase, "ranks": event.ranks})
        yield data({"model": await task})
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    yield DONE


def _load_options(wanted: LoadBody) -> LoadOptions:
    """What was given of dtype, kv_dtype, max_model_len. Raises ParameterError."""
    names = ("dtype", "kv_dtype", "max_model_len")
    given: dict[str, Any] = {
        name: getattr(wanted, name) for name in names if getattr(wanted, name) is not None
    }
    convert({"op": "load", "id": "x", "name": wanted.name, "path": wanted.path, **given}, Load)
    return msgspec.convert(given, LoadOptions)
