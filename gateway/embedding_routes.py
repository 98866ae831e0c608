"""`/v1/embeddings`, as OpenAI has it; docs/http.md says what these embeddings are."""

from base64 import b64encode
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from gateway.body import convert, read_object, shown
from gateway.context import Gateway, note, once
from gateway.errors import ParameterError, UnsupportedParameterError, json_response
from gateway.event_stream import unless_gone
from gateway.openapi import JOB_ERRORS, operation
from gateway.openapi_types import EmbeddingList
from shared.embedding_messages import MAX_TEXTS, Embeddings
from shared.messages import ModelName, TokenIdNumber

Encoding = Literal["float", "base64"]


class EmbeddingBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Texts, or their token ids."""

    model: ModelName | None = None
    input: str | Annotated[list[Any], Meta(min_length=1)]
    encoding_format: Encoding = "float"
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    user: Annotated[str, Meta(max_length=256)] | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0


class _TokenIds(Struct, frozen=True):
    input: list[TokenIdNumber]


def embedding_routes(gateway: Gateway) -> APIRouter:
    """`/v1/embeddings`."""
    router = APIRouter(prefix="/v1")
    limits = gateway.settings

    @router.post(
        "/embeddings",
        **operation(
            "Texts as vectors", body=EmbeddingBody, answer=EmbeddingList, errors=JOB_ERRORS
        ),
    )
    async def embeddings(request: Request) -> Response:
        body = await read_object(request, limits.max_body_bytes, limits.body_timeout)
        # Null means not given, as everywhere in OpenAI's API.
        wanted = convert({name: v for name, v in body.items() if v is not None}, EmbeddingBody)
        if wanted.user is not None:
            note(request, user=wanted.user)
        asked = gateway.client.embed(
            _texts(wanted.input),
            model=wanted.model,
            priority=wanted.priority,
            request_id=once(request),
        )
        found = await unless_gone(request.receive, asked)
        note(request, model=found.model)
        _check_dimensions(wanted.dimensions, found)
        return json_response(_answer(found, wanted.encoding_format))

    return router


def _texts(given: str | list[Any]) -> list[str | list[int]]:
    """One text or several, each a string or its token ids. Raises ParameterError."""
    if isinstance(given, str):
        return [_checked("input", given)]
    if all(isinstance(item, int) for item in given):
        return [_checked("input", given)]
    if len(given) > MAX_TEXTS:
        raise ParameterError("input", f"input has {len(given)} texts, the limit is {MAX_TEXTS}")
    return [_checked(f"input[{i}]", item) for i, item in enumerate(given)]


def _checked(path: str, text: Any) -> str | list[int]:
    if text in ("", []):
        raise ParameterError(path, f"{path} is empty: there is nothing to embed, leave it out")
    if isinstance(text, str):
        return text
    try:
        return convert({"input": text}, _TokenIds).input
    except ParameterError:
        raise ParameterError(
            path, f"{path} is {shown(text)}: a text is a string or a list of token ids"
        ) from None


def _check_dimensions(wanted: int | None, found: Embeddings) -> None:
    """What a model makes cannot be cut; how long it is shows in the answer alone."""
    size = len(found.vectors[0]) // 4
    if wanted not in (None, size):
        raise UnsupportedParameterError(
            "dimensions",
            f"dimensions is {wanted}; model {found.model!r} gives {size}, which cannot be changed: "
            "leave it out",
        )


def _answer(found: Embeddings, encoding: Encoding) -> dict[str, Any]:
    tokens = sum(found.token_counts)
    # OpenAI's base64 is of the same bytes: float32, little-endian.
    vectors: list[Any] = (
        [b64encode(vector).decode() for vector in found.vectors]
        if encoding == "base64"
        else found.floats
    )
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(vectors)
        ],
        "model": found.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
