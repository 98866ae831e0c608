"""What `/v1/chat/completions` and `/v1/completions` take, checked and turned into our own terms.

What OpenAI's API has and this server does not is refused by name, unless it has the value that asks
for nothing; so is whatever nobody knows.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from client.requests import SamplingOptions
from gateway.body import convert, shown
from gateway.errors import ParameterError, UnsupportedParameterError
from shared.messages import Message, ModelName, Role, SamplingParams

COMPLETION_MAX_TOKENS = 16
"""What OpenAI's `/v1/completions` generates when max_tokens is not given."""
MAX_PROMPTS = 64
"""Of one request."""
_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Parameters of OpenAI's API that are not supported: values that mean the same as leaving them out."""

_SAMPLING = frozenset(SamplingParams.__struct_fields__) - {"logprobs", "echo"}


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """How to stream."""

    include_usage: bool = False


class _Common(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: ModelName | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Meta(max_length=256)] | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    return_token_ids: bool = False


class ChatBody(_Common, frozen=True, kw_only=True):
    """Of a chat, but for the sampling parameters."""

    messages: Annotated[list[Any], Meta(min_length=1, max_length=4096)]
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    continue_final_message: bool = False


class CompletionBody(_Common, frozen=True, kw_only=True):
    """Of a completion, but for the sampling parameters."""

    prompt: str | Annotated[list[Any], Meta(min_length=1, max_length=MAX_PROMPTS)]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool = False


class Generation(Struct, frozen=True, kw_only=True):
    """A checked request of either endpoint. `messages` is set for a chat, `prompts` otherwise."""

    model: str | None
    messages: list[Message] = []
    prompts: list[str] = []
    options: SamplingOptions
    n: int
    """Choices for each prompt."""
    stream: bool
    include_usage: bool
    user: str | None
    """Whom the request is for, as the client says; goes to the log."""
    priority: int
    continue_last: bool
    """The last message is the beginning of the answer."""
    return_token_ids: bool


def chat_generation(body: dict[str, Any]) -> Generation:
    """The body of `/v1/chat/completions`. Raises ParameterError."""
    sampling, rest = _split(body, _fields(ChatBody))
    given = convert(rest, ChatBody)
    limit = given.max_completion_tokens
    if limit is not None and sampling.setdefault("max_tokens", limit) != limit:
        raise ParameterError(
            "max_tokens",
            f"max_tokens is {shown(sampling['max_tokens'])} and max_completion_tokens {limit}: "
            "give one of them",
        )
    if given.top_logprobs is not None and not given.logprobs:
        raise ParameterError("top_logprobs", "top_logprobs needs logprobs: true")
    if given.logprobs:
        sampling["logprobs"] = given.top_logprobs or 0
    messages = chat_messages(given.messages)
    goes_on = given.continue_final_message
    if goes_on and messages[-1].role != "assistant":
        raise ParameterError(
            "continue_final_message",
            f"continue_final_message is true, but the last message is of the {messages[-1].role}: "
            "end with one of the assistant",
        )
    return _generation(given, sampling, messages=messages, continue_last=goes_on)


def chat_messages(items: Sequence[Any]) -> list[Message]:
    """A conversation. Raises ParameterError."""
    return [_message(f"messages[{i}]", item) for i, item in enumerate(items)]


def completion_generation(body: dict[str, Any]) -> Generation:
    """The body of `/v1/completions`. Raises ParameterError."""
    sampling, rest = _split(body, _fields(CompletionBody))
    given = convert(rest, CompletionBody)
    sampling.setdefault("max_tokens", COMPLETION_MAX_TOKENS)
    if given.logprobs is not None:
        if given.echo:
            raise UnsupportedParameterError(
                "logprobs", "logprobs of an echoed prompt are not supported: leave echo out"
            )
        sampling["logprobs"] = given.logprobs
    if given.echo:
        sampling["echo"] = True
    prompts = [given.prompt] if isinstance(given.prompt, str) else given.prompt
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UnsupportedParameterError(
                f"prompt[{i}]",
                f"prompt[{i}] is {shown(prompt)}: token ids are not supported, send text",
            )
    return _generation(given, sampling, prompts=prompts)


