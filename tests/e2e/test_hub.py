"""A server whose models come from the hub: downloaded once, then there without it."""

from pathlib import Path

import pytest

from client.zmq_client import Client
from tests.e2e.server import Server
from tests.hub.conftest import MODEL_FILES, hub, hub_env  # noqa: F401 - fixtures
from tests.hub.stub import Stub


@pytest.mark.slow
def test_a_server_downloads_its_model_and_starts_without_the_hub_afterwards(
    hub: Stub,  # noqa: F811 - the fixture
    hub_env: dict[str, str],  # noqa: F811
    tmp_path: Path,
) -> None:
    flags = ("--model", "story=org/story", "--kv-memory", "64M")
    with Server(*flags, env=hub_env) as server, Client(server.wait_ready()) as client:
        first = client.story("Once upon a time", max_tokens=12, temperature=0).result()
        (model,) = client.models()
    assert len(first.text) > 12
    assert Path(model.path).is_relative_to(tmp_path / "hf")
    assert any("downloading org/story" in line for line in server.log)
    assert not any("HTTP Request" in line for line in server.log)
    assert sorted(hub.downloads()).count("model.safetensors") == 1

    hub.stop()
    asked = len(hub.requests)
    with (
        Server(*flags, "--offline", env=hub_env) as server,
        Client(server.wait_ready()) as client,
    ):
        again = client.story("Once upon a time", max_tokens=12, temperature=0).result()
    assert again.text == first.text
    assert len(hub.requests) == asked


def test_a_model_that_cannot_be_had_ends_the_start_with_a_line(
    hub: Stub,  # noqa: F811
    hub_env: dict[str, str],  # noqa: F811
) -> None:
    with Server("--model", "chat=org/nothing", env=hub_env) as server:
        assert server.wait_exit(60) == 2
    errors = [line for line in server.log if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith("tpserve: error: model chat: there is no folder org/nothing")


@pytest.mark.slow
def test_the_authors_penalty_counts_unless_the_request_has_its_own(
    hub: Stub,  # noqa: F811
    hub_env: dict[str, str],  # noqa: F811
) -> None:
    hub.add("org/story", MODEL_FILES | {"generation_config.json": b'{"repetition_penalty": 2.0}'})
    flags = ("--model", "story=org/story", "--kv-memory", "64M")
    with Server(*flags, env=hub_env) as server, Client(server.wait_ready()) as client:

        def story(penalty: float | None) -> str:
            return (
                client.story("Once", max_tokens=40, temperature=0, repetition_penalty=penalty)
                .result()
                .text
            )

        assert story(None) == story(2.0)
        assert story(None) != story(1.0)
