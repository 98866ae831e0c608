"""The shapes of OpenAI's answers, whole and in chunks, made of the events of our jobs."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from shared.messages import Choice, ModelInfo, Token, TokenLogprob, Usage

_REPLACEMENT = "\ufffd"


class Shape(ABC):
    """Answers of one request: what all its chunks share, and how a choice looks."""

    prefix: str
    whole: str
    chunk: str

    def __init__(self, request_id: str, *, logprobs: bool, token_ids: bool) -> None:
        self._id = f"{self.prefix}-{request_id}"
        self._logprobs, self._token_ids = logprobs, token_ids
        self._created = int(time.time())

    def answer(self, model: str, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The whole answer; `choices` have the indexes of the answer."""
        return {
            **self._head(self.whole, model),
            "choices": [
                {
                    "index": choice.index,
                    **self._whole_text(choice),
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop_reason,
                    **({"token_ids": choice.token_ids} if self._token_ids else {}),
                }
                for choice in choices
            ],
            "usage": usage_body(usage),
        }

    def piece(self, model: str, index: int, token: Token) -> dict[str, Any] | None:
        """A chunk with what is new of a choice; None when there is nothing to tell."""
        told = bool(token.text or token.logprobs or self._token_ids)
        delta = self._delta(index, token.text, token.logprobs, told)
        if delta is None:
            return None
        if self._token_ids:
            delta["token_ids"] = token.token_ids
        return self._chunk(model, {"index": index, **delta, "finish_reason": None})

    def last_piece(self, model: str, index: int, end: Choice | Token) -> dict[str, Any]:
        """The chunk that says why a choice ended."""
        return self._chunk(
            model,
            {
                "index": index,
                **self._end_delta(index),
                "finish_reason": end.finish_reason,
                "stop_reason": end.stop_reason,
            },
        )

    def usage_piece(self, model: str, usage: Usage) -> dict[str, Any]:
        """The chunk after the last one, for who asks for it."""
        return {**self._head(self.chunk, model), "choices": [], "usage": usage_body(usage)}

    def _head(self, kind: str, model: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": model}

    def _chunk(self, model: str, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(self.chunk, model), "choices": [choice]}

    @abstractmethod
    def _whole_text(self, choice: Choice) -> dict[str, Any]: ...

    @abstractmethod
    def _delta(
        self, index: int, text: str, logprobs: list[TokenLogprob], told: bool
    ) -> dict[str, Any] | None: ...

    @abstractmethod
    def _end_delta(self, index: int) -> dict[str, Any]: ...


class ChatShape(Shape):
    """Of `/v1/chat/completions`."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, request_id: str, *, logprobs: bool, token_ids: bool) -> None:
        super().__init__(request_id, logprobs=logprobs, token_ids=token_ids)
        self._introduced: set[int] = set()
        """Choices whose role has been told."""

    def _whole_text(self, choice: Choice) -> dict[str, Any]:
        return {
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._details(choice.logprobs),
        }

    def _delta(
        self, index: int, text: str, logprobs: list[TokenLogprob], told: bool
    ) -> dict[str, Any] | None:
        if not told and index in self._introduced:
            return None
        delta = {**self._role(index), "content": text}
        return {"delta": delta, "logprobs": self._details(logprobs)}

    def _end_delta(self, index: int) -> dict[str, Any]:
        return {"delta": self._role(index), "logprobs": None}

    def _role(self, index: int) -> dict[str, Any]:
        if index in self._introduced:
            return {}
        self._introduced.add(index)
        return {"role": "assistant"}

    def _details(self, logprobs: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            {
                **_entry(token.text, token.logprob),
                "top_logprobs": [_entry(other.text, other.logprob) for other in token.top],
            }
            for token in logprobs
        ]
        return {"content": content, "refusal": None}


class CompletionShape(Shape):
    """Of `/v1/completions`."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, request_id: str, *, logprobs: bool, token_ids: bool) -> None:
        super().__init__(request_id, logprobs=logprobs, token_ids=token_ids)
        self._offsets: dict[int, int] = {}
        """Characters of the texts of the tokens that have been told, by choice."""

    def _whole_text(self, choice: Choice) -> dict[str, Any]:
        return {"text": choice.text, "logprobs": self._details(choice.index, choice.logprobs)}

    def _delta(
        self, index: int, text: str, logprobs: list[TokenLogprob], told: bool
    ) -> dict[str, Any] | None:
        if not told:
            return None
        return {"text": text, "logprobs": self._details(index, logprobs)}

    def _end_delta(self, index: int) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def _details(self, index: int, logprobs: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        offsets, offset = [], self._offsets.get(index, 0)
        for token in logprobs:
            offsets.append(offset)
            offset += len(token.text)
        self._offsets[index] = offset
        return {
            "tokens": [token.text for token in logprobs],
            "token_logprobs": [token.logprob for token in logprobs],
            "top_logprobs": [
                # The chosen token is always among them, as OpenAI has it.
                {**{o.text: o.logprob for o in token.top}, token.text: token.logprob}
                for token in logprobs
            ],
            "text_offset": offsets,
        }


def usage_body(usage: Usage) -> dict[str, Any]:
    """Token counts as OpenAI has them."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def model_body(model: ModelInfo, created: int) -> dict[str, Any]:
    """A model as `/v1/models` lists it."""
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "tpserve",
        "max_model_len": model.max_model_len,
    }


def _entry(text: str, logprob: float) -> dict[str, Any]:
    # A token that is a part of a character has no text that its bytes could be read from.
    known = None if _REPLACEMENT in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": known}