def _generation(
    given: _Common,
    sampling: dict[str, Any],
    messages: list[Message] | None = None,
    prompts: list[str] | None = None,
    continue_last: bool = False,
) -> Generation:
    if given.stream_options is not None and not given.stream:
        raise ParameterError("stream_options", "stream_options needs stream: true")
    params = convert(sampling, SamplingParams)
    prompts = prompts or []
    choices = params.n * max(1, len(prompts))
    if choices > MAX_PROMPTS:
        raise ParameterError(
            "n", f"{len(prompts)} prompts with n = {params.n} make {choices} choices, "
            f"the limit is {MAX_PROMPTS}: send fewer"
        )  # fmt: skip
    return Generation(
        model=given.model,
        messages=messages or [],
        prompts=prompts,
        options=msgspec.convert(msgspec.structs.asdict(params), SamplingOptions),
        n=params.n,
        stream=given.stream,
        include_usage=given.stream_options is not None and given.stream_options.include_usage,
        user=given.user,
        priority=given.priority,
        continue_last=continue_last,
        return_token_ids=given.return_token_ids,
    )


def _split(body: dict[str, Any], known: Set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sampling parameters, and the rest. Null means not given, as everywhere in OpenAI's API."""
    sampling: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in body.items():
        if value is None:
            if name not in known | _SAMPLING | _UNSUPPORTED.keys():
                raise ParameterError(name, f"{name} is not known: leave it out")
        elif name in known:
            rest[name] = value
        elif name == "stop" and isinstance(value, str):
            sampling[name] = [value]
        elif name in _SAMPLING:
            sampling[name] = value
        elif name not in _UNSUPPORTED:
            raise ParameterError(name, f"{name} is not known: leave it out")
        elif value not in _UNSUPPORTED[name]:
            raise UnsupportedParameterError(
                name, f"{name} is {shown(value)}: {name} is not supported, leave it out"
            )
    return sampling, rest


def _fields(kind: type[Struct]) -> frozenset[str]:
    return frozenset(kind.__struct_fields__)


class _ChatMessage(Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Any]


_MESSAGE_UNSUPPORTED = (
    "annotations",
    "audio",
    "function_call",
    "name",
    "reasoning_content",
    "refusal",
    "tool_call_id",
    "tool_calls",
)


def _message(path: str, item: Any) -> Message:
    """One message; parts of text are joined."""
    if not isinstance(item, dict):
        raise ParameterError(path, f"{path} is {shown(item)}: write an object with role, content")
    # A client that sends an answer back sends its empty fields, too.
    for name in _MESSAGE_UNSUPPORTED:
        if item.get(name) not in (None, []):
            raise UnsupportedParameterError(
                f"{path}.{name}", f"{path}.{name} is not supported: leave it out"
            )
    given = {key: value for key, value in item.items() if key not in _MESSAGE_UNSUPPORTED}
    try:
        message = convert(given, _ChatMessage)
    except ParameterError as error:
        raise ParameterError(f"{path}.{error.param}", f"{path}.{error.message}") from None
    content = message.content
    if not isinstance(content, str):
        content = "".join(_text(f"{path}.content[{i}]", part) for i, part in enumerate(content))
    return Message(role=_ROLES[message.role], content=content)


def _text(path: str, part: Any) -> str:
    if isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text":
        text = part["text"]
        if isinstance(text, str):
            return text
    elif isinstance(part, dict) and part.get("type") not in (None, "text"):
        kind = shown(part["type"])
        raise UnsupportedParameterError(
            path, f"{path} has the type {kind}: only parts of type 'text' are supported"
        )
    raise ParameterError(
        path, f'{path} is {shown(part)}: a part is {{"type": "text", "text": "..."}}'
    )
