"""Running a server over HTTP: models that come and go, metrics, health."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from client.zmq_client import Client
from tests.conftest import PROJECT
from tests.e2e.server import wait_until
from tests.gateway.process import GatewayProcess

DEMO = str(PROJECT / "models" / "demo-story")


@pytest.fixture
def unloaded(http: httpx.Client) -> Iterator[str]:
    """A name to load a model by; it is gone afterwards."""
    yield "extra"
    http.delete("/api/models/extra", params={"force": "true"})


def test_models_are_listed_with_all_that_is_known(http: httpx.Client, address: str) -> None:
    listed = http.get("/api/models").json()["models"]
    with Client(address) as client:
        known = client.models()
    assert [model["name"] for model in listed] == [model.name for model in known]
    assert listed[0]["weight_bytes"] == known[0].weight_bytes
    assert listed[0]["state"] == "ready"


def test_a_model_is_loaded_used_and_unloaded(http: httpx.Client, unloaded: str) -> None:
    answer = http.post("/api/models", json={"name": unloaded, "path": DEMO, "dtype": "int8"})
    assert answer.status_code == 201
    assert answer.json()["model"]["name"] == unloaded
    assert answer.json()["model"]["dtype"] == "int8"
    used = http.post("/v1/completions", json={"model": unloaded, "prompt": "Once"})
    assert used.json()["model"] == unloaded
    gone = http.delete(f"/api/models/{unloaded}")
    assert gone.status_code == 200
    assert gone.json()["freed_bytes"] > 0
    assert http.get(f"/v1/models/{unloaded}").status_code == 404


def test_a_load_tells_how_far_it_is_as_events(http: httpx.Client, unloaded: str) -> None:
    answer = http.post("/api/models", json={"name": unloaded, "path": DEMO, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    told: list[dict[str, Any]] = [json.loads(e.removeprefix("data: ")) for e in events]
    assert told[-1]["model"]["name"] == unloaded
    phases = [event["phase"] for event in told[:-1]]
    assert phases
    assert set(phases) <= {"waiting", "opening", "reading", "testing"}
    for event in told[:-1]:
        assert event["model"] == unloaded
        for rank in event["ranks"]:
            assert set(rank) == {"rank", "bytes_done", "bytes_total", "seconds_left"}


def test_a_load_that_fails_says_why(http: httpx.Client, tmp_path: Path) -> None:
    body = {"name": "extra", "path": str(tmp_path)}
    plain = http.post("/api/models", json=body)
    assert plain.status_code == 400
    assert plain.json()["error"]["code"] == "invalid_model"
    streamed = http.post("/api/models", json={**body, "stream": True})
    last = json.loads(streamed.text.rstrip().rpartition("data: ")[2])
    assert last["error"]["code"] == "invalid_model"
    for change, param in (({"dtype": "fp7"}, "dtype"), ({"nam": 1}, "nam"), ({"path": 1}, "path")):
        refused = http.post("/api/models", json={**body, **change})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == param
    assert http.delete("/api/models/nobody").status_code == 404
    assert http.delete("/api/models/chat?force=maybe").json()["error"]["param"] == "force"
    assert http.delete("/api/models/chat?now=true").json()["error"]["param"] == "now"


def test_unloading_by_force_ends_a_stream_with_an_error_event(
    gateway: GatewayProcess, http: httpx.Client, unloaded: str
) -> None:
    http.post("/api/models", json={"name": unloaded, "path": DEMO})
    body = {
        **{"model": unloaded, "prompt": "Once", "n": 64, "max_tokens": 400},
        **{"ignore_eos": True, "stream": True, "logprobs": 20},
    }
    with gateway.http() as other, other.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: {")
        forced = http.delete(f"/api/models/{unloaded}", params={"force": "true"})
        assert forced.status_code == 200
        *_, last = [line for line in lines if line]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("model_unloaded", "server_error")


def test_metrics_are_what_prometheus_reads_and_dashboards_show(
    gateway: GatewayProcess, http: httpx.Client
) -> None:
    def samples() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        answer = http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }

    before = samples()
    story = {"model": "story", "prompt": "Once upon", "max_tokens": 8, "ignore_eos": True}
    usage = http.post("/v1/completions", json=story).json()["usage"]
    assert "[DONE]" in http.post("/v1/completions", json={**story, "stream": True}).text
    after = samples()

    def grown(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0.0)

    assert grown("tpserve_generation_tokens_total") == 16
    assert grown("tpserve_prompt_tokens_total") == 2 * usage["prompt_tokens"]
    assert grown("tpserve_time_to_first_token_seconds_count", model="story") == 2
    assert grown("tpserve_time_per_output_token_seconds_count", model="story") == 2
    assert grown("tpserve_http_streams_total", outcome="done") == 1
    assert (
        grown("tpserve_http_requests_total", method="POST", route="/v1/completions", status="200")
        == 2
    )
    assert after["tpserve_up", ()] == after["tpserve_ready", ()] == 1
    assert after["tpserve_num_requests_running", ()] == 0
    assert after["tpserve_num_requests_waiting", (("kind", "chat"),)] == 0
    assert 0 <= after["tpserve_kv_cache_usage_perc", ()] <= 1
    for rank in ("0", "1"):
        assert after["tpserve_worker_compute_seconds_total", (("rank", rank),)] > 0
        assert after["tpserve_worker_all_reduce_seconds_total", (("rank", rank),)] > 0


def test_typing_errors_in_paths_make_no_new_time_series(http: httpx.Client) -> None:
    for number in range(3):
        assert http.get(f"/wrong-{number}").status_code == 404
    text = http.get("/metrics").text
    assert "wrong-" not in text
    assert 'route="unmatched"' in text


def test_the_dashboard_asks_only_for_metrics_that_there_are(http: httpx.Client) -> None:
    http.post("/v1/completions", json={"model": "story", "prompt": "Once", "stream": True})
    names = {
        sample.name
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
    }
    dashboard = json.loads((PROJECT / "gateway" / "dashboards" / "tpserve.json").read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    assert len(queries) >= 8
    for query in queries:
        used = {word for word in query.replace("(", " ").replace("[", " ").split()
                if word.startswith("tpserve_")}  # fmt: skip
        assert used, query
        assert {word.partition("{")[0].rstrip(")") for word in used} <= names, query


def test_health_is_of_the_ranks_and_version_is_the_packages(http: httpx.Client) -> None:
    assert http.get("/health/ready").json() == {"status": "ready"}
    assert set(http.get("/version").json()) == {"version"}


def test_a_gateway_without_a_coordinator_lives_but_is_not_ready() -> None:
    with GatewayProcess("tcp://127.0.0.1:1") as gateway, gateway.http() as http:
        assert http.get("/health/live").status_code == 200
        answer = http.get("/health/ready")
        assert answer.status_code == 503
        assert answer.json()["status"] == "not_ready"
        assert wait_until(lambda: "tpserve_up 0.0" in http.get("/metrics").text, 10)
