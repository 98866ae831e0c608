"""Databases for the tests of sessions."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.store import Database
from tests.postgres import empty_schema


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database: a file, or a schema in PostgreSQL."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'tpserve.db'}"
        return
    with empty_schema(request.getfixturevalue("postgres_url")) as url:
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """Opened."""
    opened = Database(database_url)
    opened.open()
    yield opened
    opened.close()
