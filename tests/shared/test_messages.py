"""What crosses a process is validated strictly and refused with a reason."""

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.messages import Choice, Done, Generate, Message, SamplingParams, Timings, Usage
from shared.protocol import (
    BadRequestError,
    decode_events,
    decode_request,
    encode_events,
    encode_request,
)

STORY: dict[str, Any] = {"v": 1, "op": "generate", "id": "a", "kind": "story", "prompt": "x"}
CHAT: dict[str, Any] = {
    "v": 1,
    "op": "generate",
    "id": "a",
    "kind": "chat",
    "messages": [{"role": "user", "content": "x"}],
}


def pack(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


def test_a_request_survives_the_wire() -> None:
    request = Generate(
        id="a",
        kind="chat",
        messages=[Message("user", "hi")],
        params=SamplingParams(temperature=0.5, seed=(1 << 63) - 1),
        stream=False,
    )
    assert decode_request(encode_request(request)) == request


def test_an_event_survives_the_wire() -> None:
    done = Done(
        id="a",
        choices=[Choice(text="t", token_ids=[1], finish_reason="stop")],
        model="m",
        usage=Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2),
        timings=Timings(
            queue_s=0.0,
            ttft_s=0.1,
            time_per_token_s=0.2,
            prefill_s=0.1,
            decode_s=0.2,
            prefill_tokens_per_s=1.0,
            decode_tokens_per_s=2.0,
        ),
    )
    assert decode_events(encode_events([done, done])) == [done, done]


@pytest.mark.parametrize(
    ("frame", "word"),
    [
        (STORY | {"unknown": 1}, "unknown"),
        (STORY | {"params": {"top_q": 1}}, "top_q"),
        (STORY | {"v": 2}, "version 2"),
        (STORY | {"v": "1"}, "version '1'"),
        (STORY | {"op": "destroy"}, "destroy"),
        (STORY | {"kind": "poem"}, "poem"),
        (STORY | {"prompt": 7}, "prompt"),
        (STORY | {"id": ""}, "id"),
        (STORY | {"id": "x" * 65}, "64"),
        (STORY | {"messages": CHAT["messages"]}, "messages"),
        ({k: v for k, v in STORY.items() if k != "prompt"}, "prompt"),
        (CHAT | {"messages": []}, "messages"),
        (CHAT | {"params": {"echo": True}}, "echo"),
        (STORY | {"priority": 1000}, "priority"),
        (CHAT | {"messages": [{"role": "god", "content": "x"}]}, "god"),
        (CHAT | {"messages": [{"role": "user", "content": "x", "name": "y"}]}, "name"),
        *(
            (STORY | {"params": {name: value}}, name)
            for name, value in [
                ("max_tokens", 0),
                ("max_tokens", 1.5),
                ("max_tokens", 1 << 40),
                ("temperature", -0.1),
                ("temperature", math.nan),
                ("temperature", math.inf),
                ("top_p", 0),
                ("top_p", 1.1),
                ("top_p", math.nan),
                ("top_k", -1),
                ("seed", -1),
                ("seed", 1 << 63),
                ("min_p", 1.5),
                ("repetition_penalty", 0),
                ("presence_penalty", 3),
                ("frequency_penalty", math.nan),
                ("logit_bias", {5: 1000}),
                ("logit_bias", {"a": 1}),
                ("stop", [""]),
                ("stop", ["x"] * 17),
                ("stop_token_ids", [-1]),
                ("min_tokens", -1),
                ("ignore_eos", "yes"),
                ("n", 0),
                ("n", 65),
                ("logprobs", 21),
            ]
        ),
    ],
)
def test_a_bad_request_is_refused_naming_what_is_wrong(frame: dict[str, Any], word: str) -> None:
    with pytest.raises(BadRequestError, match=word):
        decode_request(pack(frame))


def test_the_refusal_knows_the_request_id_when_it_can_be_read() -> None:
    with pytest.raises(BadRequestError) as caught:
        decode_request(pack(STORY | {"unknown": 1}))
    assert caught.value.request_id == "a"
    with pytest.raises(BadRequestError) as caught:
        decode_request(b"\xc1 no msgpack")
    assert caught.value.request_id == ""


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(BadRequestError):
        decode_request(b"\x91" * 100_000)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_decoder(frame: bytes) -> None:
    with pytest.raises(BadRequestError):
        decode_request(frame)
