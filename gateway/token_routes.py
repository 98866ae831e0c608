"""Text to tokens and back, in the shapes of vLLM's routes."""

from typing import Annotated, Any

from fastapi import APIRouter
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from gateway.body import convert, read_object
from gateway.context import Gateway, once
from gateway.errors import ParameterError, json_response
from gateway.event_stream import unless_gone
from gateway.openai_requests import chat_messages
from gateway.openapi import JOB_ERRORS, operation
from gateway.openapi_types import PromptBody, TokenCount
from shared.messages import ModelName, TokenIdNumber


class TokenizeBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Either of the two."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[Any], Meta(min_length=1, max_length=4096)] | None = None


class DetokenizeBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Token ids."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenIdNumber], Meta(max_length=65536)]


def token_routes(gateway: Gateway) -> APIRouter:
    """`/tokenize` and `/detokenize`."""
    router = APIRouter()
    limits = gateway.settings

    @router.post(
        "/tokenize",
        **operation("Text to tokens", body=TokenizeBody, answer=TokenCount, errors=JOB_ERRORS),
    )
    async def tokenize(request: Request) -> Response:
        body = await read_object(request, limits.max_body_bytes, limits.body_timeout)
        wanted = convert(body, TokenizeBody)
        if (wanted.prompt is None) == (wanted.messages is None):
            raise ParameterError("prompt", "give either prompt or messages")
        text = wanted.prompt if wanted.messages is None else chat_messages(wanted.messages)
        assert text is not None, "one of them was given"
        asked = gateway.client.tokenize(text, model=wanted.model, request_id=once(request))
        found = await unless_gone(request.receive, asked)
        return json_response(
            {
                "count": len(found.token_ids),
                "max_model_len": found.max_model_len,
                "tokens": found.token_ids,
            }
        )

    @router.post(
        "/detokenize",
        **operation("Tokens to text", body=DetokenizeBody, answer=PromptBody, errors=JOB_ERRORS),
    )
    async def detokenize(request: Request) -> Response:
        body = await read_object(request, limits.max_body_bytes, limits.body_timeout)
        wanted = convert(body, DetokenizeBody)
        asked = gateway.client.detokenize(
            wanted.tokens, model=wanted.model, request_id=once(request)
        )
        return json_response({"prompt": await unless_gone(request.receive, asked)})

    return router
