"""A PostgreSQL server of the tests' own, run with the programs that the distribution installs."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
from sqlalchemy import create_engine, text

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
_DEBIAN_VERSIONS = Path("/usr/lib/postgresql")  # its programs are in N/bin, and not on the PATH
_PROGRAMS = ("initdb", "postgres")
_USER = "postgres"


class PostgresMissingError(Exception):
    """What is needed to start a server is not on this machine."""


class Postgres:
    """A new cluster in a temporary folder, reached by a Unix socket that is in there too."""

    def __init__(self) -> None:
        """Make and start it. Raises PostgresMissingError."""
        self._programs = _find_programs()
        self._as_user = _unprivileged()
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-for-tests-"))
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"postgresql+psycopg://tpserve@/postgres?host={self._folder}"
        """As --database takes it."""
        try:
            if os.geteuid() == 0:
                shutil.chown(self._folder, _USER, _USER)
            self._initialise()
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        server = ["postgres", "-D", str(self._data), "-k", str(self._folder), "-h", ""]
        with self._log.open("ab") as log:
            # In a session of its own: Ctrl-C is for the tests, which still need it to clean up.
            self._process = subprocess.Popen(
                self._command(*server),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            said = self._log.read_text()
            assert self._process.poll() is None, f"PostgreSQL has ended:\n{said}"
            assert time.monotonic() < deadline, f"PostgreSQL takes no connections:\n{said}"
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop it, if it runs; its clients are disconnected."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)  # what it calls a fast shutdown
        try:
            self._process.wait(STOP_TIMEOUT_S)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            self._process = None

    def close(self) -> None:
        """Stop it and remove all it had."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    @property
    def _log(self) -> Path:
        return self._folder / "log"

    def _initialise(self) -> None:
        options = ["--username=tpserve", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8"]
        made = subprocess.run(
            self._command("initdb", "-D", str(self._data), *options, "--no-sync"),
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, f"initdb failed:\n{made.stdout}{made.stderr}"

    def _command(self, program: str, *arguments: str) -> list[str]:
        """It stops when whoever started it goes, however that goes."""
        with_parent = ["setpriv", "--pdeathsig", "INT", *self._as_user]
        return [*with_parent, str(self._programs / program), *arguments]

    def _answers(self) -> bool:
        try:
            psycopg.connect(host=str(self._folder), user="tpserve", dbname="postgres").close()
        except psycopg.OperationalError:
            return False
        return True


def _find_programs() -> Path:
    """The folder of the newest version."""
    found = shutil.which("postgres")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(_DEBIAN_VERSIONS.glob("*/bin"), key=_version, reverse=True)
    for folder in folders:
        if all((folder / program).exists() for program in _PROGRAMS):
            return folder
    raise PostgresMissingError(
        f"there is no PostgreSQL on the PATH or in {_DEBIAN_VERSIONS}: install postgresql, or name "
        "a database in TPSERVE_TEST_POSTGRES (postgresql+psycopg://USER@HOST/NAME)"
    )


def _version(programs: Path) -> float:
    """Of a folder like 15/bin or 9.6/bin."""
    return float(programs.parent.name)


def _unprivileged() -> list[str]:
    """What makes setpriv change to the user that the package has made: root may not run it."""
    if shutil.which("setpriv") is None:
        raise PostgresMissingError(
            "setpriv, which starts PostgreSQL, is missing: install util-linux"
        )
    if os.geteuid() != 0:
        return []
    try:
        pwd.getpwnam(_USER)
    except KeyError:
        raise PostgresMissingError(
            f"root may not run PostgreSQL, and there is no user {_USER} who could"
        ) from None
    return [f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups"]


@contextmanager
def empty_schema(url: str) -> Iterator[str]:
    """The URL of an empty database: a schema of its own, removed at the end, in that of `url`."""
    schema = f"test_{uuid.uuid4().hex}"
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    try:
        yield f"{url}{'&' if '?' in url else '?'}options=-csearch_path%3D{schema}"
    finally:
        with engine.begin() as connection:
            connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
        engine.dispose()
