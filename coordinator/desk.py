"""The clients' side of the engine: jobs from their request to their last event.

Knows nothing of steps and workers. Every accepted job gets exactly one `done`, `failed` or
`cancelled` event, whatever happens to it.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping

from coordinator.embedding import normalised
from coordinator.followers import Followers
from coordinator.frontend import Frontend, failed
from coordinator.intake import Intake, Order, test_job
from coordinator.job import Job
from coordinator.jobs import refuse_if_full
from coordinator.metrics import Metrics
from coordinator.sequence import Sequence
from coordinator.served_model import ServedModel
from shared.config import Settings
from shared.embedding_messages import Embed
from shared.errors import (
    InvalidRequestError,
    JobKillsWorkersError,
    JobNotFoundError,
    NotReadyError,
    SlowReaderError,
    TpserveError,
    UnloadedError,
)
from shared.job_messages import StoredJobRequest
from shared.messages import (
    Cancel,
    Cancelled,
    Detokenize,
    Generate,
    GetHealth,
    GetStatus,
    ListModels,
    Load,
    Models,
    Progress,
    Queued,
    Started,
    Token,
    Tokenize,
    Unload,
)
from shared.protocol import Event
from shared.session_messages import SessionRequest
from shared.worker_messages import TokenLogprobs

log = logging.getLogger("coordinator.desk")

Question = GetStatus | GetHealth | Load | Unload | SessionRequest | StoredJobRequest
Ending = Callable[[Event, Job | None], None]
"""Is given a job's last event instead of its client, and the job if there was one."""

MAX_LOSSES = 2
"""Of the workers, during steps of a job, the second time of it alone: then it is given up."""
_REPORT_INTERVAL_S = 1.0
_NOBODY = b""
"""The client of the server's own test jobs."""
STORED = b"\0stored"
"""The client of the jobs that the server keeps; no connection has such a routing id."""


