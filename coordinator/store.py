"""The database of the sessions: opening it, keeping its tables current, and a thread for all its work.

Knows nothing of sessions. A call is a function of a connection; it runs in a transaction of its own,
off the engine's thread, and what it returns comes back through `finished`.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import platformdirs
from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from shared.config import without_password
from shared.errors import ConfigError, DatabaseError, QueueFullError, TpserveError

log = logging.getLogger("coordinator.store")

T = TypeVar("T")

_MIGRATIONS = Path(__file__).resolve().parent / "migrations"
_MIGRATION_LOCK = 0x7470_7365  # any number: two servers that start at once must agree on it
_BUSY_TIMEOUT_S = 5
_CONNECT_S = 10
"""In which a database server must have answered, unless its URL has a connect_timeout."""
_MAX_WAITING = 1024
_READS = "tpserve_reads"


class Database:
    """Connections to one database. Belongs to one thread at a time."""

    def __init__(self, url: str) -> None:
        """`url` as the setting has it, but not "none". Raises ConfigError."""
        if url == "auto":
            url = f"sqlite:///{platformdirs.user_data_path('tpserve') / 'tpserve.db'}"
        self.shown = without_password(url)
        """The URL without its password."""
        try:
            parsed = make_url(url)
            self._file = Path(parsed.database or "") if parsed.drivername == "sqlite" else None
            self._engine = _engine(url, self._file)
        except ImportError:
            raise ConfigError(
                f"database {self.shown} needs psycopg: install tpserve[postgresql]"
            ) from None
        except SQLAlchemyError as error:
            raise ConfigError(f"database {self.shown}: {error}") from None
        self._opened: tuple[int, int] | None = None
        """Device and inode of the file whose tables are current; zeros without a file."""

    def open(self) -> None:
        """Make it or bring its tables up to date, if that is not done yet. Raises DatabaseError."""
        if self._opened is not None and self._opened == self._identity():
            return
        self.close()  # the file was taken away: what is written to it would be lost
        try:
            if self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                # Conversations are private.
                os.close(os.open(self._file, os.O_RDWR | os.O_CREAT, 0o600))
            with self._engine.begin() as connection:
                _migrate(connection)
        except CommandError:
            raise DatabaseError(
                f"{self.shown} was made by a newer version of tpserve: install that one, or name "
                "another --database"
            ) from None
        except (OSError, SQLAlchemyError) as error:
            raise self._error(error) from None
        self._opened = self._identity()

    def call(self, work: Callable[[Connection], T], *, reads: bool = False) -> T:
        """Run `work` in a transaction; `reads`: it does not write.

        Raises DatabaseError when the database cannot do it; then nothing was written.
        """
        self.open()
        try:
            with self._engine.connect() as connection:
                connection.execution_options(**{_READS: reads})
                with connection.begin():
                    return work(connection)
        except SQLAlchemyError as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Disconnect; it is opened again when it is needed."""
        self._opened = None
        self._engine.dispose()

    def _identity(self) -> tuple[int, int] | None:
        if self._file is None:
            return 0, 0
        try:
            found = self._file.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _error(self, error: Exception) -> DatabaseError:
        """In words for people; the next call connects anew."""
        self._engine.dispose()
        if self._file is None:
            self._opened = None  # whatever answers next time may be another one
        cause = error.orig if isinstance(error, DBAPIError) and error.orig else error
        reason = str(cause).strip().partition("\n")[0]
        remedy = "see the server's log"
        if isinstance(error, OSError):
            remedy = "its file and folder must be writable"
        for sign, advice in (
            ("locked", "another program holds it; try again"),
            ("full", "free some space on its disk"),
            ("readonly", "its file and folder must be writable"),
            ("unable to open", "its folder must exist and be writable"),
            ("Permission", "its file and folder must be writable"),
            ("not a database", "name another --database, or move that file away"),
            ("onnection", "is the database server running?"),
        ):
            if sign in reason:
                remedy = advice
                break
        return DatabaseError(f"database {self.shown}: {reason}: {remedy}")


class Store:
    """Runs calls on a database one after the other, in a thread of its own."""

    def __init__(self, url: str) -> None:
        """Open the database. Raises ConfigError when that fails."""
        self._database = Database(url)
        try:
            self._database.open()
        except DatabaseError as error:
            raise ConfigError(f"{error.message} (--database none: no sessions)") from None
        self._calls: SimpleQueue[Callable[[], Callable[[], None]] | None] = SimpleQueue()
        self._finished: deque[Callable[[], None]] = deque()
        self._waiting = 0
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Becomes readable when `finished` has something."""
        # A daemon: a database that does not answer must not keep the server from stopping.
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def refuse_if_full(self) -> None:
        """Raises QueueFullError when too many calls wait for the database."""
        if self._waiting >= _MAX_WAITING:
            error = QueueFullError(
                f"{self._waiting} requests wait for the database, the limit is {_MAX_WAITING}: "
                "try again in 1 s"
            )
            error.retry_after_s = 1.0
            raise error

    def submit(
        self,
        work: Callable[[Connection], T],
        then: Callable[[T | TpserveError], None],
        *,
        reads: bool = False,
    ) -> None:
        """Have `work` done; `finished` hands out `then` with its result, or its error."""

        def call() -> Callable[[], None]:
            outcome: T | TpserveError
            try:
                outcome = self._database.call(work, reads=reads)
            except DatabaseError as error:
                # That it is away, full or locked takes a line, for each of many requests.
                away = isinstance(error.__cause__, OperationalError)
                log.error("%s", error.message, exc_info=None if away else error.__cause__)
                outcome = error
            except TpserveError as error:
                outcome = error
            except Exception as error:  # the thread's last resort: the client must hear
                log.exception("a call of the database")
                outcome = DatabaseError(f"the database's data cannot be used: {error}")
            return lambda: then(outcome)

        self._waiting += 1
        self._calls.put(call)

    def finished(self) -> Iterator[Callable[[], None]]:
        """What to call, in the caller's thread, for all calls that have ended since."""
        while self._finished:
            self._waiting -= 1
            yield self._finished.popleft()

    def close(self, timeout_s: float) -> None:
        """Let what was submitted be done, as long as that takes no more than `timeout_s`."""
        self._calls.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.error("the database did not finish in %g s", timeout_s)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            self._finished.append(call())
            os.eventfd_write(self.wake_fd, 1)
        self._database.close()


def _engine(url: str, file: Path | None) -> Engine:
    if file is None:
        limit = {} if "connect_timeout" in make_url(url).query else {"connect_timeout": _CONNECT_S}
        return create_engine(url, pool_size=1, pool_pre_ping=True, connect_args=limit)
    engine = create_engine(url)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # `_begin_sqlite` begins transactions, also for DDL
    for pragma in (
        f"busy_timeout = {_BUSY_TIMEOUT_S * 1000}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that first reads and then writes fails if another has written in between.
    reads = connection.get_execution_options().get(_READS, False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _migrate(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
