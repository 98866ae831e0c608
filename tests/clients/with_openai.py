"""The openai SDK against a real server."""

import os
from collections.abc import Iterator
from typing import Any

import openai
import pytest

MODEL, STORY = "chat", "story"
SAY_HELLO: list[openai.types.chat.ChatCompletionMessageParam] = [
    {"role": "user", "content": "Hello!"}
]


@pytest.fixture
def client() -> Iterator[openai.OpenAI]:
    # OPENAI_BASE_URL and OPENAI_API_KEY are what it reads by itself.
    with openai.OpenAI(max_retries=0, timeout=60) as made:
        yield made


def test_chat_whole_and_streamed_are_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL, messages=SAY_HELLO, max_tokens=20, temperature=0
    )
    assert whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 20
    text, usage = "", None
    for chunk in client.chat.completions.create(
        model=MODEL,
        messages=SAY_HELLO,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage == whole.usage


def test_completions_with_n_stop_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=STORY, prompt="Once upon a time", n=3, seed=1, max_tokens=12, logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    stopped = client.completions.create(
        model=STORY, prompt="Once upon a time", temperature=0, max_tokens=60, stop=[" "]
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert " " not in stopped.choices[0].text
    chat = client.chat.completions.create(
        model=MODEL, messages=SAY_HELLO, max_tokens=3, logprobs=True, top_logprobs=2
    )
    details = chat.choices[0].logprobs
    assert details is not None
    assert details.content is not None
    assert len(details.content[0].top_logprobs) == 2


def test_errors_are_the_classes_of_the_sdk(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-none", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model=STORY, prompt="x", temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=STORY, prompt="x " * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong-wrong").models.list()
    assert [model.id for model in client.models.list()] == [STORY, MODEL]


def test_a_timeout_ends_the_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(
            model=STORY, prompt="x", max_tokens=400, extra_body={"ignore_eos": True, "n": 4}
        )
    assert client.completions.create(model=STORY, prompt="x", max_tokens=1).choices


def test_429_is_tried_again_and_closed_streams_give_their_places_back() -> None:
    statuses: list[int] = []

    def note(response: Any) -> None:
        statuses.append(response.status_code)

    http = openai.DefaultHttpxClient(event_hooks={"response": [note]}, timeout=60, trust_env=False)
    with openai.OpenAI(max_retries=8, http_client=http) as client:
        # More than the server runs and lets wait, as run.sh has started it.
        streams = []
        for _ in range(6):
            try:
                streams.append(
                    client.with_options(max_retries=0).completions.create(
                        model=STORY,
                        prompt="Once",
                        max_tokens=400,
                        stream=True,
                        n=2,
                        logprobs=5,
                        extra_body={"ignore_eos": True},
                    )
                )
            except openai.RateLimitError:
                break
        answer = client.completions.create(model=STORY, prompt="x", max_tokens=1)
        assert answer.choices
        assert statuses[-1] == 200
        assert 429 in statuses
        for stream in streams:
            stream.close()
        assert client.completions.create(model=STORY, prompt="x", max_tokens=1).choices


def test_a_stream_that_is_left_is_cancelled(client: openai.OpenAI) -> None:
    url, key = os.environ["TPSERVE_URL"], os.environ["OPENAI_API_KEY"]
    stream = client.completions.create(
        model=STORY,
        prompt="x",
        max_tokens=400,
        n=4,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    headers = {"Authorization": f"Bearer {key}"}
    with openai.DefaultHttpxClient(trust_env=False, headers=headers) as http:
        for _ in range(100):
            if http.get(f"{url}/api/status", timeout=30).json()["running"] == 0:
                return
    raise AssertionError("the job still runs")
