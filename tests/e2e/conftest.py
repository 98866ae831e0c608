"""A server that keeps sessions, for the modules that have none of their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from client.zmq_client import Client
from tests.e2e.server import Server
from tests.e2e.sessions import start


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sessions") / "tpserve.db"


@pytest.fixture(scope="module")
def server(file: Path) -> Iterator[Server]:
    with start(file) as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected
