"""The official OpenAI client, used as in its documentation."""

import openai as sdk
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionUserMessageParam

from client.zmq_client import Client

HELLO: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "Hello!"}]
ONCE = "Once upon a time"


def test_a_chat_is_answered_with_the_same_text_as_over_zeromq(openai: OpenAI, address: str) -> None:
    answer = openai.chat.completions.create(
        model="chat", messages=HELLO, temperature=0, max_tokens=20
    )
    with Client(address) as client:
        expected = client.chat(
            [{"role": "user", "content": "Hello!"}], temperature=0, max_tokens=20
        ).result()
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert answer.object == "chat.completion"
    assert answer.model == "chat"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.usage.completion_tokens == expected.usage.completion_tokens
    assert answer.usage.total_tokens == expected.usage.total_tokens


def test_a_streamed_chat_has_the_same_text_and_ends_with_the_usage(openai: OpenAI) -> None:
    whole = openai.chat.completions.create(
        model="chat", messages=HELLO, temperature=0, max_tokens=30
    )
    chunks = list(
        openai.chat.completions.create(
            model="chat",
            messages=HELLO,
            temperature=0,
            max_completion_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({c.id for c in chunks}) == 1


def test_without_stream_options_no_chunk_has_usage(openai: OpenAI) -> None:
    stream = openai.chat.completions.create(model="chat", messages=HELLO, max_tokens=5, stream=True)
    assert all(chunk.usage is None and chunk.choices for chunk in stream)


def test_a_conversation_goes_on_with_the_answer_as_the_client_library_returns_it(
    openai: OpenAI,
) -> None:
    first = openai.chat.completions.create(model="chat", messages=HELLO, max_tokens=20)
    again = openai.chat.completions.create(
        model="chat",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hel"},
                                         {"type": "text", "text": "lo!"}]},
            first.choices[0].message.model_dump(),  # type: ignore[list-item]
            {"role": "user", "content": "Thanks."},
        ],
        max_tokens=5,
    )  # fmt: skip
    assert again.choices[0].message.content is not None


def test_a_story_is_continued(openai: OpenAI) -> None:
    answer = openai.completions.create(model="story", prompt=ONCE, temperature=0)
    assert answer.object == "text_completion"
    assert answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16  # what OpenAI's own API does by default
    streamed = openai.completions.create(model="story", prompt=ONCE, temperature=0, stream=True)
    chunks = list(streamed)
    assert "".join(c.choices[0].text for c in chunks) == answer.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_echo_begins_with_the_prompt(openai: OpenAI) -> None:
    answer = openai.completions.create(model="story", prompt=ONCE, echo=True, max_tokens=5)
    assert answer.choices[0].text.startswith(ONCE)


def test_several_choices_and_several_prompts_are_numbered_as_openai_does(openai: OpenAI) -> None:
    prompts = [ONCE, "The little dog"]
    singles = [
        openai.completions.create(model="story", prompt=p, seed=5, n=2, max_tokens=8)
        for p in prompts
    ]
    both = openai.completions.create(model="story", prompt=prompts, seed=5, n=2, max_tokens=8)
    expected = [choice.text for single in singles for choice in single.choices]
    assert [choice.text for choice in both.choices] == expected
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    texts = ["", "", "", ""]
    ends = []
    for chunk in openai.completions.create(
        model="story", prompt=prompts, seed=5, n=2, max_tokens=8, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
        if chunk.choices[0].finish_reason is not None:
            ends.append(chunk.choices[0].index)
    assert texts == expected
    assert sorted(ends) == [0, 1, 2, 3]


def test_a_choice_that_ends_early_says_so_while_the_others_go_on(openai: OpenAI) -> None:
    alone = openai.completions.create(model="story", prompt=ONCE, seed=5, n=2, max_tokens=64)
    long, short = (choice.text for choice in alone.choices)
    stop = next(short[i : i + 6] for i in range(len(short)) if short[i : i + 6] not in long)
    events: list[tuple[int, str | None, str]] = []
    for chunk in openai.completions.create(
        model="story", prompt=ONCE, seed=5, n=2, max_tokens=64, stop=stop, stream=True
    ):
        (choice,) = chunk.choices
        events.append((choice.index, choice.finish_reason, choice.text))
    ends = {index: at for at, (index, reason, _) in enumerate(events) if reason is not None}
    assert ends.keys() == {0, 1}
    assert events[ends[1]][1] == "stop"
    assert ends[1] < ends[0] == len(events) - 1
    assert "".join(text for index, _, text in events[ends[1] :] if index == 0)
    assert not [event for event in events[ends[1] + 1 :] if event[0] == 1]


def test_token_ids_come_whole_and_streamed_to_who_asks_for_them(openai: OpenAI) -> None:
    asked = {"return_token_ids": True}
    whole = openai.completions.create(
        model="story", prompt=ONCE, temperature=0, max_tokens=12, extra_body=asked
    )
    expected = whole.choices[0].model_dump()["token_ids"]
    assert len(expected) == 12
    streamed: list[int] = []
    for chunk in openai.completions.create(
        model="story", prompt=ONCE, temperature=0, max_tokens=12, stream=True, extra_body=asked
    ):
        streamed += chunk.choices[0].model_dump().get("token_ids", [])
    assert streamed == expected
    plain = openai.completions.create(model="story", prompt=ONCE, max_tokens=1)
    assert "token_ids" not in plain.choices[0].model_dump()


def test_an_answer_that_was_begun_is_continued(openai: OpenAI, address: str) -> None:
    messages = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello, my"},
    ]
    got = openai.chat.completions.create(
        model="chat",
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=8,
        extra_body={"continue_final_message": True},
    )
    with Client(address) as client:
        stream = client.chat(
            messages, model="chat", temperature=0, max_tokens=8, continue_last=True
        )
        anew = client.chat(messages[:1], model="chat", temperature=0, max_tokens=8)
        assert got.choices[0].message.content == stream.result().text != anew.result().text
    with pytest.raises(sdk.BadRequestError) as refused:
        openai.chat.completions.create(
            model="chat",
            messages=messages[:1],  # type: ignore[arg-type]
            extra_body={"continue_final_message": True},
        )
    assert refused.value.param == "continue_final_message"


