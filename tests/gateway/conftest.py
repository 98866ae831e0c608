"""One server with the bundled models, and one gateway before it, for the tests that only ask."""

from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI

from tests.e2e.server import Server
from tests.gateway.process import GatewayProcess


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Of the coordinator."""
    with Server("--workers", "2", "--threads-per-worker", "1") as server:
        yield server.wait_ready()


@pytest.fixture(scope="session")
def gateway(address: str) -> Iterator[GatewayProcess]:
    with GatewayProcess(address) as started:
        yield started


@pytest.fixture(scope="session")
def http(gateway: GatewayProcess) -> Iterator[httpx.Client]:
    with gateway.http() as client:
        yield client


@pytest.fixture(scope="session")
def openai(gateway: GatewayProcess) -> Iterator[OpenAI]:
    with gateway.openai() as client:
        yield client
