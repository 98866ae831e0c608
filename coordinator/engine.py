"""The coordinator's loop: take what has come in, plan, step, commit, publish.

One thread. It never waits for anything but its sockets, and it plans the next step while the workers
compute the last one.
"""

import logging
import os
import select
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import zmq

from coordinator.cluster import Cluster
from coordinator.frontend import Frontend
from coordinator.intake import Intake, test_sequence
from coordinator.jobs import refuse_if_full
from coordinator.scheduler import Scheduler
from coordinator.sequence import Sequence
from coordinator.served_model import ServedModel
from coordinator.status import Counters, describe
from shared.config import Settings
from shared.errors import (
    InvalidRequestError,
    JobNotFoundError,
    NotReadyError,
    SlowReaderError,
    TpserveError,
    WorkerLostError,
)
from shared.messages import (
    Cancel,
    Cancelled,
    Event,
    Failed,
    FinishReason,
    Generate,
    GetHealth,
    GetStatus,
    Health,
    ListModels,
    Models,
    Progress,
    Queued,
    Request,
    Started,
    StepPlan,
    StepResult,
    Token,
)

log = logging.getLogger("coordinator.engine")

PIPELINE_DEPTH = 2
"""Plans that may be with the workers: one that runs, and one that waits for it to end."""
MAX_RESTARTS_PER_MINUTE = 5
_TICK_MS = 500
_REPORT_INTERVAL_S = 1.0
_NOBODY = b""
"""The client of the engine's own test sequences."""


@dataclass(frozen=True)
class SentStep:
    """A plan whose result has not come back."""

    step: int
    scheduler: Scheduler
    sampled: list[Sequence]
    sent_at: float


