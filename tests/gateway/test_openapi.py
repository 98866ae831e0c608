"""The OpenAPI document: complete, valid, and what the server really does."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import PROJECT
from tests.e2e.server import Server
from tests.gateway.process import GatewayProcess

SCHEMATHESIS = shutil.which("schemathesis") or shutil.which(
    "schemathesis", path=PROJECT / "build" / "clients" / "schemathesis" / "bin"
)
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    database = tmp_path_factory.mktemp("sessions") / "tpserve.db"
    with (
        Server("--kv-memory", "256M", "--database", f"sqlite:///{database}") as server,
        GatewayProcess(server.wait_ready()) as started,
    ):
        yield started


@pytest.fixture(scope="module")
def document(gateway: GatewayProcess) -> dict[str, Any]:
    with gateway.http() as http:
        content: dict[str, Any] = http.get("/openapi.json").json()
    return content


def test_every_route_of_the_documentation_is_described(document: dict[str, Any]) -> None:
    paths = document["paths"]
    assert paths["/v1/chat/completions"].keys() == {"post"}
    assert paths["/api/sessions/{session}"].keys() >= {"get", "delete"}
    written = (PROJECT / "docs" / "http.md").read_text()
    for path in paths:
        known = path.partition("{")[0].rstrip("/")
        assert known in written, f"{path} is not in docs/http.md"


def test_bodies_have_the_limits_of_the_protocol(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    chat = schemas["ChatCompletionRequest"]
    assert chat["required"] == ["messages"]
    assert chat["additionalProperties"] is False
    assert {"type": "number", "minimum": 0, "maximum": 100} in chat["properties"]["temperature"][
        "anyOf"
    ]
    send = schemas["SendTurnBody"]
    assert not {"op", "id", "v", "user", "session"} & send["properties"].keys()
    assert send["properties"]["stream"]["default"] is False
    assert "securitySchemes" not in document["components"]


def test_with_keys_the_document_says_so_and_needs_one(address: str) -> None:
    key = "sesame-sesame"
    with GatewayProcess(address, "--api-key", key) as gateway, gateway.http() as http:
        assert http.get("/openapi.json").status_code == 401
        answer = http.get("/openapi.json", headers={"Authorization": f"Bearer {key}"})
        assert answer.json()["security"] == [{"key": []}]
        assert answer.json()["paths"]["/health/live"]["get"]["security"] == []


@pytest.mark.slow
@pytest.mark.skipif(
    SCHEMATHESIS is None,
    reason="schemathesis is not installed: tests/clients/run.sh schemathesis puts it into build/",
)
def test_nothing_fails_and_no_answer_is_undocumented(
    gateway: GatewayProcess, tmp_path: Path
) -> None:
    assert SCHEMATHESIS is not None
    with gateway.http() as http:
        wanted = {"kind": "story", "params": {"max_tokens": 2}}
        job = {"id": "fuzzed", "kind": "story", "prompt": "x", "params": {"max_tokens": 2}}
        assert http.post("/api/jobs", json=job).status_code == 202
        session = http.post("/api/sessions", json=wanted).json()["session"]["id"]
    (tmp_path / "schemathesis.toml").write_text(
        f"[parameters]\nsession = {session}\njob = 'fuzzed'\n"
    )
    run = subprocess.run(
        [
            SCHEMATHESIS,
            "run",
            f"{gateway.url}/openapi.json",
            f"--checks={','.join(CHECKS)}",
            "--phases=examples,coverage,fuzzing",
            "--max-examples=5",
            "--max-time=30",
            "--generation-deterministic",
            "--request-timeout=30",
            "--exclude-path=/api/models",  # it could load what there is on this machine
            "--exclude-path=/api/models/{name}",
            "--exclude-method=DELETE",  # the others need what there is
            "--no-color",
        ],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    with httpx.Client(trust_env=False) as http:
        assert http.get(f"{gateway.url}/health/ready").status_code == 200
