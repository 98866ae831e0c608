"""Jobs that the server keeps, over HTTP."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from client.zmq_client import Client
from tests.e2e.server import Server, wait_until
from tests.gateway.process import GatewayProcess
from tests.gateway.test_clients import running

STORY: dict[str, Any] = {"kind": "story", "prompt": "Once upon a time"}
SHORT: dict[str, Any] = {**STORY, "params": {"temperature": 0, "max_tokens": 20}}
LONG: dict[str, Any] = {
    "kind": "chat",
    "messages": [{"role": "user", "content": "Hello!"}],
    "params": {"temperature": 1, "seed": 1, "max_tokens": 900, "ignore_eos": True, "logprobs": 20},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    database = tmp_path_factory.mktemp("jobs") / "tpserve.db"
    with Server("--kv-memory", "256M", "--database", f"sqlite:///{database}") as started:
        started.wait_ready()
        yield started


@pytest.fixture(scope="module")
def api(server: Server) -> Iterator[httpx.Client]:
    with GatewayProcess(server.address) as gateway, gateway.http() as client:
        yield client


def submit(api: httpx.Client, **body: Any) -> str:
    answer = api.post("/api/jobs", json=body)
    assert answer.status_code == 202, answer.text
    job: str = answer.json()["id"]
    return job


def ended(api: httpx.Client, job: str) -> dict[str, Any]:
    ends = ("done", "failed", "cancelled")
    assert wait_until(lambda: api.get(f"/api/jobs/{job}").json()["state"] in ends, 60)
    content: dict[str, Any] = api.get(f"/api/jobs/{job}").json()
    return content


def events_of(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", text
    return [json.loads(line) for line in lines[:-1]]


def test_a_job_ends_without_its_client_and_can_be_followed_from_any_token(
    api: httpx.Client,
) -> None:
    job = submit(api, **SHORT, id="mine")
    assert job == "mine"
    assert submit(api, **SHORT, id="mine") == "mine"  # and runs once
    other = api.post("/api/jobs", json={**SHORT, "prompt": "Another", "id": "mine"})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "job_exists")

    done = ended(api, job)
    assert (done["state"], done["attempts"], done["model"]) == ("done", 1, "story")
    assert "job" not in done
    text = done["result"]["choices"][0]["text"]
    for start in (0, 5):
        answer = api.get(f"/api/jobs/{job}/stream", params={"from": start})
        events = events_of(answer.text)
        tokens = [t for e in events if e["event"] == "token" for t in e["token_ids"]]
        assert len(tokens) == 20 - start
        assert events[-1]["event"] == "done"
        assert text.endswith("".join(e["text"] for e in events if e["event"] == "token"))
    assert api.get("/api/jobs", params={"state": "done"}).json()["jobs"][0]["id"] == job
    assert api.delete(f"/api/jobs/{job}").json() == {"id": job}
    gone = api.get(f"/api/jobs/{job}")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")
    assert api.get(f"/api/jobs/{job}/stream").status_code == 404


def test_who_stops_following_ends_nothing_and_a_cancelled_job_keeps_its_text(
    api: httpx.Client, server: Server
) -> None:
    job = submit(api, **LONG)
    with api.stream("GET", f"/api/jobs/{job}/stream") as answer:
        pieces = answer.iter_text()
        seen = ""
        while '"token"' not in seen:
            seen += next(pieces)
    with Client(server.address) as client:
        assert running(client) == 1
        cancelled = api.post(f"/api/jobs/{job}/cancel").json()
        assert wait_until(lambda: running(client) == 0, 10)
    assert cancelled["state"] == "cancelled"
    assert cancelled["partial"][0]["text"]
    assert events_of(api.get(f"/api/jobs/{job}/stream").text)[-1]["event"] == "cancelled"


def test_what_is_wrong_is_refused_with_its_name(api: httpx.Client) -> None:
    for body, param in (
        ({**SHORT, "id": "a b"}, "id"),
        ({**SHORT, "job": "mine"}, "job"),
        ({**SHORT, "user": "ada"}, "user"),
        ({**SHORT, "stream": True}, "stream"),
        ({**SHORT, "params": {"top_p": 0}}, "params.top_p"),
        ({"kind": "story"}, None),
    ):
        answer = api.post("/api/jobs", json=body)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["param"] == param, answer.text
    assert api.get("/api/jobs?state=lost").json()["error"]["param"] == "state"
    assert api.get("/api/jobs/x/stream?from=-1").json()["error"]["param"] == "from"


def test_jobs_belong_to_keys(server: Server, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("ada:ada-ada-ada\nbob:bob-bob-bob\n")
    with GatewayProcess(server.address, "--api-key-file", str(keys)) as gateway:
        ada = gateway.http(headers={"Authorization": "Bearer ada-ada-ada"})
        bob = gateway.http(headers={"Authorization": "Bearer bob-bob-bob"})
        with ada, bob:
            job = submit(ada, **SHORT)
            assert ended(ada, job)["state"] == "done"
            assert bob.get("/api/jobs").json()["jobs"] == []
            for answer in (
                bob.get(f"/api/jobs/{job}"),
                bob.get(f"/api/jobs/{job}/stream"),
                bob.post(f"/api/jobs/{job}/cancel"),
                bob.delete(f"/api/jobs/{job}"),
            ):
                assert answer.status_code == 404, answer.text


def test_a_server_without_a_database_says_so(http: httpx.Client) -> None:
    answer = http.post("/api/jobs", json=SHORT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (501, "jobs_off")
