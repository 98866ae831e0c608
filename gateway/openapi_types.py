"""What bodies and answers look like, as types for the OpenAPI document.

Made of the structs that requests are read into where there are such; the answers in OpenAI's shapes,
which are written in pieces, stand here, and a test compares them with what comes.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from gateway.openai_requests import ChatBody, CompletionBody
from gateway.openapi import trimmed
from gateway.plain import ENVELOPE
from shared.messages import FinishReason, ModelInfo, Role, SamplingParams, StopString

NEVER_GIVEN = ("op", "id", "v", "user", "session")
"""Fields of the coordinator's requests that the gateway fills in."""


class TextPart(Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class ChatMessageBody(Struct, frozen=True):
    """One turn of a conversation."""

    role: Role | Literal["developer"]
    content: str | list[TextPart]


def _with_sampling(kind: type[Struct], name: str, **types: Any) -> type[Struct]:
    """Both kinds of parameters in one object. Null means not given."""
    fields: dict[str, Any] = {}
    for field in (*msgspec.structs.fields(SamplingParams), *msgspec.structs.fields(kind)):
        given = types.get(field.name, field.type)
        fields[field.name] = (given,) if field.required else (given | None, None)
    return msgspec.defstruct(
        name,
        [(field, *rest) for field, rest in fields.items()],
        kw_only=True,
        forbid_unknown_fields=True,
    )


_STOP = StopString | list[StopString]
ChatRequest = _with_sampling(
    trimmed(ChatBody, "Chat", ()),
    "ChatCompletionRequest",
    messages=list[ChatMessageBody],
    stop=_STOP,
)
CompletionRequest = _with_sampling(
    trimmed(CompletionBody, "Completion", ()),
    "CompletionRequest",
    prompt=str | list[str],
    stop=_STOP,
)


class CachedTokens(Struct, frozen=True):
    """Found in the KV cache."""

    cached_tokens: int


class UsageBody(Struct, frozen=True):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class AnswerMessage(Struct, frozen=True):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Struct, frozen=True):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct, frozen=True):
    """The answer to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody


class CompletionChoice(Struct, frozen=True):
    """One text."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET


class Completion(Struct, frozen=True):
    """The continuation of a text."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody


class EmbeddingList(Struct, frozen=True):
    """Vectors by text; see docs/http.md."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    model: str
    usage: dict[str, int]


class ModelBody(Struct, frozen=True):
    """A model that takes jobs."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["tpserve"]
    max_model_len: int


class ModelList(Struct, frozen=True):
    """All of them."""

    object: Literal["list"]
    data: list[ModelBody]


class TokenCount(Struct, frozen=True):
    """A text as the model reads it."""

    count: int
    max_model_len: int
    tokens: list[int]


class PromptBody(Struct, frozen=True):
    """The text of tokens."""

    prompt: str


class HealthBody(Struct, frozen=True):
    """How the server is."""

    status: Literal["live", "ready"]


class NotReadyBody(Struct, frozen=True):
    """Why it takes no requests."""

    status: Literal["not_ready"]
    reason: str


class VersionBody(Struct, frozen=True):
    """Of tpserve."""

    version: str


class LoadedModels(Struct, frozen=True):
    """Every model, whatever its state."""

    models: list[ModelInfo]


class LoadedModel(Struct, frozen=True):
    """One that takes jobs now."""

    model: ModelInfo


class UnloadedModel(Struct, frozen=True):
    """One whose memory was given back."""

    model: str
    freed_bytes: int


def body_of(kind: type[Struct], name: str, **defaults: Any) -> type[Struct]:
    """Of a request that the coordinator gets."""
    return trimmed(kind, name, NEVER_GIVEN, **defaults)


def answer_of(kind: type[Struct], name: str) -> type[Struct]:
    """Of an event that answers."""
    return trimmed(kind, name, ENVELOPE)
