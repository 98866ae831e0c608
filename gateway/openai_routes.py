"""The routes of OpenAI's API: chat completions, completions, models."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gateway.body import read_object
from gateway.context import Gateway, note, request_id
from gateway.errors import json_response
from gateway.event_stream import DONE, EventStream, data, unless_gone
from gateway.jobs import JobEvent, accepted, results, start_jobs
from gateway.openai_answers import ChatShape, CompletionShape, Shape, model_body
from gateway.openai_requests import Generation, chat_generation, completion_generation
from gateway.openapi import COORDINATOR, JOB_ERRORS, operation
from gateway.openapi_types import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ModelBody,
    ModelList,
)
from shared.errors import ModelNotFoundError
from shared.messages import Choice, Done, ModelName, Started, Token, Usage


def openai_routes(gateway: Gateway) -> APIRouter:
    """Everything under /v1."""
    router = APIRouter(prefix="/v1")
    limits = gateway.settings

    @router.post(
        "/chat/completions",
        **operation(
            "Answer a conversation",
            body=ChatRequest,
            answer=ChatCompletion,
            streams=True,
            errors=JOB_ERRORS,
        ),
    )
    async def chat_completions(request: Request) -> Response:
        wanted = chat_generation(
            await read_object(request, limits.max_body_bytes, limits.body_timeout)
        )
        shape = _shape(ChatShape, request, wanted)
        return await _generate(gateway, request, wanted, shape)

    @router.post(
        "/completions",
        **operation(
            "Continue a text",
            body=CompletionRequest,
            answer=Completion,
            streams=True,
            errors=JOB_ERRORS,
        ),
    )
    async def completions(request: Request) -> Response:
        wanted = completion_generation(
            await read_object(request, limits.max_body_bytes, limits.body_timeout)
        )
        shape = _shape(CompletionShape, request, wanted)
        return await _generate(gateway, request, wanted, shape)

    @router.get("/models", **operation("The models that take jobs", answer=ModelList))
    async def models() -> Response:
        loaded = [m for m in await gateway.client.models() if m.state == "ready"]
        bodies = [model_body(model, gateway.started_at) for model in loaded]
        return json_response({"object": "list", "data": bodies})

    @router.get(
        "/models/{name:path}",
        **operation(
            "One of them",
            path={"name": ModelName},
            answer=ModelBody,
            errors=(*COORDINATOR, ModelNotFoundError),
        ),
    )
    async def model(name: str) -> Response:
        loaded = {m.name: m for m in await gateway.client.models() if m.state == "ready"}
        if name not in loaded:
            names = ", ".join(sorted(loaded)) or "none"
            raise ModelNotFoundError(f"model {name!r} is not loaded; loaded are: {names}")
        return json_response(model_body(loaded[name], gateway.started_at))

    return router


async def _generate(
    gateway: Gateway, request: Request, wanted: Generation, shape: Shape
) -> Response:
    if wanted.user is not None:
        note(request, user=wanted.user)
    streams = start_jobs(gateway.client, wanted, request_id(request))
    if not wanted.stream:
        ends = await unless_gone(request.receive, results(streams))
        for end in ends:
            gateway.metrics.job_done(end)
        note(request, model=ends[0].model)
        choices = [choice for job, end in enumerate(ends) for choice in _choices(job, end, wanted)]
        return json_response(
            shape.answer(ends[0].model, choices, _total([end.usage for end in ends]))
        )
    events = await unless_gone(request.receive, accepted(streams))
    return EventStream(
        _chunks(gateway, request, wanted, shape, events),
        ping_s=gateway.settings.ping,
        slow_reader_s=gateway.settings.slow_reader,
        on_end=gateway.metrics.stream_ended,
    )


async def _chunks(
    gateway: Gateway,
    request: Request,
    wanted: Generation,
    shape: Shape,
    events: AsyncGenerator[JobEvent, None],
) -> AsyncGenerator[bytes, None]:
    """The events of the stream."""
    model = wanted.model or ""
    usages: list[Usage] = []
    ended: set[int] = set()
    """Choices whose end has been told."""
    # Who asks for usage gets the field in every chunk, null but in the last one.
    no_usage = {"usage": None} if wanted.include_usage else {}
    async with aclosing(events):
        async for job, event in events:
            match event:
                case Started():
                    model = event.model
                    note(request, model=model)
                case Token():
                    index = job * wanted.n + event.index
                    piece = shape.piece(model, index, event)
                    if piece is not None:
                        yield data({**piece, **no_usage})
                    if event.finish_reason is not None:
                        ended.add(index)
                        yield data({**shape.last_piece(model, index, event), **no_usage})
                case Done():
                    gateway.metrics.job_done(event)
                    usages.append(event.usage)
                    for choice in _choices(job, event, wanted):
                        if choice.index not in ended:  # a coordinator before this field
                            last = shape.last_piece(event.model, choice.index, choice)
                            yield data({**last, **no_usage})
    if wanted.include_usage:
        yield data(shape.usage_piece(model, _total(usages)))
    yield DONE


def _shape(kind: type[Shape], request: Request, wanted: Generation) -> Shape:
    return kind(
        request_id(request),
        logprobs=wanted.options.get("logprobs") is not None,
        token_ids=wanted.return_token_ids,
    )


def _choices(job: int, end: Done, wanted: Generation) -> list[Choice]:
    """A job's answers with their indexes in the whole request."""
    first = job * wanted.n
    return [msgspec.structs.replace(choice, index=first + choice.index) for choice in end.choices]


def _total(usages: Sequence[Usage]) -> Usage:
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        total_tokens=sum(usage.total_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages),
    )
