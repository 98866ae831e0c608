"""Builds requests from what a caller passes, and their frames."""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import msgspec

from shared.embedding_messages import Embed
from shared.errors import InvalidRequestError
from shared.messages import (
    MAX_MESSAGE_BYTES,
    Generate,
    KVPrecision,
    Load,
    Message,
    Precision,
    SamplingParams,
    Tokenize,
)
from shared.protocol import Request, encode_request


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of `story` and `chat`, as described at shared.messages.SamplingParams."""

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    stop: list[str]
    stop_token_ids: list[int]
    min_tokens: int
    ignore_eos: bool
    cache_prompt: bool
    n: int
    logprobs: int | None
    echo: bool


class JobOptions(TypedDict):
    """What `story` and `chat` say about the job, as described at shared.messages.Generate."""

    model: str | None
    stream: bool
    priority: int


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of `load`; what is left out is as the server's settings say."""

    dtype: Literal["auto"] | Precision
    kv_dtype: Literal["auto"] | KVPrecision
    max_model_len: int


def new_id() -> str:
    """A request id that no other request has."""
    return uuid.uuid4().hex


def story_request(
    prompt: str, options: SamplingOptions, request_id: str | None, **fields: Unpack[JobOptions]
) -> Generate:
    """Continue `prompt`."""
    params = SamplingParams(**options)
    return Generate(id=request_id or new_id(), kind="story", prompt=prompt, params=params, **fields)


def chat_request(
    messages: Sequence[Message | Mapping[str, str]],
    options: SamplingOptions,
    request_id: str | None,
    continue_last: bool = False,
    **fields: Unpack[JobOptions],
) -> Generate:
    """Answer `messages`, each a Message or a mapping with `role` and `content`."""
    return Generate(
        id=request_id or new_id(),
        kind="chat",
        messages=as_messages(messages),
        params=SamplingParams(**options),
        continue_last=continue_last,
        **fields,
    )


def tokenize_request(
    text: str | Sequence[Message | Mapping[str, str]], model: str | None, request_id: str | None
) -> Tokenize:
    """The tokens of a text, or of a conversation."""
    request_id = request_id or new_id()
    if isinstance(text, str):
        return Tokenize(id=request_id, model=model, prompt=text)
    return Tokenize(id=request_id, model=model, messages=as_messages(text))


def embed_request(
    texts: str | Sequence[str | Sequence[int]],
    model: str | None,
    priority: int,
    request_id: str | None,
) -> Embed:
    """Vectors for texts, or for one."""
    each = [texts] if isinstance(texts, str) else texts
    return Embed(
        id=request_id or new_id(),
        model=model,
        texts=[text if isinstance(text, str) else list(text) for text in each],
        priority=priority,
    )


def as_messages(messages: Sequence[Message | Mapping[str, str]]) -> list[Message]:
    """A conversation. Raises InvalidRequestError."""
    try:
        return msgspec.convert(messages, list[Message])
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"messages: {error}") from None


def load_request(
    name: str, path: str | Path, options: LoadOptions, request_id: str | None = None
) -> Load:
    """Load the model in `path`; a folder that is here is named so that the server finds it too."""
    folder = Path(path).expanduser()
    where = str(folder.resolve() if folder.is_dir() else path)
    return Load(id=request_id or new_id(), name=name, path=where, **options)


def frame_of(request: Request) -> bytes:
    """The request's frame. Raises InvalidRequestError for what no frame can carry.

    Limits of single fields are the server's to check; but it closes the connection on a frame that
    is too long, so that one is refused here.
    """
    try:
        frame = encode_request(request)
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"the text is not valid Unicode: {error}") from None
    except OverflowError as error:
        raise InvalidRequestError(f"a number is out of range: {error}") from None
    if len(frame) > MAX_MESSAGE_BYTES:
        raise InvalidRequestError(
            f"the request has {len(frame)} bytes, the limit is {MAX_MESSAGE_BYTES}: shorten it"
        )
    return frame
