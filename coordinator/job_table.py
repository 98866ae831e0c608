"""Submitted jobs in the database: what each call does within its transaction.

Several servers may share a database. A server holds the jobs that it runs; another takes one over
when its holder is a dead process of the same machine, or has not renewed its lease. Whoever ends a
job must still hold it, so it ends once.
"""

import secrets
import socket
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
from msgspec import Struct
from sqlalchemy import Connection, Row, and_, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from coordinator.tables import jobs
from shared.errors import (
    InvalidRequestError,
    JobExistsError,
    JobNotFoundError,
    QueueFullError,
    WorkerLostError,
)
from shared.job_messages import JobInfo, ListJobs, StoredJob, StoredJobs, SubmitJob
from shared.messages import Cancelled, Done, Failed, Generate

MAX_QUEUED = 10_000
MAX_ATTEMPTS = 5
"""A job during which the server has died so often is not begun again."""
LEASE_S = 60.0
FORGOTTEN_AT_ONCE = 1000

LastEvent = Done | Failed | Cancelled


class Result(Struct, frozen=True):
    """How a job has ended."""

    end: LastEvent
    text_ends: list[list[int]] = []
    """By answer: the length of its text after each token."""


def this_server() -> str:
    """Names this process among all that may share the database."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    process = psutil.Process()
    return f"{socket.gethostname()}/{boot}/{process.pid}/{process.create_time()}"


def add(connection: Connection, request: SubmitJob, model: str) -> Row[Any]:
    """Store a job, or find the one that a client has submitted before by the same name.

    Raises JobExistsError when that one asks for something else, QueueFullError.
    """
    wish = _wish(request)
    if request.job is not None:
        known = _find(connection, request.user, request.job)
        if known is not None:
            if known.request != wish:
                raise JobExistsError(
                    f"there is a job {request.job!r} already, and it asks for something else: "
                    "choose another id"
                )
            return known
    waiting = connection.execute(
        select(func.count()).select_from(jobs).where(jobs.c.state == "queued")
    ).scalar_one()
    if waiting >= MAX_QUEUED:
        raise QueueFullError(f"{waiting} submitted jobs wait, the limit is {MAX_QUEUED}")
    seed = request.params.seed
    row = {
        "owner": request.user,
        "name": request.job or secrets.token_hex(12),
        "state": "queued",
        "kind": request.kind,
        "model": model,
        "priority": request.priority,
        "request": wish,
        "seed": secrets.randbits(63) if seed is None else seed,
        "created": time.time(),
        "attempts": 0,
    }
    try:
        with connection.begin_nested():
            connection.execute(insert(jobs).values(row))
    except IntegrityError:  # the same name by another server, just now
        return add(connection, request, model)
    return find(connection, request.user, str(row["name"]))


def find(connection: Connection, user: str, name: str) -> Row[Any]:
    """Raises JobNotFoundError."""
    row = _find(connection, user, name)
    if row is None:
        raise JobNotFoundError(f"there is no job {name!r}")
    return row


def by_number(connection: Connection, numbers: Collection[int]) -> Sequence[Row[Any]]:
    """Of these, those that are there."""
    return connection.execute(select(jobs).where(jobs.c.number.in_(numbers))).all()


def standing_before(connection: Connection, row: Row[Any]) -> int:
    """How many waiting jobs are begun before this one."""
    sooner = or_(
        jobs.c.priority < row.priority,
        and_(jobs.c.priority == row.priority, jobs.c.number < row.number),
    )
    query = select(func.count()).select_from(jobs).where(jobs.c.state == "queued", sooner)
    return int(connection.execute(query).scalar_one())


def page(connection: Connection, request: ListJobs) -> StoredJobs:
    """The newest first. Raises InvalidRequestError for a cursor that is none."""
    query = select(jobs).where(jobs.c.owner == request.user)
    if request.state is not None:
        query = query.where(jobs.c.state == request.state)
    if request.cursor is not None:
        if not request.cursor.isdecimal() or int(request.cursor) >= 1 << 63:
            raise InvalidRequestError(f"cursor {request.cursor!r} is none of this server's")
        query = query.where(jobs.c.number < int(request.cursor))
    rows = connection.execute(query.order_by(jobs.c.number.desc()).limit(request.limit + 1)).all()
    more = len(rows) > request.limit
    return StoredJobs(
        id=request.id,
        jobs=[info(row) for row in rows[: request.limit]],
        cursor=str(rows[request.limit - 1].number) if more else None,
    )


def take_next(
    connection: Connection, holder: str, models: Collection[str], limit: int
) -> Sequence[Row[Any]]:
    """Begin the next jobs for these models; they are this holder's from now on."""
    query = (
        select(jobs.c.number)
        .where(jobs.c.state == "queued", jobs.c.model.in_(models))
        .order_by(jobs.c.priority, jobs.c.number)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    numbers = connection.execute(query).scalars().all()
    now = time.time()
    connection.execute(
        update(jobs)
        .where(jobs.c.number.in_(numbers))
        .values(
            state="running",
            started=now,
            attempts=jobs.c.attempts + 1,
            holder=holder,
            lease=now + LEASE_S,
        )
    )
    found = connection.execute(
        select(jobs).where(jobs.c.number.in_(numbers)).order_by(jobs.c.priority, jobs.c.number)
    )
    return found.all()


def put_back(connection: Connection, number: int, holder: str, *, counts: bool) -> None:
    """It is to be begun again; `counts`: this time was an attempt."""
    values: dict[str, Any] = {"state": "queued", "holder": None, "lease": None}
    if not counts:
        values["attempts"] = jobs.c.attempts - 1
    connection.execute(update(jobs).where(_held(number, holder)).values(values))


def settle(
    connection: Connection, number: int, holder: str, result: Result, keep_s: int
) -> Row[Any] | None:
    """Store how a job has ended; None: it was not the holder's any more."""
    done = connection.execute(
        update(jobs).where(_held(number, holder)).values(_ended(result, keep_s))
    )
    return by_number(connection, [number])[0] if done.rowcount else None


def cancel_queued(connection: Connection, row: Row[Any], keep_s: int) -> Row[Any]:
    """Cancel it if it has not begun; as it is now."""
    cancelled = Result(Cancelled(id=row.name))
    connection.execute(
        update(jobs)
        .where(jobs.c.number == row.number, jobs.c.state == "queued")
        .values(_ended(cancelled, keep_s))
    )
    return by_number(connection, [row.number])[0]


def remove(connection: Connection, user: str, name: str) -> None:
    """Raises JobNotFoundError, InvalidRequestError for one that has not ended."""
    row = find(connection, user, name)
    if row.ended is None:
        raise InvalidRequestError(f"job {name!r} is {row.state}: cancel it first")
    connection.execute(delete(jobs).where(jobs.c.number == row.number))


def renew(connection: Connection, holder: str) -> None:
    """The holder is alive."""
    connection.execute(
        update(jobs)
        .where(jobs.c.holder == holder, jobs.c.state == "running")
        .values(lease=time.time() + LEASE_S)
    )


def recover(connection: Connection, keep_s: int) -> list[Row[Any]]:
    """Have the jobs of holders that are gone begun again; those that were begun too often."""
    running = connection.execute(select(jobs).where(jobs.c.state == "running")).all()
    now, holders = time.time(), {row.holder for row in running}
    dead = {holder for holder in holders if _is_dead(holder)}
    lost = [row for row in running if row.holder in dead or row.lease < now]
    given_up = []
    for row in lost:
        if row.attempts < MAX_ATTEMPTS:
            put_back(connection, row.number, row.holder, counts=True)
        elif ended := settle(connection, row.number, row.holder, gave_up(row), keep_s):
            given_up.append(ended)
    return given_up


def gave_up(row: Row[Any]) -> Result:
    """The end of a job that was begun too often."""
    message = f"the job was begun {row.attempts} times, and each time the server ended meanwhile: given up"
    return Result(Failed(id=row.name, code=WorkerLostError.code, message=message))


def forget_expired(connection: Connection) -> int:
    """Delete what was kept long enough; how many."""
    expired = select(jobs.c.number).where(jobs.c.expires < time.time()).limit(FORGOTTEN_AT_ONCE)
    return connection.execute(delete(jobs).where(jobs.c.number.in_(expired))).rowcount


def info(row: Row[Any]) -> JobInfo:
    """What clients see of a job."""
    return JobInfo(
        job=row.name,
        state=row.state,
        kind=row.kind,
        model=row.model,
        priority=row.priority,
        created=row.created,
        started=row.started,
        ended=row.ended,
        expires=row.expires,
        attempts=row.attempts,
    )


def answer(request_id: str, row: Row[Any]) -> StoredJob:
    """The whole of a job."""
    result = result_of(row)
    end = msgspec.structs.replace(result.end, id=request_id) if result is not None else None
    return StoredJob(id=request_id, job=info(row), end=end)


def result_of(row: Row[Any]) -> Result | None:
    """How it has ended; None: it has not."""
    return msgspec.json.decode(row.result, type=Result) if row.result is not None else None


def keep_s_of(row: Row[Any]) -> int | None:
    """What its client wants."""
    return _request(row).keep_s


def work_of(row: Row[Any]) -> Generate:
    """What is to be generated; the same whenever it is begun."""
    request = _request(row)
    return Generate(
        id=str(row.number),
        kind=request.kind,
        model=row.model,
        prompt=request.prompt,
        messages=request.messages,
        params=msgspec.structs.replace(request.params, seed=row.seed),
        priority=request.priority,
        continue_last=request.continue_last,
    )


def _find(connection: Connection, user: str, name: str) -> Row[Any] | None:
    query = select(jobs).where(jobs.c.owner == user, jobs.c.name == name)
    return connection.execute(query).one_or_none()


def _wish(request: SubmitJob) -> str:
    """Equal for two submissions that ask for the same."""
    bare = msgspec.structs.replace(request, id="-", user="-", job=None)
    return msgspec.json.encode(bare).decode()


def _request(row: Row[Any]) -> SubmitJob:
    return msgspec.json.decode(row.request, type=SubmitJob)


def _held(number: int, holder: str) -> Any:
    return and_(jobs.c.number == number, jobs.c.state == "running", jobs.c.holder == holder)


def _ended(result: Result, keep_s: int) -> dict[str, Any]:
    states = {Done: "done", Failed: "failed", Cancelled: "cancelled"}
    now = time.time()
    return {
        "state": states[type(result.end)],
        "ended": now,
        "expires": now + keep_s,
        "holder": None,
        "lease": None,
        "result": msgspec.json.encode(result).decode(),
    }


def _is_dead(holder: str) -> bool:
    """Whether it is known to have ended: processes of other machines are not."""
    host, boot, pid, created = holder.rsplit("/", 3)
    mine = this_server().rsplit("/", 3)
    if host != mine[0]:
        return False
    if boot != mine[1]:
        return True
    try:
        return psutil.Process(int(pid)).create_time() != float(created)
    except psutil.NoSuchProcess:
        return True
