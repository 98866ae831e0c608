"""Databases for the tests of sessions."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from coordinator.store import Database


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database: a file, or a schema of its own in that of TPSERVE_TEST_POSTGRES."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'tpserve.db'}"
        return
    url = os.environ.get("TPSERVE_TEST_POSTGRES")
    if not url:
        pytest.skip("TPSERVE_TEST_POSTGRES names no database: postgresql+psycopg://USER@HOST/NAME")
    schema = f"test_{uuid.uuid4().hex}"
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    yield f"{url}{'&' if '?' in url else '?'}options=-csearch_path%3D{schema}"
    with engine.begin() as connection:
        connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
    engine.dispose()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """Opened."""
    opened = Database(database_url)
    opened.open()
    yield opened
    opened.close()
