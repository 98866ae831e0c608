"""The coordinator's loop: take what has come in, plan, step, commit, publish.

One thread. It never waits for anything but its sockets, and it plans the next step while the workers
compute the last one.
"""

import logging
import os
import select
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import zmq

from coordinator.cluster import Cluster
from coordinator.desk import Desk, Question
from coordinator.frontend import Frontend
from coordinator.lives import Lives
from coordinator.metrics import Metrics, describe
from coordinator.model_desk import ModelDesk
from coordinator.scheduler import PlannedStep, Scheduler
from coordinator.served_model import ServedModel
from coordinator.sessions import SessionDesk
from coordinator.store import Store
from coordinator.stored_jobs import StoredJobDesk
from shared.config import Settings
from shared.errors import MemoryPlanError, NotReadyError, TpserveError, WorkerLostError
from shared.job_messages import StoredJobRequest
from shared.messages import GetHealth, GetStatus, Health, Load, Unload
from shared.worker_messages import StepPlan, StepResult

log = logging.getLogger("coordinator.engine")

_TICK_MS = 500
_TICK_WHILE_LOADING_MS = 100


@dataclass(frozen=True)
class SentStep:
    """A plan whose result has not come back."""

    step: int
    model: ServedModel
    scheduler: Scheduler
    """That has planned it."""
    planned: PlannedStep
    sent_at: float
    decodes: bool
    """No sequence reads more than one token."""


