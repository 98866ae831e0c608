"""litellm against a real server, with the provider `openai` and a base address."""

import os
from typing import Any

import litellm
import pytest

WHERE: dict[str, Any] = {
    "api_base": os.environ["OPENAI_BASE_URL"],
    "api_key": os.environ["OPENAI_API_KEY"],
    "num_retries": 0,
}
SAY_HELLO = [{"role": "user", "content": "Hello!"}]


def test_chat_whole_and_streamed() -> None:
    asked: dict[str, Any] = {"messages": SAY_HELLO, "max_tokens": 20, "temperature": 0, **WHERE}
    whole = litellm.completion(model="openai/chat", **asked)
    assert whole.choices[0].message.content
    chunks = litellm.completion(model="openai/chat", stream=True, **asked)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content


def test_text_completion() -> None:
    answer = litellm.text_completion(
        model="text-completion-openai/story", prompt="Once upon a time", max_tokens=10, **WHERE
    )
    assert answer.choices[0].text


def test_errors_are_litellms() -> None:
    with pytest.raises(litellm.NotFoundError, match="not loaded"):
        litellm.completion(model="openai/none", messages=SAY_HELLO, **WHERE)
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(model="openai/chat", messages=SAY_HELLO, temperature=-1, **WHERE)
