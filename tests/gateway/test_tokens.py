"""Text to tokens and back, over ZeroMQ and over HTTP."""

import asyncio

import httpx
import pytest

from client.zmq_client import AsyncClient, Client
from shared.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError

TEXT = "Once upon a time there was a little bird."


def test_tokens_are_those_that_a_job_reads(address: str) -> None:
    with Client(address) as client:
        tokens = client.tokenize(TEXT)
        job = client.story(TEXT, max_tokens=1).result()
        assert (tokens.model, len(tokens.token_ids)) == ("story", job.usage.prompt_tokens)
        assert tokens.max_model_len == client.models()[0].max_model_len
        assert TEXT in client.detokenize(tokens.token_ids)
        messages = [{"role": "user", "content": "Hello!"}]
        tokens = client.tokenize(messages)
        chat = client.chat(messages, max_tokens=1).result()
        assert (tokens.model, len(tokens.token_ids)) == ("chat", chat.usage.prompt_tokens)
        assert "Hello!" in client.detokenize(tokens.token_ids, model="chat")


def test_what_cannot_be_turned_is_refused(address: str) -> None:
    with Client(address) as client:
        with pytest.raises(ModelNotFoundError, match="gpt-5"):
            client.tokenize("x", model="gpt-5")
        with pytest.raises(InvalidRequestError, match=r"token id 16000000.*vocabulary ends at"):
            client.detokenize([1, 16_000_000])
        with pytest.raises(ContextLengthError):
            client.tokenize("x" * 500_000)
        assert client.detokenize([]) == ""


def test_the_async_client_does_the_same(address: str) -> None:
    async def both() -> str:
        async with AsyncClient(address) as client:
            tokens = await client.tokenize(TEXT, model="chat", request_id="mine")
            return await client.detokenize(tokens.token_ids, model="chat")

    assert TEXT in asyncio.run(both())


def test_the_routes_of_http(http: httpx.Client, address: str) -> None:
    with Client(address) as client:
        expected = client.tokenize(TEXT)
    answer = http.post("/tokenize", json={"prompt": TEXT, "model": "story"}).json()
    assert answer == {
        "count": len(expected.token_ids),
        "max_model_len": expected.max_model_len,
        "tokens": expected.token_ids,
    }
    back = http.post("/detokenize", json={"tokens": expected.token_ids}).json()
    assert TEXT in back["prompt"]
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]})
    assert chat.json()["count"] > 1
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ):
        refused = http.post(path, json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == param
