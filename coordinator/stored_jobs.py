"""Jobs that are stored before they run, and so outlive their clients and this process.

The engine gets a few of them at a time, as jobs of a client that never goes away. Belongs to the
engine's thread; the database has its own.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, Row

from coordinator import job_table
from coordinator.desk import STORED, Desk
from coordinator.followers import tokens_after
from coordinator.job import Job
from coordinator.job_table import Result
from coordinator.served_model import ServedModel
from coordinator.store import Store
from shared.config import Settings
from shared.errors import (
    InvalidRequestError,
    JobsOffError,
    ModelNotFoundError,
    NotReadyError,
    QueueFullError,
    TpserveError,
    UnloadedError,
    WorkerLostError,
)
from shared.job_messages import (
    CancelJob,
    DeleteJob,
    FollowJob,
    GetJob,
    JobGone,
    ListJobs,
    StoredJobRequest,
    SubmitJob,
)
from shared.messages import Choice, Done, Failed, Partial, Queued
from shared.protocol import Event

log = logging.getLogger("coordinator.stored_jobs")

T = TypeVar("T")

_TICK_S = 1.0
_HOUSEKEEPING_S = 20.0
_NOT_NOW = (NotReadyError.code, UnloadedError.code, QueueFullError.code, ModelNotFoundError.code)
"""Why a job has to wait and be begun again, though nothing is wrong with it."""


@dataclass(eq=False)
class _Held:
    """A job that this server has begun."""

    row: Row[Any]
    unstored: Result | None = None
    """It has ended, and the database could not take it."""
    cancelled_by: list[tuple[bytes, str]] = field(default_factory=list)
    """Clients and the ids of their requests, to be told when it has ended."""


class StoredJobDesk:
    """See the module."""

    def __init__(
        self,
        store: Store | None,
        desk: Desk,
        settings: Settings,
        models: Mapping[str, ServedModel],
    ) -> None:
        """store: None when the server keeps no jobs."""
        self._store, self._desk, self._models = store, desk, models
        self._keep_s = settings.job_keep
        # As many as keep the workers busy, and few enough to leave room in the queue for others.
        self._at_once = max(1, min(2 * settings.max_num_seqs, settings.queue_limit // 2))
        self._name = job_table.this_server()
        self._held: dict[int, _Held] = {}
        self._taking = False
        """The database is asked for more."""
        self._next_tick = self._next_housekeeping = 0.0
        self._stopping = False

    def answer(self, client: bytes, request: StoredJobRequest) -> None:
        """Take a request. Raises JobsOffError, QueueFullError, ModelNotFoundError."""
        if self._store is None:
            raise JobsOffError(
                "this server keeps no jobs: it was started with --database none, or its database "
                "could not be opened (see its log)"
            )
        self._store.refuse_if_full()
        user = request.user
        match request:
            case SubmitJob():
                self._submit(client, request)
            case GetJob():
                self._ask(
                    client,
                    request,
                    lambda c: job_table.find(c, user, request.job),
                    lambda row: self._tell(client, request.id, row),
                )
            case ListJobs():
                self._ask(
                    client,
                    request,
                    lambda c: job_table.page(c, request),
                    lambda page: self._desk.publish(client, page),
                )
            case FollowJob():
                self._ask(
                    client,
                    request,
                    lambda c: _with_position(c, user, request.job),
                    lambda found: self._follow(client, request, *found),
                )
            case CancelJob():
                self._ask(
                    client,
                    request,
                    lambda c: job_table.cancel_queued(
                        c, job_table.find(c, user, request.job), self._keep_s
                    ),
                    lambda row: self._cancel(client, request.id, row),
                    reads=False,
                )
            case DeleteJob():
                self._ask(
                    client,
                    request,
                    lambda c: job_table.remove(c, user, request.job),
                    lambda _: self._desk.publish(client, JobGone(id=request.id, job=request.job)),
                    reads=False,
                )

    def advance(self) -> None:
        """Begin what waits, and once in a while look after what is stored."""
        now = time.monotonic()
        if self._store is None or self._stopping or now < self._next_tick:
            return
        self._next_tick = now + _TICK_S
        for number, held in self._held.items():
            if held.unstored is not None:
                self._settle(number, held.unstored)
        self._look_for_followed()
        if now >= self._next_housekeeping:
            self._next_housekeeping = now + _HOUSEKEEPING_S
            self._housekeeping()
        self._take_more()

    def stop(self) -> None:
        """Begin nothing more; what is under way will be begun again by the next server."""
        self._stopping = True

    # --- requests ---------------------------------------------------------------------------------

    def _submit(self, client: bytes, request: SubmitJob) -> None:
        model = self._model_for(request)

        def stored(row: Row[Any]) -> None:
            self._tell(client, request.id, row)
            self._take_more()

        self._ask(client, request, lambda c: job_table.add(c, request, model), stored, reads=False)

    def _model_for(self, request: SubmitJob) -> str:
        """The one that it will run on, also when that is gone for a while."""
        if request.model is not None:
            if request.model not in self._models:
                served = ", ".join(sorted(self._models)) or "none"
                raise ModelNotFoundError(f"model {request.model!r} is not served; served: {served}")
            return request.model
        if not self._models:
            raise ModelNotFoundError("no model is loaded")
        return request.kind if request.kind in self._models else next(iter(self._models))

    def _follow(self, client: bytes, request: FollowJob, row: Row[Any], position: int) -> None:
        result = job_table.result_of(row)
        if row.number not in self._held and result is not None:
            for token in _tokens(result, request.from_token):
                self._desk.publish(client, msgspec.structs.replace(token, id=request.id))
            self._desk.publish(client, msgspec.structs.replace(result.end, id=request.id))
            return
        answers = self._desk.answers(STORED, str(row.number))
        if not answers:
            self._desk.publish(client, Queued(id=request.id, position=position))
        followers = self._desk.followers
        followers.add(str(row.number), client, request.id, request.from_token, answers)

    def _cancel(self, client: bytes, request_id: str, row: Row[Any]) -> None:
        held = self._held.get(row.number)
        if held is not None:
            held.cancelled_by.append((client, request_id))
            self._desk.cancel(STORED, str(row.number))
            return
        if row.state == "running":
            message = f"job {row.name!r} runs on another server with this database: cancel it there"
            self._desk.refuse(client, request_id, InvalidRequestError(message))
            return
        self._tell(client, request_id, row)
        self._tell_followers(row)

    def _tell(self, client: bytes, request_id: str, row: Row[Any]) -> None:
        self._desk.publish(client, job_table.answer(request_id, row))

    def _tell_followers(self, row: Row[Any]) -> None:
        result = job_table.result_of(row)
        if result is not None:
            self._desk.followers.end(str(row.number), result.end)

    # --- running ----------------------------------------------------------------------------------

    def _take_more(self) -> None:
        """Ask the database for jobs as long as there is room for them."""
        room = self._at_once - len(self._held)
        ready = [name for name, model in self._models.items() if model.state == "ready"]
        if self._taking or self._stopping or not self._desk.open or room < 1 or not ready:
            return
        self._taking = True

        def taken(outcome: Any) -> None:
            self._taking = False
            if isinstance(outcome, TpserveError):
                return  # the store has logged it; the next tick tries again
            for row in outcome:
                self._begin(row)

        self._call(lambda c: job_table.take_next(c, self._name, ready, room), taken)

    def _begin(self, row: Row[Any]) -> None:
        self._held[row.number] = _Held(row)
        work = job_table.work_of(row)
        if self._stopping:
            self._put_back(row.number, counts=False)
            return
        try:
            self._desk.promise(STORED, work.id, self._ended)
            self._desk.submit(STORED, work)
        except TpserveError as error:
            self._ended(Failed(id=work.id, code=error.code, message=error.message), None)

    def _ended(self, event: Event, job: Job | None) -> None:
        """A job's last event has come: it is stored before anybody hears of it."""
        number = int(event.id)
        held = self._held[number]
        if isinstance(event, Failed) and event.code in _NOT_NOW:
            self._put_back(number, counts=False)
        elif isinstance(event, Failed) and event.code == WorkerLostError.code:
            if held.row.attempts >= job_table.MAX_ATTEMPTS:
                self._settle(number, job_table.gave_up(held.row))
            else:
                self._put_back(number, counts=True)
        else:
            ends = [sequence.text_ends or [] for sequence in job.sequences] if job else []
            named: Any = msgspec.structs.replace(event, id=held.row.name)
            self._settle(number, Result(named, ends))

    def _settle(self, number: int, result: Result) -> None:
        held = self._held[number]
        held.unstored = None
        keep_s = job_table.keep_s_of(held.row)

        def stored(outcome: Any) -> None:
            if isinstance(outcome, TpserveError):
                held.unstored = result  # the next tick tries again
                return
            del self._held[number]
            if outcome is None:
                log.warning("job %r was taken over by another server", held.row.name)
            else:
                self._tell_followers(outcome)
            for client, request_id in held.cancelled_by:
                self._tell(client, request_id, outcome or held.row)
            self._take_more()

        self._call(
            lambda c: job_table.settle(
                c, number, self._name, result, self._keep_s if keep_s is None else keep_s
            ),
            stored,
        )

    def _put_back(self, number: int, *, counts: bool) -> None:
        held = self._held.pop(number)

        def stored(outcome: Any) -> None:
            if isinstance(outcome, TpserveError):
                log.error("job %r stays held until its lease has run out", held.row.name)
            for client, request_id in held.cancelled_by:
                again = NotReadyError("the job is to be begun again: cancel it once more")
                self._desk.refuse(client, request_id, again)

        self._call(lambda c: job_table.put_back(c, number, self._name, counts=counts), stored)

    # --- housekeeping -----------------------------------------------------------------------------

    def _housekeeping(self) -> None:
        def work(connection: Connection) -> list[Row[Any]]:
            job_table.renew(connection, self._name)
            job_table.forget_expired(connection)
            return job_table.recover(connection, self._keep_s)

        def done(outcome: Any) -> None:
            if not isinstance(outcome, TpserveError):
                for row in outcome:
                    log.error("job %r was begun %d times: given up", row.name, row.attempts)
                    self._tell_followers(row)

        self._call(work, done)

    def _look_for_followed(self) -> None:
        """Jobs that are followed here may have run on another server."""
        elsewhere = [n for n in map(int, self._desk.followers.jobs) if n not in self._held]
        if not elsewhere:
            return

        def found(outcome: Any) -> None:
            if not isinstance(outcome, TpserveError):
                for row in outcome:
                    self._tell_followers(row)

        self._call(lambda c: job_table.by_number(c, elsewhere), found, reads=True)

    # --- the database -----------------------------------------------------------------------------

    def _ask(
        self,
        client: bytes,
        request: StoredJobRequest,
        work: Callable[[Connection], T],
        then: Callable[[T], None],
        *,
        reads: bool = True,
    ) -> None:
        """Answer a request with what `then` makes of the database's word."""

        def answer(outcome: T | TpserveError) -> None:
            if isinstance(outcome, TpserveError):
                self._desk.refuse(client, request.id, outcome)
            else:
                then(outcome)

        self._call(work, answer, reads=reads)

    def _call(
        self,
        work: Callable[[Connection], T],
        then: Callable[[T | TpserveError], None],
        *,
        reads: bool = False,
    ) -> None:
        assert self._store is not None, "requests are refused without one"
        self._store.submit(work, then, reads=reads)


def _with_position(connection: Connection, user: str, name: str) -> tuple[Row[Any], int]:
    row = job_table.find(connection, user, name)
    waits = row.state == "queued"
    return row, job_table.standing_before(connection, row) if waits else 0


def _tokens(result: Result, known: int) -> list[Event]:
    """What an ended job has after its first `known` tokens."""
    end = result.end
    if isinstance(end, Failed):
        return []
    answers: Sequence[Choice | Partial] = end.choices if isinstance(end, Done) else end.partial
    found: list[Event] = []
    for index, (answer, ends) in enumerate(zip(answers, result.text_ends, strict=False)):
        whole = answer if isinstance(answer, Choice) else None
        token = tokens_after(
            known,
            answer.text,
            answer.token_ids,
            ends,
            index=index,
            logprobs=whole.logprobs if whole else (),
            finish_reason=whole.finish_reason if whole else None,
            stop_reason=whole.stop_reason if whole else None,
        )
        if token is not None:
            found.append(token)
    return found