class Engine:
    """Everything between the clients' socket and the workers' socket."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, ServedModel],
        frontend: Frontend,
        cluster: Cluster,
    ) -> None:
        self.settings, self.models = settings, models
        self.cluster = cluster
        self.ready = False
        """A token has come through all workers with every model."""
        self.counters = Counters()
        self._frontend = frontend
        self._intake = Intake(models)
        self._preparing: set[tuple[bytes, str]] = set()
        self._sequences: dict[tuple[bytes, str], Sequence] = {}
        self._sent: deque[SentStep] = deque()
        self._turns = deque(models)
        self._untested: set[str] = set()
        self._restarts: deque[float] = deque()
        self._next_report = 0.0
        self._stop_requested = False
        self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watch = select.epoll()  # one descriptor in place of many keeps each poll short
        self._poller = zmq.Poller()

    def run(self) -> None:
        """Serve until `stop` is called. Raises TpserveError when the workers cannot be kept up."""
        for fd in (self._intake.wake_fd, self._stop_fd):
            self._watch.register(fd, select.EPOLLIN)
        for pollable in (self._frontend.socket, self.cluster.socket, self._watch.fileno()):
            self._poller.register(pollable, zmq.POLLIN)
        self._start_workers()
        while not self._stop_requested:
            self._poller.poll(_TICK_MS)
            self._take_results()
            self._take_wakeups()
            self._take_prepared()
            self._take_requests()
            self._plan_ahead()
            self._report_progress()

    def stop(self) -> None:
        """End the loop soon; may be called from a signal handler."""
        self._stop_requested = True
        os.eventfd_write(self._stop_fd, 1)

    def close(self, reason: str) -> None:
        """Tell every waiting client, end the workers."""
        self._fail_all(NotReadyError(reason))
        self.cluster.stop(grace_s=3.0)
        self._intake.close()
        self._watch.close()

    # --- clients ----------------------------------------------------------------------------------

    def _take_requests(self) -> None:
        for client, request in self._frontend.requests():
            try:
                self._answer(client, request)
            except TpserveError as error:
                self._frontend.refuse(client, request.id, error)

    def _answer(self, client: bytes, request: Request) -> None:
        match request:
            case Generate():
                self._submit(client, request)
            case Cancel():
                self._cancel(client, request)
            case ListModels():
                infos = [model.info() for model in self.models.values()]
                self._publish(client, Models(id=request.id, models=infos))
            case GetStatus():
                status = describe(
                    request.id, self.settings, self.models, self.cluster, self.ready, self.counters
                )
                self._publish(client, status)
            case GetHealth():
                reason = "" if self.ready else "the workers are being started"
                self._publish(client, Health(id=request.id, ready=self.ready, reason=reason))

    def _submit(self, client: bytes, request: Generate) -> None:
        key = (client, request.id)
        if key in self._preparing or key in self._sequences:
            raise InvalidRequestError(f"a job with the id {request.id!r} is under way already")
        if not self.ready:
            raise NotReadyError("the workers are being started: try again in a moment")
        waiting = sum(len(model.queue) for model in self.models.values())
        refuse_if_full(waiting + len(self._preparing), self.settings.queue_limit)
        self._intake.submit(client, request)
        self._preparing.add(key)

    def _take_prepared(self) -> None:
        for prepared in self._intake.prepared():
            key = (prepared.client, prepared.request_id)
            if key not in self._preparing:
                continue  # cancelled or failed in the meantime
            self._preparing.remove(key)
            if isinstance(prepared.outcome, TpserveError):
                self._frontend.refuse(*key, prepared.outcome)
                continue
            sequence = prepared.outcome
            self._sequences[key] = sequence
            position = self.models[sequence.model].queue.add(sequence)
            self._stream(sequence, Queued(id=sequence.request_id, position=position))

    def _cancel(self, client: bytes, request: Cancel) -> None:
        key = (client, request.job)
        if key in self._preparing:
            self._preparing.remove(key)
            self._publish(client, Cancelled(id=request.job))
        elif (sequence := self._sequences.get(key)) is not None:
            self._end(sequence)
            new = sequence.tokens[sequence.prompt_tokens :]
            self._publish(client, Cancelled(id=request.job, text=sequence.text, token_ids=new))
        else:
            raise JobNotFoundError(f"no job with the id {request.job!r} is under way")
        self._publish(client, Cancelled(id=request.id))

    def _stream(self, sequence: Sequence, event: Event) -> None:
        """Send an event that only streaming clients want."""
        if sequence.stream:
            self._publish(sequence.client, event)

    def _publish(self, client: bytes, event: Event) -> None:
        if client is not _NOBODY and not self._frontend.send(client, event):
            self._drop(client)

    def _drop(self, client: bytes) -> None:
        """A client is gone or does not read: its jobs end."""
        slow = not self._frontend.last_client_gone
        dropped = [s for s in self._sequences.values() if s.client == client]
        for sequence in dropped:
            self._end(sequence)
            if slow:
                error = SlowReaderError("too many events wait to be read: the job was ended")
                self._frontend.send_when_possible(client, _failed(sequence.request_id, error))
        self._preparing = {key for key in self._preparing if key[0] != client}
        if dropped:
            why = "does not read" if slow else "went away"
            log.info("a client %s; %d of its jobs were ended", why, len(dropped))

    def _report_progress(self) -> None:
        """Once a second tell silent jobs' clients that all is well, and notice who has gone."""
        now = time.monotonic()
        if now < self._next_report:
            return
        self._next_report = now + _REPORT_INTERVAL_S
        self._frontend.send_owed()
        silent = [(s, None) for s in self._sequences.values() if s.slot >= 0 and not s.stream]
        waiting = [item for model in self.models.values() for item in model.queue.positions()]
        for sequence, position in [*silent, *waiting]:
            if not sequence.finished:
                count = sequence.new_tokens
                event = Progress(id=sequence.request_id, position=position, new_tokens=count)
                self._publish(sequence.client, event)

    def _end(self, sequence: Sequence) -> None:
        del self._sequences[sequence.key]
        scheduler = self.models[sequence.model].scheduler
        assert scheduler is not None, "sequences exist only while models are loaded"
        scheduler.end(sequence)

    # --- steps ------------------------------------------------------------------------------------

    def _plan_ahead(self) -> None:
        """Keep the workers supplied: models that have work take turns."""
        idle = 0
        while len(self._sent) < PIPELINE_DEPTH and idle < len(self._turns):
            name = self._turns[0]
            self._turns.rotate(-1)
            scheduler = self.models[name].scheduler
            planned = scheduler.plan() if scheduler is not None else None
            if scheduler is None or planned is None:
                idle += 1
                continue
            idle = 0
            self.counters.steps += 1
            now = time.monotonic()
            for sequence in planned.started:
                sequence.started_at = now
                count = sequence.prompt_tokens
                self._stream(
                    sequence, Started(id=sequence.request_id, model=name, prompt_tokens=count)
                )
            self._sent.append(SentStep(self.counters.steps, scheduler, planned.sampled, now))
            self.cluster.send_plan(
                StepPlan(
                    epoch=self.cluster.epoch,
                    step=self.counters.steps,
                    model=name,
                    sequences=planned.sequences,
                )
            )

    def _take_results(self) -> None:
        while True:
            try:
                result = self.cluster.receive()
            except zmq.Again:
                break
            except TpserveError as error:
                self._workers_failed(error)
                return
            if result is not None:
                self._commit(result)
            elif self.cluster.ready and not self._any_scheduler():
                self._start_scheduling()
        oldest = self._sent[0].sent_at if self._sent else time.monotonic()
        silent_s = time.monotonic() - oldest
        if silent_s > self.settings.step_timeout * PIPELINE_DEPTH:
            self._workers_failed(WorkerLostError(f"no result came for {silent_s:.0f} s"))

    def _commit(self, result: StepResult) -> None:
        sent = self._sent.popleft()
        assert sent.step == result.step, "workers answer in order"
        for sequence, token in zip(sent.sampled, result.tokens, strict=True):
            if sequence.finished:
                continue  # it ended while this step was under way
            if token < 0:
                self._fail(sequence, TpserveError("the model computed values that are not numbers"))
                continue
            reason = sequence.append(token)
            self.counters.tokens += 1
            text = "" if token in sequence.eos_ids else sequence.detokenizer.push(token)
            if reason is not None:
                text += sequence.detokenizer.flush()
            sequence.text += text
            self._stream(sequence, Token(id=sequence.request_id, text=text, token_ids=[token]))
            if reason is not None and not sequence.finished:
                self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._end(sequence)
        if sequence.client is _NOBODY:
            self._passed_test(sequence.model)
            return
        self._publish(sequence.client, sequence.done(reason))

    def _fail(self, sequence: Sequence, error: TpserveError) -> None:
        self._end(sequence)
        if sequence.client is _NOBODY:
            raise TpserveError(f"model {sequence.model}: {error.message}")
        self._publish(sequence.client, _failed(sequence.request_id, error))

    # --- workers ----------------------------------------------------------------------------------

    def _start_workers(self) -> None:
        self.cluster.start()
        for worker in self.cluster.supervisor.workers:
            self._watch.register(worker.pidfd, select.EPOLLIN)

    def _take_wakeups(self) -> None:
        for fd, _ in self._watch.poll(0):
            if fd in (self._intake.wake_fd, self._stop_fd):
                os.eventfd_read(fd)
            else:
                self._workers_failed(WorkerLostError(self.cluster.supervisor.ended(fd)))
                return  # the other descriptors have been replaced

    def _any_scheduler(self) -> bool:
        return any(model.scheduler is not None for model in self.models.values())

    def _start_scheduling(self) -> None:
        """The workers have loaded everything: test them with one token of every model."""
        self._untested = set(self.models)
        for model in self.models.values():
            model.scheduler = Scheduler(
                model.queue,
                blocks=model.on_workers.kv_blocks,
                slots=self.settings.max_num_seqs,
                max_batched_tokens=self.settings.max_batched_tokens,
            )
            test = test_sequence(_NOBODY, model)
            self._sequences[test.key] = test
            model.queue.add(test)

    def _passed_test(self, model: str) -> None:
        self._untested.discard(model)
        if self._untested:
            return
        self.ready = True
        log.info("ready: a token came through all %d workers", self.settings.workers)
        if self.cluster.epoch == 1:
            names = ",".join(self.models)
            workers = self.settings.workers
            print(f"ready {self._frontend.address} workers={workers} models={names}", flush=True)

    def _workers_failed(self, error: TpserveError) -> None:
        """Give up the workers of this epoch, tell their clients, and start new ones."""
        log.error("%s", error.message)
        self._fail_all(error)
        never_ready = self.cluster.epoch == 1 and not self.ready
        self.ready = False
        self.cluster.stop(grace_s=0.0)
        now = time.monotonic()
        while self._restarts and now - self._restarts[0] > 60:
            self._restarts.popleft()
        if never_ready or len(self._restarts) >= MAX_RESTARTS_PER_MINUTE:
            raise error
        self._restarts.append(now)
        self._start_workers()

    def _fail_all(self, error: TpserveError) -> None:
        """No job survives: each of them ends in a failed event."""
        waiting = [*self._preparing, *(k for k in self._sequences if k[0] is not _NOBODY)]
        for sequence in list(self._sequences.values()):
            self._end(sequence)
        self._preparing.clear()
        self._sent.clear()
        for model in self.models.values():
            model.scheduler = None
        for client, request_id in waiting:
            self._frontend.send(client, _failed(request_id, error))


def _failed(request_id: str, error: TpserveError) -> Failed:
    return Failed(id=request_id, code=error.code, message=error.message)
