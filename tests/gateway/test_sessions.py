"""Sessions over HTTP: the routes, whose they are, and turns as they are streamed or broken off."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from client.zmq_client import Client
from tests.e2e.server import Server, wait_until
from tests.gateway.process import GatewayProcess
from tests.gateway.test_clients import raw_post, running

GREEDY = {"temperature": 0, "max_tokens": 12}
LONG = {"temperature": 1, "seed": 1, "ignore_eos": True, "max_tokens": 900, "logprobs": 20}
ADA, BOB = "ada-ada-ada", "bob-bob-bob"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    database = tmp_path_factory.mktemp("sessions") / "tpserve.db"
    with Server("--kv-memory", "256M", "--database", f"sqlite:///{database}") as started:
        started.wait_ready()
        yield started


@pytest.fixture(scope="module")
def api(server: Server) -> Iterator[httpx.Client]:
    with GatewayProcess(server.address) as gateway, gateway.http() as client:
        yield client


def create(api: httpx.Client, **body: Any) -> int:
    answer = api.post("/api/sessions", json={"kind": "chat", "params": GREEDY, **body})
    assert answer.status_code == 201, answer.text
    session: int = answer.json()["session"]["id"]
    return session


def send(api: httpx.Client, session: int, text: str, **body: Any) -> dict[str, Any]:
    answer = api.post(f"/api/sessions/{session}/send", json={"text": text, **body})
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def texts(state: dict[str, Any]) -> list[str]:
    return [message["content"] for message in state["messages"]]


def events_of(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", text
    return [json.loads(line) for line in lines[:-1]]


def test_a_conversation_goes_on_back_and_another_way(api: httpx.Client) -> None:
    session = create(api, title="Birds", system="Be brief.")
    first = send(api, session, "Hello!")
    said = first["stored"]
    assert said["session"] == session
    assert first["result"]["choices"][0]["text"]
    assert not {"id", "v", "event"} & (said.keys() | first["result"].keys())
    send(api, session, "And then?")
    path = f"/api/sessions/{session}"
    state = api.get(path).json()
    assert state.keys() == {"session", "messages", "can_undo", "can_redo"}
    assert state["session"]["title"] == "Birds"
    assert texts(state)[0] == "Hello!"
    assert len(texts(state)) == 4

    back = api.post(f"{path}/rollback", json={"message": said["answer"]}).json()
    assert texts(back) == texts(state)[:2]
    assert texts(api.post(f"{path}/undo").json()) == texts(state)
    assert texts(api.post(f"{path}/redo", json={}).json()) == texts(back)

    other = api.post(f"{path}/regenerate", json={"params": {"max_tokens": 3}}).json()
    assert other["stored"]["answer"] != said["answer"]
    on = api.post(f"{path}/continue").json()
    assert on["stored"]["answer"] == other["stored"]["answer"]
    edited = {"message": said["user_message"], "text": "Good morning!"}
    assert api.post(f"{path}/edit", json=edited).status_code == 200
    assert texts(api.get(path).json())[0] == "Good morning!"
    chosen = api.post(f"{path}/branch", json={"message": said["answer"]}).json()
    assert texts(chosen) == texts(state)  # with what was selected below it


def test_settings_and_a_storys_text_can_be_changed(api: httpx.Client) -> None:
    session = create(api, kind="story", title="One")
    path = f"/api/sessions/{session}"
    info = api.patch(path, json={"title": "Two", "model": "story"}).json()["session"]
    assert (info["title"], info["model"]) == ("Two", "story")
    assert api.patch(path, json={"model": None}).json()["session"]["model"] is None
    assert api.patch(path, json={}).status_code == 400
    text = "Once upon a time there was a cat."
    assert "".join(texts(api.put(f"{path}/text", json={"text": text}).json())) == text
    stored = api.post(f"{path}/regenerate", json={"params": {**GREEDY, "n": 2}}).json()["stored"]
    assert len(stored["answers"]) == 2
    assert stored["answer"] == stored["answers"][0]


def test_what_is_kept_can_be_listed_searched_carried_away_and_deleted(api: httpx.Client) -> None:
    ids = [create(api, title=f"wombat number {i}") for i in range(3)]
    page = api.get("/api/sessions", params={"limit": 2}).json()
    assert [info["id"] for info in page["sessions"]] == ids[:0:-1]
    rest = api.get("/api/sessions", params={"limit": 2, "cursor": page["cursor"]}).json()
    assert rest["sessions"][0]["id"] == ids[0]
    hits = api.get("/api/sessions/search", params={"query": "wombat 1"}).json()["hits"]
    assert [hit["session"] for hit in hits] == [ids[1]]

    send(api, ids[0], "Hello!")
    exported = api.get(f"/api/sessions/{ids[0]}/export")
    copy = api.post("/api/sessions/import", json=exported.json())
    assert copy.status_code == 201
    assert texts(copy.json()) == texts(api.get(f"/api/sessions/{ids[0]}").json())
    assert api.delete(f"/api/sessions/{ids[0]}").json() == {"session": ids[0]}
    gone = api.get(f"/api/sessions/{ids[0]}")
    assert gone.status_code == 404
    assert gone.json()["error"]["code"] == "session_not_found"


def test_a_streamed_turn_is_the_events_of_its_job(api: httpx.Client) -> None:
    session = create(api)
    body = {"text": "Hello!", "stream": True}
    with api.stream("POST", f"/api/sessions/{session}/send", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = events_of(answer.read().decode())
    names = [event["event"] for event in events]
    assert names[:2] == ["queued", "started"]
    assert set(names[2:-2]) <= {"token", "progress"}
    assert names[-2:] == ["stored", "done"]
    streamed = "".join(event["text"] for event in events if event["event"] == "token")
    assert streamed == events[-1]["choices"][0]["text"]
    state = api.get(f"/api/sessions/{session}").json()
    assert state["messages"][-1]["id"] == events[-2]["answer"]
    assert state["messages"][-1]["content"] == streamed


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_leaves_what_was_written(
    api: httpx.Client, server: Server, stream: bool
) -> None:
    session = create(api, params=LONG)
    path = f"/api/sessions/{session}"
    with Client(server.address) as client:
        steps = client.status().totals.steps
        body = {"text": "Hello!", "stream": stream}
        connection = raw_post(api.base_url.port or 0, body, path=f"{path}/send")
        assert wait_until(lambda: client.status().totals.steps > steps + 10, 20)
        connection.close()
        assert wait_until(lambda: running(client) == 0, 20)

    def kept() -> bool:
        messages = api.get(path).json()["messages"]
        return len(messages) == 2 and messages[1]["partial"] and bool(messages[1]["content"])

    assert wait_until(kept, 10)


def test_a_session_takes_one_turn_at_a_time(api: httpx.Client) -> None:
    session = create(api, params=LONG)
    path = f"/api/sessions/{session}"
    with api.stream("POST", f"{path}/send", json={"text": "Hello!", "stream": True}) as first:
        pieces = first.iter_bytes()  # while it is kept, so is the connection
        next(pieces)
        for refused in (
            api.post(f"{path}/send", json={"text": "more"}),
            api.post(f"{path}/send", json={"text": "more", "stream": True}),
            api.post(f"{path}/undo"),
            api.delete(path),
        ):
            assert refused.status_code == 409, refused.text
            assert refused.json()["error"]["code"] == "session_busy"


def test_what_is_wrong_is_refused_with_its_name(api: httpx.Client) -> None:
    session = create(api)
    path = f"/api/sessions/{session}"
    for method, where, body, param in (
        ("POST", "/api/sessions", {"kind": "poem"}, "kind"),
        ("POST", "/api/sessions", {}, "kind"),
        ("POST", "/api/sessions", {"kind": "chat", "user": "ada"}, "user"),
        ("POST", "/api/sessions", {"kind": "chat", "titel": "x"}, "titel"),
        ("POST", f"{path}/send", {"text": "x", "id": "mine"}, "id"),
        ("POST", f"{path}/send", {"text": "x", "session": 1}, "session"),
        ("POST", f"{path}/send", {"text": "x", "params": {"top_p": 7}}, "params.top_p"),
        ("POST", f"{path}/rollback", {}, "message"),
        ("POST", f"{path}/undo", {"steps": 2}, "steps"),
        ("POST", "/api/sessions/0/undo", {}, "session"),
        ("GET", f"/api/sessions/{10**19 - 1}", None, "session"),
        ("POST", "/api/sessions/import", {"format": "x"}, "data.format"),
        ("GET", "/api/sessions?limit=0", None, "limit"),
        ("GET", "/api/sessions?limit=1&limit=2", None, "limit"),
        ("GET", "/api/sessions?page=2", None, "page"),
        ("GET", "/api/sessions/search", None, "query"),
        ("GET", "/api/sessions/0", None, "session"),
    ):
        answer = api.request(method, where, json=body)
        assert answer.status_code == 400, (where, body, answer.text)
        assert answer.json()["error"]["param"] == param, (where, body, answer.text)
    value = api.post(f"{path}/send", json={"text": "x", "params": {"top_p": 7}}).json()
    assert "params.top_p is 7:" in value["error"]["message"]
    echo = api.post("/api/sessions", json={"kind": "chat", "params": {"echo": True}})
    assert echo.status_code == 400
    assert echo.json()["error"]["param"] is None


def test_only_numbers_are_sessions(api: httpx.Client) -> None:
    for path in ("none", "-1", "1.5", "9" * 20, "9" * 6000):
        answer = api.get(f"/api/sessions/{path}")
        assert answer.status_code == 404, path
        assert answer.json()["error"]["code"] == "unknown_url"
    assert api.delete("/api/sessions/search").status_code == 405


def test_what_one_key_keeps_is_not_found_by_another(server: Server, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"ada:{ADA}\nbob:{BOB}\n")
    with GatewayProcess(server.address, "--api-key-file", str(keys)) as gateway:
        ada = gateway.http(headers={"Authorization": f"Bearer {ADA}"})
        bob = gateway.http(headers={"Authorization": f"Bearer {BOB}"})
        with ada, bob:
            session = create(ada)
            assert [s["id"] for s in ada.get("/api/sessions").json()["sessions"]] == [session]
            assert bob.get("/api/sessions").json() == {"sessions": [], "cursor": None}
            path = f"/api/sessions/{session}"
            for answer in (
                bob.get(path),
                bob.get(f"{path}/export"),
                bob.delete(path),
                bob.post(f"{path}/send", json={"text": "Hello!"}),
                bob.post(f"{path}/send", json={"text": "Hello!", "stream": True}),
                bob.post(f"{path}/undo"),
            ):
                assert answer.status_code == 404, answer.text
                assert answer.json()["error"]["code"] == "session_not_found"
            send(ada, session, "Hello!")


def test_a_server_without_a_database_says_so(http: httpx.Client) -> None:
    answer = http.post("/api/sessions", json={"kind": "chat"})
    assert answer.status_code == 501
    assert answer.json()["error"]["code"] == "sessions_off"


def test_the_status_is_that_of_the_coordinator(http: httpx.Client) -> None:
    status = http.get("/api/status").json()
    assert status["ready"] is True
    assert {worker["rank"] for worker in status["workers"]} == {0, 1}
    assert [model["name"] for model in status["models"]] == ["story", "chat"]
    assert not {"id", "v", "event"} & status.keys()
