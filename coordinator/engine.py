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
from coordinator.frontend import Frontend, failed
from coordinator.intake import Intake, test_job
from coordinator.job import Job
from coordinator.jobs import refuse_if_full
from coordinator.metrics import Metrics, describe
from coordinator.scheduler import Scheduler
from coordinator.sequence import Sequence
from coordinator.served_model import ServedModel
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

MAX_RESTARTS_PER_MINUTE = 5
_TICK_MS = 500
_REPORT_INTERVAL_S = 1.0
_NOBODY = b""
"""The client of the engine's own test jobs."""


@dataclass(frozen=True)
class SentStep:
    """A plan whose result has not come back."""

    step: int
    model: ServedModel
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
        self.metrics = Metrics()
        self._frontend = frontend
        self._intake = Intake(models)
        self._preparing: set[tuple[bytes, str]] = set()
        self._jobs: dict[tuple[bytes, str], Job] = {}
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
        totals, clock = self.metrics.totals, time.perf_counter
        resting = clock()
        while not self._stop_requested:
            self._poller.poll(_TICK_MS)
            woken = clock()
            self._take_results()
            self._take_wakeups()
            self._take_prepared()
            self._take_requests()
            planning = clock()
            self._plan_ahead()  # before events are sent: the workers should not wait for them
            planned = clock()
            self._report_progress()
            for client, gone in self._frontend.flush():
                self._drop(client, gone)
            totals.wait_s += woken - resting
            totals.plan_s += planned - planning
            resting = clock()
            totals.other_s += (planning - woken) + (resting - planned)

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
                    request.id, self.settings, self.models, self.cluster, self.ready, self.metrics
                )
                self._publish(client, status)
            case GetHealth():
                reason = "" if self.ready else "the workers are being started"
                self._publish(client, Health(id=request.id, ready=self.ready, reason=reason))

    def _submit(self, client: bytes, request: Generate) -> None:
        key = (client, request.id)
        if key in self._preparing or key in self._jobs:
            raise InvalidRequestError(f"a job with the id {request.id!r} is under way already")
        if not self.ready:
            raise NotReadyError("the workers are being started: try again in a moment")
        waiting = sum(len(model.queue) for model in self.models.values()) + len(self._preparing)
        limit, retry = self.settings.queue_limit, self.metrics.retry_after_s()
        refuse_if_full(waiting, limit, "jobs", "--queue-limit", retry)
        self._intake.submit(client, request)
        self._preparing.add(key)

    def _take_prepared(self) -> None:
        for prepared in self._intake.prepared():
            key = (prepared.client, prepared.request_id)
            if key not in self._preparing:
                continue  # cancelled or failed in the meantime
            self._preparing.remove(key)
            try:
                if isinstance(prepared.outcome, TpserveError):
                    raise prepared.outcome
                self._enqueue(prepared.outcome)
            except TpserveError as error:
                self._frontend.refuse(*key, error)

    def _enqueue(self, job: Job) -> None:
        tokens = sum(model.queue.tokens for model in self.models.values())
        limit, retry = self.settings.queue_tokens, self.metrics.retry_after_s()
        refuse_if_full(tokens, limit, "prompt tokens", "--queue-tokens", retry)
        self._jobs[job.key] = job
        position = self.models[job.model].queue.add(job)
        self._stream(job, Queued(id=job.id, position=position))

    def _cancel(self, client: bytes, request: Cancel) -> None:
        key = (client, request.job)
        if key in self._preparing:
            self._preparing.remove(key)
            self._publish(client, Cancelled(id=request.job))
        elif (job := self._jobs.get(key)) is not None:
            self._end(job)
            self._publish(client, job.cancelled())
        else:
            raise JobNotFoundError(f"no job with the id {request.job!r} is under way")
        self._publish(client, Cancelled(id=request.id))

    def _stream(self, job: Job, event: Event) -> None:
        """Send an event that only streaming clients want."""
        if job.request.stream:
            self._publish(job.client, event)

    def _publish(self, client: bytes, event: Event) -> None:
        if client is not _NOBODY:
            self._frontend.publish(client, event)

    def _drop(self, client: bytes, gone: bool) -> None:
        """A client is gone or does not read: its jobs end."""
        dropped = [job for job in self._jobs.values() if job.client == client]
        for job in dropped:
            self._end(job)
        if not gone:
            error = SlowReaderError("too many events wait to be read: the job was ended")
            self._frontend.owe(client, [failed(job.id, error) for job in dropped])
        self._preparing = {key for key in self._preparing if key[0] != client}
        if dropped:
            why = "went away" if gone else "does not read"
            log.info("a client %s; %d of its jobs were ended", why, len(dropped))

    def _report_progress(self) -> None:
        """Once a second tell silent jobs' clients that all is well, and notice who has gone."""
        now = time.monotonic()
        if now < self._next_report:
            return
        self._next_report = now + _REPORT_INTERVAL_S
        self._frontend.send_owed()
        silent = [(j, None) for j in self._jobs.values() if j.started_at and not j.request.stream]
        waiting = [item for model in self.models.values() for item in model.queue.positions()]
        for job, position in [*silent, *waiting]:
            new = sum(sequence.new_tokens for sequence in job.sequences)
            event = Progress(id=job.id, position=position, new_tokens=new)
            self._publish(job.client, event)

    def _end(self, job: Job) -> None:
        """Forget a job that is done, failed or cancelled; what it holds is given back."""
        del self._jobs[job.key]
        model = self.models[job.model]
        if not job.started_at:
            model.queue.remove(job)
            return
        assert model.scheduler is not None, "jobs start only while their model is loaded"
        for sequence in job.sequences:
            if not sequence.finished:
                model.scheduler.end(sequence)

    # --- steps ------------------------------------------------------------------------------------

    def _plan_ahead(self) -> None:
        """Keep the workers supplied: models that have work take turns."""
        idle = 0
        while len(self._sent) < self.settings.pipeline_depth and idle < len(self._turns):
            model = self.models[self._turns[0]]
            self._turns.rotate(-1)
            planned = model.scheduler.plan() if model.scheduler is not None else None
            if planned is None:
                idle += 1
                continue
            idle = 0
            now, totals = time.monotonic(), self.metrics.totals
            totals.steps += 1
            totals.sequence_steps += len(planned.sequences)
            totals.tokens_computed += sum(len(s.tokens) or 1 for s in planned.sequences)
            for job in planned.started:
                job.started_at = now
                count = job.prompt_tokens
                self._stream(job, Started(id=job.id, model=job.model, prompt_tokens=count))
                for sequence in job.sequences if job.request.params.echo else ():
                    prompt = Token(
                        id=job.id, text=sequence.text, token_ids=[], index=sequence.index
                    )
                    self._stream(job, prompt)
            self._sent.append(SentStep(totals.steps, model, planned.sampled, now))
            self.cluster.send_plan(
                StepPlan(
                    epoch=self.cluster.epoch,
                    step=totals.steps,
                    model=model.name,
                    sequences=planned.sequences,
                    copies=planned.copies,
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
        if silent_s > self.settings.step_timeout * self.settings.pipeline_depth:
            self._workers_failed(WorkerLostError(f"no result came for {silent_s:.0f} s"))

    def _commit(self, result: StepResult) -> None:
        sent = self._sent.popleft()
        assert sent.step == result.step, "workers answer in order"
        logprobs = result.logprobs or [None] * len(result.tokens)
        for sequence, token, logprob in zip(sent.sampled, result.tokens, logprobs, strict=True):
            if sequence.finished:
                continue  # it ended while this step was under way
            job = self._jobs[sequence.job_key]
            if token < 0:
                self._fail(job, TpserveError("the model computed values that are not numbers"))
                continue
            text = sequence.append(token)
            self.metrics.totals.tokens_generated += 1
            details = []
            if logprob is not None:
                details = [sent.model.text.describe(token, logprob)]
                sequence.logprobs += details
            event = Token(
                id=job.id, text=text, token_ids=[token], index=sequence.index, logprobs=details
            )
            self._stream(job, event)
            if sequence.finish_reason is not None and not sequence.finished:
                self._finish(job, sequence, sent.model)

    def _finish(self, job: Job, sequence: Sequence, model: ServedModel) -> None:
        assert model.scheduler is not None, "it has just computed"
        model.scheduler.end(sequence)
        if not job.finished:
            return
        del self._jobs[job.key]
        if job.client is _NOBODY:
            self._passed_test(job.model)
            return
        done = job.done()
        self.metrics.job_done(done.timings)
        self._publish(job.client, done)

    def _fail(self, job: Job, error: TpserveError) -> None:
        self._end(job)
        if job.client is _NOBODY:
            raise TpserveError(f"model {job.model}: {error.message}")
        self._publish(job.client, failed(job.id, error))

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
            test = test_job(_NOBODY, model)
            self._jobs[test.key] = test
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
        waiting = [*self._preparing, *(key for key in self._jobs if key[0] is not _NOBODY)]
        for job in list(self._jobs.values()):
            self._end(job)
        self._preparing.clear()
        self._sent.clear()
        for model in self.models.values():
            model.scheduler = None
        for client, request_id in waiting:
            self._publish(client, failed(request_id, error))
