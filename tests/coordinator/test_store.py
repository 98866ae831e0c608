"""The database: made and brought up to date by itself, safe, and clear about what is wrong with it."""

import select
import socket
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text

from coordinator.store import Database, Store
from coordinator.tables import metadata
from shared.config import argument_parser, load_settings
from shared.errors import ConfigError, DatabaseError, InvalidRequestError, TpserveError

T = TypeVar("T")

DEADLINE_S = 30.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data" / "tpserve.db"


@pytest.fixture
def store(file: Path) -> Iterator[Store]:
    opened = Store(f"sqlite:///{file}")
    yield opened
    opened.close(DEADLINE_S)


def titles(connection: Connection) -> list[str]:
    return list(connection.execute(text("SELECT title FROM sessions ORDER BY id")).scalars())


def add(connection: Connection, title: str = "x") -> None:
    connection.execute(
        text(
            "INSERT INTO sessions (owner, kind, title, params, created, updated, step) "
            "VALUES ('local', 'chat', :title, '{}', 0, 0, 0)"
        ),
        {"title": title},
    )


def result(
    store: Store, work: Callable[[Connection], T], *, reads: bool = False
) -> T | TpserveError:
    """What a call comes to, as the engine would wait for it."""
    outcomes: list[T | TpserveError] = []
    store.submit(work, outcomes.append, reads=reads)
    while not outcomes:
        assert select.select([store.wake_fd], [], [], DEADLINE_S)[0], "no result came"
        for then in store.finished():
            then()
    return outcomes[0]


def test_migrations_make_the_tables_that_the_queries_use(database: Database) -> None:
    def differences(connection: Connection) -> list[object]:
        context = MigrationContext.configure(connection)
        found = compare_metadata(context, metadata)
        return [d for d in found if "words" not in str(d)]  # full-text indexes are SQL of their own

    assert database.call(differences) == []


def test_a_database_that_is_there_keeps_what_it_has(database_url: str) -> None:
    first = Database(database_url)
    first.call(add)
    first.close()
    second = Database(database_url)
    assert second.call(titles, reads=True) == ["x"]
    second.close()


def test_a_call_that_fails_leaves_nothing_behind(database: Database) -> None:
    def fails(connection: Connection) -> None:
        add(connection)
        raise InvalidRequestError("no")

    def breaks(connection: Connection) -> None:
        add(connection)
        connection.execute(text("SELECT * FROM nothing_of_this_name"))

    with pytest.raises(InvalidRequestError):
        database.call(fails)
    with pytest.raises(DatabaseError, match="nothing_of_this_name"):
        database.call(breaks)
    assert database.call(titles) == []


def test_sqlite_writes_to_the_disk_before_it_answers(file: Path) -> None:
    database = Database(f"sqlite:///{file}")

    def pragmas(connection: Connection) -> list[object]:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        return [connection.execute(text(f"PRAGMA {name}")).scalar() for name in names]

    assert database.call(pragmas) == ["wal", 2, 1, 5000]
    database.close()


def test_nobody_else_can_read_the_file(file: Path, store: Store) -> None:
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_calls_run_in_order_in_a_thread_of_their_own(store: Store) -> None:
    outcomes: list[object] = []

    def number_and_thread(number: int) -> Callable[[Connection], object]:
        return lambda _: (number, threading.current_thread().name)

    for number in range(20):
        store.submit(number_and_thread(number), outcomes.append)
    while len(outcomes) < 20:
        assert select.select([store.wake_fd], [], [], DEADLINE_S)[0]
        for then in store.finished():
            then()
    assert outcomes == [(number, "store") for number in range(20)]


def test_closing_waits_for_what_was_submitted(file: Path) -> None:
    store = Store(f"sqlite:///{file}")
    for _ in range(50):
        store.submit(add, lambda _: None)
    store.close(DEADLINE_S)
    database = Database(f"sqlite:///{file}")
    assert len(database.call(titles)) == 50
    database.close()


def test_a_full_database_refuses_and_recovers(store: Store) -> None:
    def fill(connection: Connection) -> None:
        pages = connection.execute(text("PRAGMA page_count")).scalar_one()
        connection.execute(text(f"PRAGMA max_page_count = {pages}"))
        add(connection, "long " * 100_000)

    outcome = result(store, fill)
    assert isinstance(outcome, DatabaseError)
    assert "full: free some space" in outcome.message
    assert result(store, add) is None
    assert result(store, titles) == ["x"]


def test_a_locked_database_is_an_error_and_then_serves_again(
    file: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    outcome = result(store, add)
    assert isinstance(outcome, DatabaseError)
    assert "locked: another program holds it" in outcome.message
    assert [record.exc_info for record in caplog.records] == [None], "said in a line"
    assert result(store, titles, reads=True) == [], "reading goes on"
    other.execute("ROLLBACK")
    other.close()
    assert result(store, add) is None


def test_a_file_that_was_taken_away_is_made_anew(file: Path, store: Store) -> None:
    assert result(store, add) is None
    for part in file.parent.iterdir():
        part.unlink()
    assert result(store, titles) == []
    assert result(store, add) is None
    assert file.exists()


def test_a_call_with_a_mistake_of_ours_does_not_end_the_thread(store: Store) -> None:
    outcome = result(store, lambda _: [][0])
    assert isinstance(outcome, DatabaseError)
    assert result(store, titles) == []


def test_a_database_of_a_newer_version_is_refused(file: Path, store: Store) -> None:
    result(store, lambda c: c.execute(text("UPDATE alembic_version SET version_num = '9999'")))
    with pytest.raises(ConfigError, match=r"made by a newer version.*--database none"):
        Store(f"sqlite:///{file}")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:////dev/null/x.db", "writable"),
        ("postgresql+psycopg://me:secret@127.0.0.1:1/x", "is the database server running"),
    ],
)
def test_a_database_that_cannot_be_opened_is_named_without_its_password(
    url: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        Store(url)
    assert "secret" not in caught.value.message
    assert url.partition("@")[2] in caught.value.message


@pytest.mark.parametrize("query", ["", "?connect_timeout=2"])
def test_a_database_server_that_does_not_answer_is_given_up(
    query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setattr("coordinator.store._CONNECT_S", 2 if not query else 60)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(ConfigError, match="is the database server running"):
            Store(f"postgresql+psycopg://someone@127.0.0.1:{port}/tpserve{query}")
        assert time.monotonic() - began < 30


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database, but some text of mine\n" * 100)
    with pytest.raises(ConfigError, match="file is not a database: name another --database"):
        Store(f"sqlite:///{tmp_path / 'notes.txt'}")


@pytest.mark.parametrize("url", ["mysql://x", "sqlite://", "sqlite:///", "/tmp/x.db", ""])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="write sqlite:///FILE"):
        load_settings(argument_parser().parse_args(["--database", url]), {})


def test_settings_are_shown_without_the_password() -> None:
    url = "postgresql+psycopg://me:secret@db/x"
    shown = load_settings(argument_parser().parse_args(["--database", url]), {}).describe()
    assert "postgresql+psycopg://me:***@db/x" in shown
    assert "secret" not in shown