class Desk:
    """All jobs that have not ended, and the way to their clients."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, ServedModel],
        frontend: Frontend,
        metrics: Metrics,
    ) -> None:
        self.open = False
        """Whether new jobs are taken: from the first time on that the workers are ready."""
        self._settings, self._models = settings, models
        self._frontend, self._metrics = frontend, metrics
        self._intake = Intake(models)
        self.wake_fd = self._intake.wake_fd
        """Becomes readable when `take_prepared` has something to do."""
        self._preparing: dict[tuple[bytes, str], Order] = {}
        self._jobs: dict[tuple[bytes, str], Job] = {}
        self._endings: dict[tuple[bytes, str], Ending] = {}
        """Of jobs, and of what is to become one, whose end somebody else takes first."""
        self._next_report = 0.0
        self.followers = Followers(frontend)
        """Of the jobs of `STORED`."""
        self.test_problems: dict[str, TpserveError] = {}
        """By model: why its test job has failed."""

    def take_requests(self) -> Iterator[tuple[bytes, Question]]:
        """Answer what is about jobs; the rest comes out, each before the next request is taken."""
        for client, request in self._frontend.requests():
            try:
                match request:
                    case Generate() | Tokenize() | Detokenize() | Embed():
                        self._submit(client, request)
                    case Cancel():
                        self._cancel(client, request)
                    case ListModels():
                        infos = [model.info() for model in self._models.values()]
                        self.publish(client, Models(id=request.id, models=infos))
                    case _:
                        yield client, request
            except TpserveError as error:
                self.refuse(client, request.id, error)

    def refuse(self, client: bytes, request_id: str, error: TpserveError) -> None:
        """Answer a request with an error."""
        self._frontend.refuse(client, request_id, error)

    def take_prepared(self) -> None:
        """Queue the jobs that have been prepared in the meantime."""
        for prepared in self._intake.prepared():
            key = (prepared.client, prepared.request.id)
            if self._preparing.get(key) is not prepared.request:
                continue  # cancelled or failed in the meantime
            del self._preparing[key]
            try:
                if isinstance(prepared.outcome, TpserveError):
                    raise prepared.outcome
                if isinstance(prepared.outcome, Job):
                    self._enqueue(prepared.outcome)
                else:
                    self.publish(prepared.client, prepared.outcome)
            except TpserveError as error:
                if key in self._endings:
                    self._last_event(prepared.client, failed(prepared.request.id, error))
                else:
                    self.refuse(*key, error)

    def promise(self, client: bytes, request_id: str, ending: Ending) -> None:
        """A job with this id may follow by `submit`; `ending` is called once, however it ends.

        Raises what `submit` would raise now.
        """
        self._check_room((client, request_id))
        self._endings[client, request_id] = ending

    def submit(self, client: bytes, request: Generate) -> None:
        """Take a job that was promised. Raises TpserveError; then it is promised no more."""
        ending = self._endings.pop((client, request.id))
        self._submit(client, request)
        self._endings[client, request.id] = ending

    def withdraw(self, client: bytes, request_id: str) -> None:
        """A job that was promised does not come."""
        self._endings.pop((client, request_id), None)

    def cancel(self, client: bytes, job_id: str) -> bool:
        """End a job early, in its `cancelled` event; whether there is one."""
        key = (client, job_id)
        if key in self._preparing:
            del self._preparing[key]
            self._last_event(client, Cancelled(id=job_id))
        elif (job := self._jobs.get(key)) is not None:
            self._end(job)
            self._last_event(client, job.cancelled(), job)
        elif key in self._endings:
            self._last_event(client, Cancelled(id=job_id))
        else:
            return False
        return True

    def answers(self, client: bytes, job_id: str) -> list[Sequence]:
        """Those of a job, as far as they have come; none: it has not been queued yet."""
        job = self._jobs.get((client, job_id))
        return job.sequences if job is not None else []

    def start_test_job(self, model: ServedModel) -> None:
        """Have one token computed before anything else, to see that the workers compute."""
        assert model.scheduler is not None, "the workers have loaded it"
        test = test_job(_NOBODY, model)
        test.started_at = time.monotonic()
        self._jobs[test.key] = test
        model.scheduler.test(test.sequences[0])

    def started(self, job: Job) -> None:
        """The first step of a job is on its way."""
        job.started_at = time.monotonic()
        if job.client is not _NOBODY:
            self._metrics.totals.prompt_tokens += job.prompt_tokens
        self._stream(job, Started(id=job.id, model=job.model, prompt_tokens=job.prompt_tokens))
        for sequence in job.sequences if job.echoes else ():
            if job.client is STORED:
                self.followers.pass_on_tokens(job.id, sequence)
                continue
            prompt = Token(id=job.id, text=sequence.text, token_ids=[], index=sequence.index)
            self._stream(job, prompt)

    def sampled(
        self,
        sequence: Sequence,
        tokens: list[int],
        logprobs: list[TokenLogprobs | None],
    ) -> None:
        """A sequence has got its next tokens; if one ends it, those after that one do not count.

        logprobs: as `tokens`, or empty.
        """
        job = self._job_of(sequence)
        text, used, details = "", 0, []
        for token in tokens:
            if token < 0:
                self._fail(job, _not_numbers())
                return
            text += sequence.append(token)
            if logprobs and (found := logprobs[used]) is not None:
                details.append(self._models[job.model].text.describe(token, found))
            used += 1
            if sequence.finish_reason is not None:
                break
        self._metrics.totals.tokens_generated += used
        sequence.logprobs += details
        if job.client is STORED:
            self.followers.pass_on_tokens(job.id, sequence)
        elif job.streams:
            event = Token(
                id=job.id,
                text=text,
                token_ids=tokens[:used],
                index=sequence.index,
                logprobs=details,
                finish_reason=sequence.finish_reason,
                stop_reason=sequence.stop_reason,
            )
            self.publish(job.client, event)
        if sequence.finish_reason is not None:
            self._finish(job, sequence)

    def embedded(self, sequence: Sequence, mean: bytes) -> None:
        """The mean of a text's hidden states has come: [hidden] float32."""
        job = self._job_of(sequence)
        vector = normalised(mean)
        if vector is None:
            self._fail(job, _not_numbers())
            return
        sequence.embedding = vector
        self._metrics.totals.texts_embedded += 1
        self._finish(job, sequence)

    def test_pending(self, model: str | None = None) -> bool:
        """Whether a test job, of this model or of any, is still under way."""
        return any(
            job.client is _NOBODY and model in (None, job.model) for job in self._jobs.values()
        )

    @property
    def running(self) -> int:
        """Clients' jobs that have started and not ended."""
        return sum(job.started_at > 0 and job.client is not _NOBODY for job in self._jobs.values())

    def workers_lost(self, under_way: Collection[Sequence], error: TpserveError) -> int:
        """All jobs but tests wait for the workers to come again; how many are given up instead.

        under_way: sequences that were being computed. One that was so before, and now alone, is what
        kills the workers.
        """
        for test in [job for job in self._jobs.values() if job.client is _NOBODY]:
            self._end(test)
        suspects = [sequence for sequence in under_way if not sequence.finished]
        for sequence in suspects:
            sequence.suspect()
        for model in self._models.values():
            if model.scheduler is not None:
                model.scheduler.put_back()
        guilty = {self._job_of(s).key for s in suspects if s.losses >= MAX_LOSSES}
        for job in [self._jobs[key] for key in guilty]:
            log.error("job %s is given up: the workers were lost with each try", job.id)
            self._fail(job, _kills_workers(error))
        if self.running:
            alone = sum(not sequence.finished for sequence in suspects)
            waiting = (
                "%d jobs wait for new workers; %d sequences were under way and run alone at first"
            )
            log.info(waiting, self.running, alone)
        return len(guilty)

    def has_jobs(self, model: str) -> bool:
        """Whether a model still has queued or running jobs."""
        return any(job.model == model for job in self._jobs.values())

    def fail_jobs_of(self, model: str, error: TpserveError) -> None:
        """End all jobs of a model in a failed event."""
        for job in [job for job in self._jobs.values() if job.model == model]:
            self._end(job)
            self._last_event(job.client, failed(job.id, error), job)

    def fail_started_jobs(self, model: str, error: TpserveError) -> None:
        """End the jobs of a model that have started in a failed event."""
        started = [job for job in self._jobs.values() if job.model == model and job.started_at]
        for job in started:
            self._fail(job, error)

    def fail_all(self, error: TpserveError) -> None:
        """No job survives: each of them ends in a failed event."""
        jobs, waiting = list(self._jobs.values()), {*self._preparing, *self._endings}
        for job in jobs:
            self._end(job)
        self._preparing.clear()
        for job in jobs:
            self._last_event(job.client, failed(job.id, error), job)
        for client, request_id in waiting.difference(job.key for job in jobs):
            self._last_event(client, failed(request_id, error))

    def publish(self, client: bytes, event: Event) -> None:
        """Have an event sent with the next `flush`."""
        if client is STORED:
            self.followers.pass_on(event)
        elif client is not _NOBODY:
            self._frontend.publish(client, event)

    def report_progress(self) -> None:
        """Once a second tell silent jobs' clients that all is well, and notice who has gone."""
        now = time.monotonic()
        if now < self._next_report:
            return
        self._next_report = now + _REPORT_INTERVAL_S
        self._frontend.send_owed()
        quiet_since = now - _REPORT_INTERVAL_S
        silent = [(j, None) for j in self._jobs.values() if j.started_at and j.quiet(quiet_since)]
        waiting = [item for model in self._models.values() for item in model.queue.positions()]
        for job, position in [*silent, *waiting]:
            new = sum(sequence.new_tokens for sequence in job.sequences)
            event = Progress(id=job.id, position=position, new_tokens=new)
            self.publish(job.client, event)

    def flush(self) -> None:
        """Send what was published; the jobs of clients that do not take it end."""
        for client, gone in self._frontend.flush():
            self._drop(client, gone)

    def _submit(self, client: bytes, request: Order) -> None:
        key = (client, request.id)
        self._check_room(key)
        self._intake.submit(client, request)
        self._preparing[key] = request

    def _check_room(self, key: tuple[bytes, str]) -> None:
        if key in self._preparing or key in self._jobs or key in self._endings:
            raise InvalidRequestError(f"a job with the id {key[1]!r} is under way already")
        if not self.open:
            raise NotReadyError("the workers are being started: try again in a moment")
        waiting = sum(len(model.queue) for model in self._models.values()) + len(self._preparing)
        limit, retry = self._settings.queue_limit, self._metrics.retry_after_s()
        refuse_if_full(waiting, limit, "jobs", "--queue-limit", retry)

    def _enqueue(self, job: Job) -> None:
        tokens = sum(model.queue.tokens for model in self._models.values())
        limit, retry = self._settings.queue_tokens, self._metrics.retry_after_s()
        refuse_if_full(tokens, limit, "prompt tokens", "--queue-tokens", retry)
        if self._models.get(job.model) is None or self._models[job.model].state != "ready":
            raise UnloadedError(f"model {job.model!r} was unloaded")
        if job.client is STORED:
            for sequence in job.sequences:
                sequence.text_ends = []
        self._jobs[job.key] = job
        position = self._models[job.model].queue.add(job)
        self._stream(job, Queued(id=job.id, position=position))

    def _cancel(self, client: bytes, request: Cancel) -> None:
        if self.followers.remove(client, request.job):
            self.publish(client, Cancelled(id=request.job))
        elif not self.cancel(client, request.job):
            raise JobNotFoundError(f"no job with the id {request.job!r} is under way")
        self.publish(client, Cancelled(id=request.id))

    def _stream(self, job: Job, event: Event) -> None:
        """Send an event that only streaming clients want."""
        if job.streams:
            self.publish(job.client, event)

    def _drop(self, client: bytes, gone: bool) -> None:
        """A client is gone or does not read: its jobs end."""
        dropped = [job for job in self._jobs.values() if job.client == client]
        keys = {key for key in (*self._preparing, *self._endings) if key[0] == client}
        preparing = keys.difference(job.key for job in dropped)
        for job in dropped:
            self._end(job)
        for key in preparing:
            self._preparing.pop(key, None)
        error = SlowReaderError("too many events wait to be read: the job was ended")
        owed: list[Event] = [failed(id_, error) for id_ in self.followers.drop(client)]
        of_id: dict[str, Job | None] = {key[1]: None for key in preparing}
        of_id |= {job.id: job for job in dropped}
        for job_id, ended in of_id.items():
            if (client, job_id) not in self._endings:
                owed.append(failed(job_id, error))
            elif gone:
                event = ended.cancelled() if ended is not None else Cancelled(id=job_id)
                self._last_event(client, event, ended)
            else:
                self._last_event(client, failed(job_id, error), ended)
        if not gone:
            self._frontend.owe(client, owed)
        if dropped or preparing:
            why = "went away" if gone else "does not read"
            log.info("a client %s; %d jobs were ended", why, len(dropped) + len(preparing))

    def _last_event(self, client: bytes, event: Event, job: Job | None = None) -> None:
        """What a client waits for at the end of a job, unless somebody else takes it first."""
        ending = self._endings.pop((client, event.id), None)
        if ending is not None:
            ending(event, job)
        else:
            self.publish(client, event)

    def _job_of(self, sequence: Sequence) -> Job:
        return self._jobs[sequence.job_key]

    def _finish(self, job: Job, sequence: Sequence) -> None:
        scheduler = self._models[job.model].scheduler
        assert scheduler is not None, "it has just computed"
        scheduler.end(sequence)
        if not job.finished:
            return
        del self._jobs[job.key]
        if isinstance(job.request, Embed):
            self._metrics.job_done(None)
            self._last_event(job.client, job.embeddings(), job)
        elif job.client is not _NOBODY:
            done = job.done()
            self._metrics.job_done(done.timings)
            self._last_event(job.client, done, job)

    def _fail(self, job: Job, error: TpserveError) -> None:
        self._end(job)
        if job.client is _NOBODY:
            self.test_problems[job.model] = TpserveError(f"model {job.model}: {error.message}")
        self._last_event(job.client, failed(job.id, error), job)

    def _end(self, job: Job) -> None:
        """Forget a job that is done, failed or cancelled; what it holds is given back."""
        del self._jobs[job.key]
        model = self._models[job.model]
        if not job.started_at:
            model.queue.remove(job)
            return
        assert model.scheduler is not None, "jobs start only while their model is loaded"
        for sequence in job.sequences:
            if not sequence.finished:
                model.scheduler.end(sequence)


def _kills_workers(error: TpserveError) -> TpserveError:
    return JobKillsWorkersError(
        f"given up: the workers were lost during a step of this job, and then during a step of "
        f"nothing else ({error.message}); the server's log has more: do not send it again unchanged"
    )


def _not_numbers() -> TpserveError:
    return TpserveError("the model computed values that are not numbers")
