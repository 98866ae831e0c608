"""The database on a disk that fills up: clear errors, nothing lost, and it recovers by itself."""

import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.zmq_client import Client
from shared.errors import DatabaseError
from tests.e2e.sessions import greedy, path, say, start


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(file: Path) -> None:
    """Take all room that is left."""
    with file.open("wb", buffering=0) as ballast:
        for size in (1 << 16, 1 << 12):
            try:
                while True:
                    ballast.write(b"x" * size)
            except OSError:
                os.fsync(ballast.fileno())


def test_a_full_disk_costs_what_cannot_be_stored_and_nothing_else(disk: Path) -> None:
    file, ballast = disk / "tpserve.db", disk / "ballast"
    with start(f"sqlite:///{file}") as server, Client(server.address) as client:
        session = greedy(client)
        say(client, session, "Hello, my name is Ada.")
        before = path(client, session)
        job = client.jobs.submit([{"role": "user", "content": "Hello!"}], temperature=0).job
        done = client.jobs.follow(job).result()

        fill(ballast)
        for refused in (
            lambda: client.sessions.send(session, "word " * 300).result(),
            lambda: client.sessions.create(title="x" * 200, system="y" * 9000),
            lambda: client.jobs.submit("long " * 2000),
        ):
            with pytest.raises(DatabaseError, match="full: free some space"):
                refused()
        assert client.story("Hello", max_tokens=3).result().token_ids
        assert path(client, session) == before
        assert client.jobs.get(job).end is not None
        assert client.jobs.follow(job).result().choices == done.choices

        ballast.unlink()
        answer = client.sessions.send(session, "What is my name?").result()
        assert "Ada" in answer.text
        assert client.jobs.follow(client.jobs.submit("a", temperature=0).job).result().text
        after = path(client, session)
        assert server.stop() == 0
    with sqlite3.connect(file) as found:
        assert found.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    found.close()
    with start(f"sqlite:///{file}") as server, Client(server.address) as client:
        assert path(client, session) == after


def test_an_answer_for_which_there_is_no_room_is_stored_when_there_is(disk: Path) -> None:
    file, ballast = disk / "tpserve.db", disk / "ballast"
    with start(f"sqlite:///{file}") as server, Client(server.address) as client:
        options = {"temperature": 1.0, "max_tokens": 900, "ignore_eos": True}
        jobs = [
            client.jobs.submit([{"role": "user", "content": f"{n}"}], n=8, **options).job  # type: ignore[arg-type]
            for n in range(8)
        ]
        fill(ballast)
        stuck = [job for job in jobs if client.jobs.get(job).end is None]
        assert stuck, "the jobs were too short for this test"
        ballast.unlink()
        for job in jobs:
            assert client.jobs.follow(job).result().choices
        assert {client.jobs.get(job).job.attempts for job in jobs} == {1}
