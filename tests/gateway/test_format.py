"""What goes over the wire, byte for byte where clients depend on it."""

import json
from typing import Any

import httpx
import pytest

CHAT: dict[str, Any] = {
    "model": "chat",
    "messages": [{"role": "user", "content": "Hello!"}],
    "max_tokens": 4,
    "temperature": 0,
    "ignore_eos": True,
}
STORY: dict[str, Any] = {"model": "story", "prompt": "Once", "max_tokens": 3, "temperature": 0}


def test_a_chat_stream_is_exactly_openais_format(http: httpx.Client) -> None:
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    answer = http.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "format-1"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-request-id"] == "format-1"
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    first = chunks[0]
    assert list(first) == ["id", "object", "created", "model", "choices", "usage"]
    assert first["id"] == "chatcmpl-format-1"
    assert first["object"] == "chat.completion.chunk"
    assert first["usage"] is None
    assert list(first["choices"][0]) == ["index", "delta", "logprobs", "finish_reason"]
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in c["choices"][0]["delta"] for c in chunks[1:-1])
    last = chunks[-2]["choices"][0]
    assert (last["delta"], last["finish_reason"]) == ({}, "length")
    usage = chunks[-1]["usage"]
    assert chunks[-1]["choices"] == []
    assert usage["completion_tokens"] == 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + 4
    assert set(usage) == {
        *("prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details")
    }


def test_a_completion_stream_is_exactly_openais_format(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={**STORY, "stream": True})
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert list(chunks[0]) == ["id", "object", "created", "model", "choices"]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert list(chunks[0]["choices"][0]) == ["index", "text", "logprobs", "finish_reason"]
    assert chunks[-1]["choices"][0]["text"] == ""
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"temperature": -1}, "temperature", ["-1", ">= 0"]),
        ({"temperature": "hot"}, "temperature", ["'hot'", "float"]),
        ({"top_p": 0}, "top_p", ["0", "> 0"]),
        ({"n": 0}, "n", ["0", ">= 1"]),
        ({"n": 65}, "n", ["65", "<= 64"]),
        ({"seed": 1.5}, "seed", ["1.5", "int"]),
        ({"max_tokens": 0}, "max_tokens", ["0", ">= 1"]),
        ({"max_completion_tokens": 7}, "max_tokens", ["4", "7", "one of them"]),
        ({"stop": ["a"] * 17}, "stop", ["16"]),
        ({"logit_bias": {"x": 1}}, "logit_bias", ["'x'", "int"]),
        ({"logit_bias": {"5": 101}}, "logit_bias", ["101", "<= 100"]),
        ({"top_logprobs": 3}, "top_logprobs", ["needs logprobs"]),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", ["21", "<= 20"]),
        ({"priority": 101}, "priority", ["101", "<= 100"]),
        ({"stream_options": {"include_usage": True}}, "stream_options", ["stream: true"]),
        ({"stream": "yes"}, "stream", ["'yes'", "bool"]),
        ({"messages": []}, "messages", ["[]", ">= 1"]),
        ({"messages": "hi"}, "messages", ["'hi'", "array"]),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", ["'robot'"]),
        ({"messages": [{"role": "user"}]}, "messages[0].content", ["missing"]),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", ["5"]),
        ({"best_off": 2}, "best_off", ["not known"]),
        ({"echo": True}, "echo", ["not known"]),
        ({"frequency_penalty": 3}, "frequency_penalty", ["3", "<= 2"]),
        ({"min_tokens": 9}, None, ["min_tokens is 9"]),
        ({"model": 5}, "model", ["5", "str"]),
    ],
)
def test_a_bad_value_is_refused_with_its_name_the_value_and_the_limit(
    http: httpx.Client, change: dict[str, Any], param: str | None, words: list[str]
) -> None:
    answer = http.post("/v1/chat/completions", json={**CHAT, **change})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_value")
    assert error["param"] == param
    for word in words:
        assert word in error["message"], error["message"]


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [{"type": "function"}]},
        {"tool_choice": "auto"},
        {"functions": [{}]},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}},
        {"best_of": 2},
        {"suffix": "x"},
        {"store": True},
        {"reasoning_effort": "high"},
        {"service_tier": "flex"},
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    http: httpx.Client, change: dict[str, Any]
) -> None:
    answer = http.post("/v1/chat/completions", json={**CHAT, **change})
    assert answer.status_code == 400
    (name,) = change
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)
    assert f"{name} is not supported" in error["message"]


def test_values_that_ask_for_nothing_are_taken(http: httpx.Client) -> None:
    neutral = {
        "tools": None,
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "store": False,
        "stop": None,
        "logit_bias": None,
        "n": 1,
        "user": "somebody",
        "service_tier": "auto",
    }
    assert http.post("/v1/chat/completions", json={**CHAT, **neutral}).status_code == 200


def test_pictures_and_tool_calls_in_messages_are_refused_by_name(http: httpx.Client) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    for message, param in (
        ({"role": "user", "content": [picture]}, "messages[0].content[0]"),
        ({"role": "user", "content": "x", "name": "Bob"}, "messages[0].name"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls"),
    ):
        answer = http.post("/v1/chat/completions", json={**CHAT, "messages": [message]})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("unsupported_parameter", param)


def test_token_ids_as_a_prompt_are_refused_by_name(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={**STORY, "prompt": [1, 2, 3]})
    assert answer.json()["error"]["code"] == "unsupported_parameter"
    assert "token ids" in answer.json()["error"]["message"]


def test_too_many_choices_over_all_prompts_are_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={**STORY, "prompt": ["a", "b"], "n": 33})
    assert answer.status_code == 400
    assert "66 choices" in answer.json()["error"]["message"]
    assert "64" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "JSON object"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"messages": "\xff"}', "not valid JSON"),
        (b'{"a": 1e999}', "not valid JSON"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(
    http: httpx.Client, body: bytes, words: str
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = http.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_forms_are_refused_because_any_page_can_send_them(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", content=json.dumps(CHAT))
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]["message"]


def test_unknown_paths_and_methods_get_openais_error_shape(http: httpx.Client) -> None:
    missing = http.get("/v1/audio/speech")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "unknown_url"
    wrong = http.get("/v1/chat/completions")
    assert wrong.status_code == 405
    assert "POST" in wrong.json()["error"]["message"]
    assert wrong.headers["allow"] == "POST"


def test_a_request_id_is_taken_over_made_up_or_refused(http: httpx.Client) -> None:
    assert http.get("/version", headers={"X-Request-Id": "a.b-c_1"}).headers["x-request-id"] == (
        "a.b-c_1"
    )
    made = {http.get("/version").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    refused = http.get("/version", headers={"X-Request-Id": "a b"})
    assert refused.status_code == 400
    assert "X-Request-Id" in refused.json()["error"]["message"]


def test_the_longest_request_id_reaches_the_coordinator(http: httpx.Client) -> None:
    headers = {"X-Request-Id": "x" * 48}
    for _ in range(2):
        assert http.post("/v1/completions", json=STORY, headers=headers).status_code == 200
    assert http.get("/api/models", headers=headers).status_code == 200


def test_who_asks_for_another_protocol_is_answered_in_this_one(http: httpx.Client) -> None:
    """Java's client does so with every first request."""
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMA"}
    answer = http.post("/v1/completions", json=STORY, headers=headers)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 3


def test_a_penalty_that_no_logit_survives_is_refused(http: httpx.Client) -> None:
    assert http.post("/v1/completions", json={**STORY, "repetition_penalty": 0.01}).is_success
    refused = http.post("/v1/completions", json={**STORY, "repetition_penalty": 5e-324})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "repetition_penalty"