def test_a_seed_makes_two_chat_choices_repeatable(openai: OpenAI) -> None:
    first, second = (
        openai.chat.completions.create(
            model="chat", messages=HELLO, n=2, seed=7, temperature=1, max_tokens=12
        )
        for _ in range(2)
    )
    texts = [choice.message.content for choice in first.choices]
    assert len(texts) == 2
    assert texts == [choice.message.content for choice in second.choices]


def test_chat_logprobs_are_there_whole_and_streamed(openai: OpenAI) -> None:
    whole = openai.chat.completions.create(
        model="chat",
        messages=HELLO,
        temperature=0,
        max_tokens=6,
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True},
    )
    assert whole.choices[0].logprobs is not None
    entries = whole.choices[0].logprobs.content
    assert entries is not None
    assert len(entries) == 6
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs) <= 0
        if entry.bytes is not None:
            assert bytes(entry.bytes).decode() == entry.token
    streamed = []
    for chunk in openai.chat.completions.create(
        model="chat",
        messages=HELLO,
        temperature=0,
        max_tokens=6,
        logprobs=True,
        top_logprobs=3,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        logprobs = chunk.choices[0].logprobs
        streamed += (logprobs.content or []) if logprobs is not None else []
    assert streamed == entries


def test_completion_logprobs_have_their_four_lists(openai: OpenAI) -> None:
    answer = openai.completions.create(
        model="story", prompt=ONCE, temperature=0, max_tokens=4, logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == 4
    assert logprobs.token_logprobs is not None
    assert all(value <= 0 for value in logprobs.token_logprobs)
    assert logprobs.top_logprobs is not None
    assert all(
        token in top for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True)
    )
    assert logprobs.text_offset is not None
    lengths = [len(token) for token in logprobs.tokens]
    assert logprobs.text_offset == [sum(lengths[:i]) for i in range(4)]


def test_a_stop_string_ends_the_text_before_it(openai: OpenAI) -> None:
    free = openai.completions.create(model="story", prompt=ONCE, temperature=0, max_tokens=30)
    word = free.choices[0].text.split()[4]
    ended = openai.completions.create(
        model="story", prompt=ONCE, temperature=0, max_tokens=30, stop=word
    )
    assert ended.choices[0].text == free.choices[0].text.partition(word)[0]
    assert ended.choices[0].finish_reason == "stop"
    assert ended.choices[0].model_extra == {"stop_reason": word}


def test_logit_bias_has_token_ids_as_strings(openai: OpenAI) -> None:
    answer = openai.completions.create(
        model="story", prompt=ONCE, temperature=0, max_tokens=3, logit_bias={"300": 100}, logprobs=0
    )
    assert answer.choices[0].logprobs is not None
    assert len(set(answer.choices[0].logprobs.tokens or [])) == 1


def test_models_are_listed_and_found_by_name(openai: OpenAI) -> None:
    assert sorted(model.id for model in openai.models.list()) == ["chat", "story"]
    assert openai.models.retrieve("story").owned_by == "tpserve"
    with pytest.raises(sdk.NotFoundError, match="loaded are: chat, story"):
        openai.models.retrieve("gpt-5")


def test_errors_arrive_as_the_client_librarys_exceptions(openai: OpenAI) -> None:
    with pytest.raises(sdk.NotFoundError) as missing:
        openai.chat.completions.create(model="gpt-5", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(sdk.NotFoundError):
        openai.chat.completions.create(model="gpt-5", messages=HELLO, stream=True)
    with pytest.raises(sdk.BadRequestError) as long:
        openai.completions.create(model="story", prompt="word " * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(sdk.BadRequestError) as long:
        openai.completions.create(model="story", prompt="word " * 5000, stream=True)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(sdk.BadRequestError, match=r"temperature is 200.*<= 100") as hot:
        openai.chat.completions.create(model="chat", messages=HELLO, temperature=200)
    assert (hot.value.code, hot.value.param) == ("invalid_value", "temperature")
    with pytest.raises(sdk.BadRequestError, match="tools is not supported") as tools:
        openai.chat.completions.create(
            model="chat",
            messages=HELLO,
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert (tools.value.code, tools.value.param) == ("unsupported_parameter", "tools")