class Engine:
    """Steps of all models on the workers, and the workers' lives; jobs are the desk's."""

    def __init__(
        self,
        settings: Settings,
        models: dict[str, ServedModel],
        frontend: Frontend,
        cluster: Cluster,
        store: Store | None = None,
        http_url: str | None = None,
    ) -> None:
        """store: of sessions and jobs; None: there are none. http_url: told to the user when ready."""
        self.settings, self.models = settings, models
        self.cluster = cluster
        self.ready = False
        """A token has come through all workers of this epoch with every model."""
        self.metrics = Metrics()
        self._frontend, self._http_url = frontend, http_url
        self._desk = Desk(settings, models, frontend, self.metrics)
        self._model_desk = ModelDesk(
            settings, models, cluster, self._desk, self._start_steps, self._stop_steps
        )
        self._sessions = SessionDesk(store, self._desk)
        self._stored_jobs = StoredJobDesk(store, self._desk, settings, models)
        self._sent: deque[SentStep] = deque()
        self._step = 0
        """Number of the last plan."""
        self._committed_at = 0.0
        self._turns: deque[str] = deque()
        self._lives = Lives(settings.step_timeout, time.monotonic())
        self._stop_requested = False
        self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watch = select.epoll()  # one descriptor in place of many keeps each poll short
        self._poller = zmq.Poller()

    def run(self) -> None:
        """Serve until `stop` is called. Raises TpserveError when the workers cannot be kept up."""
        for fd in (self.cluster.supervisor.fileno(), *self._wake_fds()):
            self._watch.register(fd, select.EPOLLIN)
        for pollable in (self._frontend.socket, self.cluster.socket, self._watch.fileno()):
            self._poller.register(pollable, zmq.POLLIN)
        self.cluster.start()
        totals, clock = self.metrics.totals, time.perf_counter
        resting = clock()
        while not self._stop_requested:
            tick = _TICK_WHILE_LOADING_MS if self._model_desk.busy else _TICK_MS
            readable = dict(self._poller.poll(tick))
            woken = clock()
            if self.cluster.socket in readable:
                self._take_results()
            self._notice_silence()
            if self._watch.fileno() in readable:
                self._take_wakeups()
                self._sessions.take_stored()
                self._desk.take_prepared()
            if self._frontend.socket in readable:
                self._answer(self._desk.take_requests())
            self._model_desk.advance()
            self._stored_jobs.advance()
            planning = clock()
            self._plan_ahead()  # before events are sent: the workers should not wait for them
            planned = clock()
            self._desk.report_progress()
            self._model_desk.report_progress()
            self._sessions.report_progress()
            self._desk.flush()
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
        self._stored_jobs.stop()
        self._desk.fail_all(NotReadyError(reason))
        self._desk.flush()
        self._sessions.close()
        self._desk.flush()
        self.cluster.stop(grace_s=3.0)
        self._watch.close()

    def _answer(self, questions: Iterable[tuple[bytes, Question]]) -> None:
        for client, question in questions:
            try:
                self._answer_one(client, question)
            except TpserveError as error:
                self._desk.refuse(client, question.id, error)

    def _answer_one(self, client: bytes, question: Question) -> None:
        reason = "" if self.ready else self._lives.reason
        match question:
            case GetHealth():
                self._desk.publish(client, Health(id=question.id, ready=self.ready, reason=reason))
            case GetStatus():
                status = describe(
                    question.id, self.settings, self.models, self.cluster, self.ready, self.metrics
                )
                self._desk.publish(client, status)
            case Load() | Unload() if not self.ready:
                raise NotReadyError(f"{reason}: try again in a moment")
            case Load():
                self._model_desk.load(client, question)
            case Unload():
                self._model_desk.unload(client, question)
            case _ if isinstance(question, StoredJobRequest):
                self._stored_jobs.answer(client, question)
            case _:
                self._sessions.answer(client, question)

    # --- steps ------------------------------------------------------------------------------------

    def _plan_ahead(self) -> None:
        """Keep the workers supplied: models that have work take turns."""
        idle = 0
        doubts = any(m.scheduler.doubts for m in self.models.values() if m.scheduler is not None)
        depth = 1 if doubts else self.settings.pipeline_depth
        while len(self._sent) < depth and idle < len(self._turns):
            model = self.models[self._turns[0]]
            self._turns.rotate(-1)
            scheduler = model.scheduler
            planned = None if scheduler is None else scheduler.plan(model.pace.passes)
            if scheduler is None or planned is None:
                idle += 1
                continue
            idle = 0
            now, totals = time.monotonic(), self.metrics.totals
            tokens = sum(len(s.tokens) or 1 for s in planned.sequences)
            decodes = tokens == len(planned.sequences)
            self._step += 1
            totals.steps += planned.passes
            totals.sequence_steps += len(planned.sequences) * planned.passes
            totals.tokens_computed += tokens * planned.passes
            for job in planned.started:
                self._desk.started(job)
            self._sent.append(SentStep(self._step, model, scheduler, planned, now, decodes))
            self.cluster.send_plan(
                StepPlan(
                    epoch=self.cluster.epoch,
                    step=self._step,
                    model=model.name,
                    sequences=planned.sequences,
                    passes=planned.passes,
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
            elif self.cluster.ready and not self.ready and not self._turns:
                self._start_scheduling()

    def _notice_silence(self) -> None:
        """A worker that is there but answers nothing counts as lost."""
        now = time.monotonic()
        silent_s = now - self._sent[0].sent_at if self._sent else 0.0
        if silent_s > self.settings.step_timeout * self.settings.pipeline_depth:
            self._workers_failed(WorkerLostError(f"no result came for {silent_s:.0f} s"))
        elif not self.cluster.ready and self._lives.overdue(self.cluster.heard_at, now):
            ranks = " and ".join(str(rank) for rank in self.cluster.awaited)
            self._workers_failed(WorkerLostError(f"worker {ranks} does not get ready"))

    def _commit(self, result: StepResult) -> None:
        sent = self._sent.popleft()
        assert sent.step == result.step, "workers answer in order"
        if result.out_of_memory:
            self._step_failed(sent, MemoryPlanError(result.out_of_memory))
        else:
            self._hand_out(sent, result)
        if not self.ready and not self._desk.test_pending():
            for problem in self._desk.test_problems.values():
                raise problem
            self._become_ready()

    def _step_failed(self, sent: SentStep, error: TpserveError) -> None:
        """The model's running jobs end with the error, those that wait go on to wait.

        Nobody knows which blocks have been written, so the scheduler begins with an empty cache.
        """
        log.error("step %d of %s: %s", sent.step, sent.model.name, error.message)
        if sent.scheduler is not sent.model.scheduler:
            return  # its jobs have ended with a step before
        self._desk.fail_started_jobs(sent.model.name, error)
        sent.model.scheduler = self._new_scheduler(sent.model)

    def _hand_out(self, sent: SentStep, result: StepResult) -> None:
        planned = sent.planned
        now, rows = time.monotonic(), len(planned.sampled)
        if sent.decodes:
            sent.model.pace.took(now - max(sent.sent_at, self._committed_at), planned.passes)
        self._committed_at = now
        for row, sequence in enumerate(planned.sampled):
            if not sequence.finished:  # else it ended while this step was under way
                self._desk.sampled(sequence, result.tokens[row::rows], result.logprobs[row::rows])
        for sequence, mean in zip(planned.embedded, result.means, strict=True):
            if not sequence.finished:
                self._desk.embedded(sequence, mean)

    # --- workers ----------------------------------------------------------------------------------

    def _take_wakeups(self) -> None:
        for fd, _ in self._watch.poll(0):
            if fd != self.cluster.supervisor.fileno():
                os.eventfd_read(fd)
                continue
            try:
                self.cluster.supervisor.notice()
            except WorkerLostError as error:
                self._workers_failed(error)

    def _wake_fds(self) -> list[int]:
        """Of other threads."""
        fds = [self._desk.wake_fd, self._model_desk.wake_fd, self._stop_fd]
        return fds if self._sessions.wake_fd is None else [*fds, self._sessions.wake_fd]

    def _start_scheduling(self) -> None:
        """The workers have loaded everything: test them with one token of every model.

        After that the jobs that had started go on.
        """
        if self._desk.running:
            self.metrics.totals.jobs_resumed += self._desk.running
            log.info("%d jobs go on", self._desk.running)
        for model in self.models.values():
            self._start_steps(model)
            self._desk.start_test_job(model)
        if not self.models:  # all were unloaded, and then the workers lost
            self._become_ready()

    def _start_steps(self, model: ServedModel) -> None:
        """The workers have loaded a model, for the first time or again."""
        if model.scheduler is None:
            model.scheduler = self._new_scheduler(model)
        self._turns.append(model.name)

    def _new_scheduler(self, model: ServedModel) -> Scheduler:
        return Scheduler(
            model.queue,
            blocks=model.on_workers.kv_blocks,
            slots=self.settings.max_num_seqs,
            max_batched_tokens=self.settings.max_batched_tokens,
        )

    def _stop_steps(self, model: ServedModel) -> None:
        """They will unload it; it has no jobs any more."""
        model.scheduler = None
        self._turns.remove(model.name)

    def _become_ready(self) -> None:
        self.ready = self._desk.open = True
        for model in self.models.values():
            if model.state == "loading":
                model.state = "ready"
        took_s = self._lives.got_ready(time.monotonic())
        log.info("ready after %.1f s: a token came through all workers", took_s)
        if self.cluster.epoch == 1:
            names = ",".join(self.models)
            workers = self.settings.workers
            print(f"ready {self._frontend.address} workers={workers} models={names}", flush=True)
            if self._http_url is not None:
                print(f"gateway {self._http_url}", flush=True)

    def _workers_failed(self, error: TpserveError) -> None:
        """Start new workers in place of this epoch's; their jobs wait and then go on.

        Raises WorkerLostError when that has been tried too often.
        """
        if self._stop_requested:
            return  # whoever stops the server may have stopped the workers too
        lost = WorkerLostError(error.message)
        log.error("%s", lost.message)
        self._log_steps_under_way()
        under_way = dict.fromkeys(s for sent in self._sent for s in sent.planned.computed)
        self._sent.clear()
        self._turns.clear()
        given_up = self._desk.workers_lost(under_way, lost)
        self._model_desk.workers_lost(lost)
        self.metrics.totals.jobs_given_up += given_up
        self.ready = False
        self.cluster.stop(grace_s=0.0)
        if not self._lives.may_restart(lost, time.monotonic(), jobs_fault=given_up > 0):
            self._desk.fail_all(lost)
            raise lost from error
        self.metrics.totals.restarts += 1
        self.cluster.start()

    def _log_steps_under_way(self) -> None:
        """Workers know steps, clients know request ids: here they come together."""
        for sent in self._sent:
            jobs = dict.fromkeys(s.job_key[1] for s in sent.planned.computed)
            log.error(
                "epoch %d, step %d of %s was under way, with jobs %s",
                self.cluster.epoch,
                sent.step,
                sent.model.name,
                ", ".join(jobs),
            )
