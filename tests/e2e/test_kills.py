"""kill -9 at random moments under load: what was acknowledged is there, once.

`TPSERVE_TEST_KILLS=200 tests/run.sh tests/e2e/test_kills.py` kills as often as a long night does.
"""

import os
import random
import sqlite3
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from client.zmq_client import Client
from shared.errors import ConnectionLostError, NotReadyError
from shared.session_messages import SessionInfo
from tests.e2e.server import Server, wait_until

KILLS = int(os.environ.get("TPSERVE_TEST_KILLS", "3"))
CLIENTS = 8
GREEDY = {"temperature": 0.0, "max_tokens": 12}


@dataclass
class Shadow:
    """What one client knows to be on the server."""

    sessions: dict[int, list[str]] = field(default_factory=dict)
    """Texts on the selected path."""
    doubtful: dict[int, list[str]] = field(default_factory=dict)
    """Sessions with a request that was not answered, and how their path may go on from its
    beginning that is known."""
    jobs: set[str] = field(default_factory=set)
    maybe_jobs: set[str] = field(default_factory=set)


class Worker(threading.Thread):
    """One client that does whatever comes to its mind until the server is gone."""

    def __init__(self, address: str, shadow: Shadow, seed: int) -> None:
        super().__init__()
        self._address, self._shadow = address, shadow
        self._random = random.Random(seed)
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            with Client(self._address) as client:
                while True:
                    self._one(client)
        except (ConnectionLostError, NotReadyError):
            pass
        except BaseException as problem:  # noqa: BLE001 - the test shows it
            self.problem = problem

    def _one(self, client: Client) -> None:
        shadow = self._shadow
        what = self._random.choice(["create", "send", "send", "send", "rollback", "submit"])
        if what == "submit":
            name = f"job-{self._random.getrandbits(60):x}"
            shadow.maybe_jobs.add(name)
            client.jobs.submit(f"One day {name}", job=name, **GREEDY)  # type: ignore[arg-type]
            shadow.jobs.add(name)
            return
        if what == "create" or not shadow.sessions:
            state = client.sessions.create(**GREEDY)  # type: ignore[arg-type]
            shadow.sessions[state.session.id] = []
            return
        session = self._random.choice(sorted(shadow.sessions))
        path = shadow.sessions[session]
        if what == "send":
            text = f"Hello {self._random.getrandbits(30)}"
            shadow.doubtful[session] = [text]
            answer = client.sessions.send(session, text).result()
            path += [text, answer.text]
        elif path:
            keep = self._random.randrange(len(path))
            state = client.sessions.get(session)
            before = state.messages[keep - 1].id if keep else None
            shadow.doubtful[session] = []
            client.sessions.rollback(session, before)
            del path[keep:]
        shadow.doubtful.pop(session, None)


def check(client: Client, shadow: Shadow) -> None:
    """The server has what the client knows; what the client was not told may be there or not."""
    for session, path in shadow.sessions.items():
        messages = client.sessions.get(session).messages
        found = [message.content for message in messages]
        new = shadow.doubtful.pop(session, None)
        if new is None:
            assert found == path, session
        elif new:  # a turn: with what was said, and perhaps what there was of an answer
            assert found[: len(path)] == path, session
            assert found[len(path) : len(path) + 1] in ([], new), session
            assert len(found) <= len(path) + 2, session
        else:  # a rollback to somewhere
            assert found == path[: len(found)], session
        shadow.sessions[session] = found
        if messages and messages[-1].role == "user":  # a turn that was cut: begin anew
            client.sessions.rollback(session, messages[-1].parent)
            shadow.sessions[session].pop()
    ids = [session.id for session in all_sessions(client)]
    assert len(set(ids)) == len(ids)
    for job in shadow.jobs:
        client.jobs.get(job)


def all_sessions(client: Client) -> list[SessionInfo]:
    """Page by page."""
    found: list[SessionInfo] = []
    cursor = None
    while True:
        page = client.sessions.page(limit=500, cursor=cursor)
        found += page.sessions
        if (cursor := page.cursor) is None:
            return found


def intact(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def test_what_was_acknowledged_survives_any_kill_once(tmp_path: Path) -> None:
    file = tmp_path / "tpserve.db"
    moments = random.Random(KILLS)
    shadows = [Shadow() for _ in range(CLIENTS)]
    for kill in range(KILLS + 1):
        with Server("--database", f"sqlite:///{file}") as server:
            server.wait_ready()
            with Client(server.address) as client:
                for shadow in shadows:
                    check(client, shadow)
                if kill == KILLS:
                    settle_all(client, shadows, file)
                    return
            workers = [
                Worker(server.address, shadow, seed=1000 * kill + index)
                for index, shadow in enumerate(shadows)
            ]
            for worker in workers:
                worker.start()
            time.sleep(moments.expovariate(1.5))
            server.process.kill()
            server.wait_exit(30)
            for worker in workers:
                worker.join(60)
                assert not worker.is_alive()
                assert worker.problem is None
        intact(file)


def settle_all(client: Client, shadows: list[Shadow], file: Path) -> None:
    """Every job that was acknowledged comes to one end; nobody has jobs that were not asked for."""
    jobs = sorted(set().union(*(shadow.jobs for shadow in shadows)))
    asked_for = set().union(*(shadow.maybe_jobs for shadow in shadows))

    def all_ended() -> bool:
        return all(client.jobs.get(job).end is not None for job in jobs)

    assert wait_until(all_ended, 120)
    states = {job: client.jobs.get(job).job.state for job in jobs}
    assert set(states.values()) <= {"done"}, states
    with sqlite3.connect(file) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM jobs")]
    assert len(names) == len(set(names))
    assert set(jobs) <= set(names) <= asked_for
    print(f"{KILLS} kills, {len(jobs)} jobs, {sum(len(s.sessions) for s in shadows)} sessions")
