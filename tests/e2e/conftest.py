"""A server that keeps sessions, for the modules that have none of their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from client.zmq_client import Client
from tests.e2e.server import Server
from tests.e2e.sessions import start
from tests.postgres import empty_schema


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the SQLite database."""
    return tmp_path_factory.mktemp("sessions") / "tpserve.db"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, file: Path) -> Iterator[str]:
    """Of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{file}"
        return
    with empty_schema(request.getfixturevalue("postgres_url")) as url:
        yield url


@pytest.fixture(scope="module")
def server(database_url: str) -> Iterator[Server]:
    with start(database_url) as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected
