"""Submitted jobs in the database: begun by one server at a time, ended once, kept for a while."""

import os
from typing import Any

import msgspec
import psutil
import pytest
from sqlalchemy import Connection, update

from coordinator import job_table
from coordinator.job_table import MAX_ATTEMPTS, Result
from coordinator.store import Database
from coordinator.tables import jobs
from shared.errors import InvalidRequestError, JobExistsError, JobNotFoundError
from shared.job_messages import ListJobs, StoredJobs, SubmitJob
from shared.messages import Cancelled, Failed, Message, SamplingParams

ME = job_table.this_server()
KEEP_S = 100


def story(name: str | None = None, prompt: str = "Once", **fields: object) -> SubmitJob:
    return SubmitJob(id="r", job=name, kind="story", prompt=prompt, **fields)  # type: ignore[arg-type]


def add(connection: Connection, request: SubmitJob, model: str = "story") -> int:
    return int(job_table.add(connection, request, model).number)


def put(database: Database, name: str, model: str = "story", **fields: object) -> int:
    request = story(name, **fields)  # type: ignore[arg-type]
    return database.call(lambda c: add(c, request, model))


def settle(database: Database, number: int, result: Result, keep_s: int = KEEP_S) -> Any:
    return database.call(lambda c: job_table.settle(c, number, ME, result, keep_s))


def pages(database: Database, request: ListJobs) -> StoredJobs:
    return database.call(lambda c: job_table.page(c, request))


def begin(database: Database, limit: int = 100, holder: str = ME) -> list[str]:
    taken = database.call(lambda c: job_table.take_next(c, holder, ["story", "chat"], limit))
    return [row.name for row in taken]


def state(database: Database, name: str) -> tuple[str, int]:
    row = database.call(lambda c: job_table.find(c, "local", name))
    return row.state, row.attempts


def other_holder(pid: int, host: str | None = None, created: float = 1.0) -> str:
    mine = ME.rsplit("/", 3)
    return f"{host or mine[0]}/{mine[1]}/{pid}/{created}"


def test_the_same_name_is_the_same_job_or_an_error(database: Database) -> None:
    params = SamplingParams(temperature=1, logit_bias={3: 1.5}, stop=["x"])
    first = database.call(lambda c: add(c, story("mine", params=params)))
    again = database.call(lambda c: add(c, story("mine", params=params)))
    assert again == first
    with pytest.raises(JobExistsError, match="'mine'"):
        database.call(lambda c: add(c, story("mine", "Twice", params=params)))
    for_ada = story("mine", "Twice", user="ada")
    assert database.call(lambda c: add(c, for_ada)) != first
    with pytest.raises(JobNotFoundError):
        database.call(lambda c: job_table.find(c, "bob", "mine"))


def test_what_runs_is_what_was_asked_for_with_a_seed_that_stays(database: Database) -> None:
    messages = [Message("user", "Hi \0 ü")]
    request = SubmitJob(id="r", job="j", kind="chat", messages=messages, priority=-3)
    database.call(lambda c: add(c, request, "chat"))
    row = database.call(lambda c: job_table.find(c, "local", "j"))
    work = job_table.work_of(row)
    assert (work.kind, work.messages, work.model, work.priority) == ("chat", messages, "chat", -3)
    assert work.params.seed is not None
    assert job_table.work_of(row) == work
    assert msgspec.structs.replace(work.params, seed=None) == request.params


def test_jobs_begin_by_priority_then_in_order_and_each_once(database: Database) -> None:
    for name, priority in (("a", 0), ("b", 5), ("c", -5), ("d", 0)):
        put(database, name, priority=priority)
    database.call(lambda c: add(c, story("e"), "another"))
    last = database.call(lambda c: job_table.find(c, "local", "b"))
    assert database.call(lambda c: job_table.standing_before(c, last)) == 4
    assert begin(database, 2) == ["c", "a"]
    assert begin(database) == ["d", "b"]
    assert begin(database) == []
    assert state(database, "a") == ("running", 1)
    assert state(database, "e") == ("queued", 0)


def test_a_job_ends_once_and_by_its_holder(database: Database) -> None:
    number = database.call(lambda c: add(c, story("a")))
    begin(database)
    done, late = Result(Cancelled(id="a")), Result(Failed(id="a", code="x", message="y"))
    thief = other_holder(1)
    assert database.call(lambda c: job_table.settle(c, number, thief, late, KEEP_S)) is None
    ended = database.call(lambda c: job_table.settle(c, number, ME, done, KEEP_S))
    assert ended is not None
    assert job_table.result_of(ended) == done
    assert ended.expires == pytest.approx(ended.ended + KEEP_S)
    assert database.call(lambda c: job_table.settle(c, number, ME, late, KEEP_S)) is None
    assert state(database, "a") == ("cancelled", 1)


def test_what_a_dead_server_held_is_begun_again_but_not_forever(database: Database) -> None:
    database.call(lambda c: add(c, story("a")))
    mine = psutil.Process()
    reborn = other_holder(os.getpid(), created=mine.create_time() - 5)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert begin(database, holder=reborn) == ["a"]
        given_up = database.call(lambda c: job_table.recover(c, KEEP_S))
        if attempt < MAX_ATTEMPTS:
            assert (given_up, state(database, "a")) == ([], ("queued", attempt))
    assert [row.name for row in given_up] == ["a"]
    result = job_table.result_of(given_up[0])
    assert result is not None
    assert isinstance(result.end, Failed)
    assert f"begun {MAX_ATTEMPTS} times" in result.end.message


def test_a_living_server_keeps_what_it_holds_as_long_as_it_renews(database: Database) -> None:
    far_away = other_holder(1, host="elsewhere")
    database.call(lambda c: add(c, story("a")))
    database.call(lambda c: add(c, story("b")))
    assert begin(database, 1) == ["a"]
    assert begin(database, 1, holder=far_away) == ["b"]
    database.call(lambda c: job_table.recover(c, KEEP_S))
    assert state(database, "a") == state(database, "b") == ("running", 1)

    database.call(lambda c: c.execute(update(jobs).values(lease=1.0)))
    database.call(lambda c: job_table.renew(c, ME))
    database.call(lambda c: job_table.recover(c, KEEP_S))
    assert state(database, "a") == ("running", 1)
    assert state(database, "b") == ("queued", 1)


def test_a_job_that_had_no_chance_loses_no_attempt(database: Database) -> None:
    number = database.call(lambda c: add(c, story("a")))
    begin(database)
    database.call(lambda c: job_table.put_back(c, number, ME, counts=False))
    assert state(database, "a") == ("queued", 0)
    begin(database)
    database.call(lambda c: job_table.put_back(c, number, other_holder(1), counts=True))
    assert state(database, "a") == ("running", 1)  # it was not that one's to put back


def test_only_a_waiting_job_is_cancelled_here_and_only_an_ended_one_removed(
    database: Database,
) -> None:
    for name in "ab":
        put(database, name)
    begin(database, 1)

    def cancel(connection: Connection, name: str) -> str:
        row = job_table.find(connection, "local", name)
        return str(job_table.cancel_queued(connection, row, KEEP_S).state)

    assert database.call(lambda c: cancel(c, "a")) == "running"
    assert database.call(lambda c: cancel(c, "b")) == "cancelled"
    with pytest.raises(InvalidRequestError, match="cancel it first"):
        database.call(lambda c: job_table.remove(c, "local", "a"))
    with pytest.raises(JobNotFoundError):
        database.call(lambda c: job_table.remove(c, "ada", "b"))
    database.call(lambda c: job_table.remove(c, "local", "b"))
    with pytest.raises(JobNotFoundError):
        database.call(lambda c: job_table.find(c, "local", "b"))


def test_jobs_are_forgotten_when_their_time_is_over(database: Database) -> None:
    for name, keep_s in (("short", 0), ("long", 1000)):
        number = put(database, name)
        begin(database)
        settle(database, number, Result(Cancelled(id=name)), keep_s)
    assert database.call(job_table.forget_expired) == 1
    page = database.call(lambda c: job_table.page(c, ListJobs(id="l")))
    assert [job.job for job in page.jobs] == ["long"]


def test_pages_go_through_all_jobs_of_one_user_newest_first(database: Database) -> None:
    for index in range(7):
        put(database, f"j{index}")
        put(database, f"j{index}", user="ada")
    begin(database, 2)
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = pages(database, ListJobs(id="l", limit=3, cursor=cursor))
        seen += [job.job for job in page.jobs]
        if (cursor := page.cursor) is None:
            break
    assert seen == [f"j{index}" for index in reversed(range(7))]
    running = database.call(lambda c: job_table.page(c, ListJobs(id="l", state="running")))
    assert [job.job for job in running.jobs] == ["j0"]
    with pytest.raises(InvalidRequestError, match="cursor"):
        database.call(lambda c: job_table.page(c, ListJobs(id="l", cursor="x")))
