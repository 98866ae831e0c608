"""Embeddings, over ZeroMQ and over HTTP."""

import asyncio
import base64
import json
import threading
from http.client import HTTPConnection

import httpx
import numpy as np
import pytest
import torch
from openai import BadRequestError, OpenAI
from transformers import AutoModelForCausalLM

from client.zmq_client import AsyncClient, Client
from shared.embedding_messages import Embed
from shared.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError
from shared.messages import Cancel, Cancelled, Failed
from tests.e2e.server import wait_until
from tests.gateway.process import GatewayProcess

TEXTS = [
    "Once upon a time there was a little bird.",
    "Tim had a red ball.",
    "The bird sang in the tree. " * 20,
]
LONG = "The bird sang in the tree. " * 60


def test_a_vector_is_the_normalised_mean_of_the_last_hidden_states(address: str) -> None:
    with Client(address) as client:
        (info,) = (m for m in client.models() if m.name == "story")
        reference = AutoModelForCausalLM.from_pretrained(info.path, dtype=torch.float32)
        found = client.embed(TEXTS, model="story")
        tokens = [client.tokenize(text, model="story").token_ids for text in TEXTS]
    assert found.model == "story"
    assert found.token_counts == [len(ids) for ids in tokens]
    for ids, vector in zip(tokens, found.floats, strict=True):
        with torch.inference_mode():
            states = reference(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        mean = states[0].mean(0).numpy()
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
        assert vector @ mean / np.linalg.norm(mean) > 0.999


def test_a_text_has_one_vector_however_it_comes(address: str) -> None:
    """Alone, among others, as tokens, after it was generated from, and beside jobs that generate."""
    with Client(address) as client:
        together = client.embed(TEXTS).vectors
        ids = [client.tokenize(text).token_ids for text in TEXTS]
        assert client.embed(ids).vectors == together
        assert client.embed([*reversed(TEXTS)]).vectors == together[::-1]
        client.story(TEXTS[2], max_tokens=2).result()  # its KV is in the cache now
        assert client.embed(TEXTS[2]).vectors == together[2:]
        with client.story("A dog", max_tokens=300, ignore_eos=True) as story:
            next(iter(story.events()))
            assert client.embed(TEXTS).vectors == together
    assert len(set(together)) == len(TEXTS)


def test_embedding_beside_generation_changes_no_token(address: str) -> None:
    def generate(client: Client) -> list[list[int]]:
        jobs = [
            client.story(text, max_tokens=60, seed=i, temperature=0.8, ignore_eos=True)
            for i, text in enumerate(TEXTS[:2])
        ]
        return [job.result().token_ids for job in jobs]

    stop = threading.Event()
    embedded: list[bytes] = []

    def embed_on() -> None:
        with Client(address) as other:
            while not stop.is_set():
                embedded.extend(other.embed([*TEXTS, LONG]).vectors)

    with Client(address) as client:
        alone = generate(client)
        busy = threading.Thread(target=embed_on)
        busy.start()
        try:
            beside = [generate(client) for _ in range(3)]
        finally:
            stop.set()
            busy.join()
    assert beside == [alone] * 3
    assert len(set(embedded)) == 4


def test_a_request_with_many_long_texts_lets_others_start(address: str) -> None:
    with Client(address) as client, Client(address) as other:
        connection = client._connection()
        request = Embed(id="many", texts=[f"{i} {LONG}" for i in range(400)])
        connection.exchange.open(request)
        client.health()  # the request has arrived
        assert other.story("A dog", max_tokens=3).result().token_ids
        assert other.status().queued["embedding"] == 0
        assert other.status().kv_blocks_used > 0, "the texts were done before the story"
        connection.exchange.close("many")  # cancels it
        assert wait_until(lambda: other.status().kv_blocks_used == 0, 20)
        assert other.status().running == 0


def test_a_request_can_be_cancelled_and_then_has_one_last_event(address: str) -> None:
    with Client(address) as client:
        connection = client._connection()
        connection.exchange.open(Embed(id="long", texts=[f"{i} {LONG}" for i in range(400)]))
        assert wait_until(lambda: client.status().running > 0, 20)
        client.ask(Cancel(id="x", job="long"), Cancelled)
        while not isinstance(event := connection.next_event("long"), Cancelled):
            assert not isinstance(event, Failed)
        assert event.partial == []
        assert wait_until(lambda: client.status().kv_blocks_used == 0, 20)
        before = client.status().totals
        assert len(client.embed(TEXTS).vectors) == 3
        after = client.status().totals
        assert after.texts_embedded == before.texts_embedded + 3
        assert after.jobs_done == before.jobs_done + 1


def test_what_cannot_be_embedded_is_refused(address: str) -> None:
    with Client(address) as client:
        with pytest.raises(ModelNotFoundError, match="gpt-5"):
            client.embed("x", model="gpt-5")
        empty: tuple[str | list[int], ...] = ("", [])
        for text in empty:
            with pytest.raises(InvalidRequestError, match=r"text 1 .* is empty"):
                client.embed(["a", text])
        with pytest.raises(InvalidRequestError, match=r"text 0 .*vocabulary ends at"):
            client.embed([[16_000_000]])
        with pytest.raises(InvalidRequestError, match="length >= 1"):
            client.embed([])
        with pytest.raises(InvalidRequestError, match="length <= 2048"):
            client.embed(["a"] * 2049)
        most = client.tokenize("a").max_model_len
        with pytest.raises(ContextLengthError, match=f"{most + 1} tokens.*holds {most}"):
            client.embed([[5] * (most + 1)])
        assert client.embed([[5] * most]).token_counts == [most]


def test_the_async_client_does_the_same(address: str) -> None:
    async def ask() -> list[bytes]:
        async with AsyncClient(address) as client:
            found = await asyncio.gather(*(client.embed(text) for text in TEXTS))
            return [vector for one in found for vector in one.vectors]

    with Client(address) as client:
        assert asyncio.run(ask()) == client.embed(TEXTS).vectors


def test_the_openai_sdk_gets_the_same_vectors(openai: OpenAI, address: str) -> None:
    with Client(address) as client:
        found = client.embed(TEXTS, model="chat")
        ids = client.tokenize(TEXTS[0], model="chat").token_ids
    answer = openai.embeddings.create(model="chat", input=TEXTS)  # asks for base64 by itself
    assert [item.embedding for item in answer.data] == found.floats
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert answer.model == "chat"
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(found.token_counts)
    for given in (TEXTS[0], [TEXTS[0]], ids, [ids]):
        one = openai.embeddings.create(model="chat", input=given, encoding_format="float")
        assert [item.embedding for item in one.data] == found.floats[:1]
    size = len(found.floats[0])
    openai.embeddings.create(model="chat", input="a", dimensions=size, user="me")
    with pytest.raises(BadRequestError, match=f"gives {size}, which cannot be changed") as refused:
        openai.embeddings.create(model="chat", input="a", dimensions=size - 1)
    assert (refused.value.param, refused.value.code) == ("dimensions", "unsupported_parameter")


def test_the_route_of_http(http: httpx.Client, address: str) -> None:
    answer = http.post("/v1/embeddings", json={"input": "a", "user": None}).json()
    assert answer["object"] == "list"
    (item,) = answer["data"]
    assert (item["object"], item["index"]) == ("embedding", 0)
    coded = http.post("/v1/embeddings", json={"input": "a", "encoding_format": "base64"}).json()
    vector = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), dtype="<f4")
    assert vector.tolist() == item["embedding"]
    assert "tpserve_texts_embedded_total" in http.get("/metrics").text


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({}, 400, "input", "invalid_value"),
        ({"input": ""}, 400, "input", "invalid_value"),
        ({"input": []}, 400, "input", "invalid_value"),
        ({"input": ["a", ""]}, 400, "input[1]", "invalid_value"),
        ({"input": ["a", 5]}, 400, "input[1]", "invalid_value"),
        ({"input": [[1], [-1]]}, 400, "input[1]", "invalid_value"),
        ({"input": [True]}, 400, "input", "invalid_value"),
        ({"input": ["a"] * 2049}, 400, "input", "invalid_value"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format", "invalid_value"),
        ({"input": "a", "dimensions": 3}, 400, "dimensions", "unsupported_parameter"),
        ({"input": "a", "truncate": True}, 400, "truncate", "invalid_value"),
        ({"input": "a", "model": "gpt-5"}, 404, None, "model_not_found"),
        ({"input": [[5] * 100_000]}, 400, None, "context_length_exceeded"),
    ],
)
def test_errors_have_the_shape_of_openai(
    body: dict[str, object], status: int, param: str | None, code: str, http: httpx.Client
) -> None:
    answer = http.post("/v1/embeddings", json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error


def test_a_client_that_goes_away_cancels_its_request(gateway: GatewayProcess, address: str) -> None:
    body = json.dumps({"input": [f"{i} {LONG}" for i in range(400)]})
    with Client(address) as client:
        before = client.status().totals.texts_embedded
        connection = HTTPConnection("127.0.0.1", gateway.port)
        connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        assert wait_until(lambda: client.status().running > 0, 20)
        connection.close()
        assert wait_until(lambda: client.status().kv_blocks_used == 0, 20)
        assert client.status().running == 0
        assert client.status().totals.texts_embedded < before + 400
