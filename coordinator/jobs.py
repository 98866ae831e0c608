"""The queue of jobs that wait to start, and in which order they do.

A lower priority number goes first. Within it the kinds take turns by weight, within a kind the
clients take turns, and a client's jobs of a kind start in the order in which they came. So neither
many stories nor one busy client keep the others waiting.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import get_args

from coordinator.job import Job, JobKind
from shared.errors import QueueFullError

KINDS: tuple[JobKind, ...] = get_args(JobKind)


class JobQueue:
    """Waiting jobs of one model."""

    def __init__(self, weights: Mapping[JobKind, int]) -> None:
        """`weights`: how many jobs of each kind start in one round."""
        self._weights = dict(weights)
        self._credit = dict.fromkeys(KINDS, 0)
        # priority -> kind -> client -> jobs; empty ones are removed.
        self._waiting: dict[int, dict[JobKind, dict[bytes, deque[Job]]]] = {}
        self._count = dict.fromkeys(KINDS, 0)
        self.tokens = 0
        """Prompt tokens of all waiting jobs."""
        self._next: Job | None = None

    def __len__(self) -> int:
        return sum(self._count.values())

    def count(self, kind: JobKind) -> int:
        """Waiting jobs of one kind."""
        return self._count[kind]

    def add(self, job: Job) -> int:
        """Queue a job; how many of its kind stand before it."""
        kinds = self._waiting.setdefault(job.request.priority, {})
        clients = kinds.setdefault(job.kind, {})
        clients.setdefault(job.client, deque()).append(job)
        self._account(job, 1)
        return next(position for other, position in self.positions() if other is job)

    def peek(self) -> Job | None:
        """The job whose turn it is."""
        if self._next is None and self._waiting:
            kinds = self._waiting[min(self._waiting)]
            clients = kinds[self._kind_to_serve(kinds)]
            self._next = next(iter(clients.values()))[0]
        return self._next

    def pop(self) -> Job:
        """Take the job that `peek` showed."""
        job = self.peek()
        assert job is not None, "pop follows a successful peek"
        kinds = self._waiting[job.request.priority]
        kind = self._kind_to_serve(kinds)
        # Smooth weighted round-robin: who is served pays what all present kinds have earned.
        for present in kinds:
            self._credit[present] += self._weights[present]
        self._credit[kind] -= sum(self._weights[present] for present in kinds)
        clients = kinds[kind]
        self.remove(job)
        if job.client in clients:  # it has more: to the end of the clients' round
            clients[job.client] = clients.pop(job.client)
        return job

    def remove(self, job: Job) -> None:
        """Take out a job, wherever it stands."""
        kinds = self._waiting[job.request.priority]
        clients = kinds[job.kind]
        clients[job.client].remove(job)
        if not clients[job.client]:
            del clients[job.client]
        if not clients:
            del kinds[job.kind]
        if not kinds:
            del self._waiting[job.request.priority]
        self._account(job, -1)

    def positions(self) -> Iterator[tuple[Job, int]]:
        """All waiting jobs, each with how many of its kind will start before it."""
        before = dict.fromkeys(KINDS, 0)
        for priority in sorted(self._waiting):
            for kind, clients in self._waiting[priority].items():
                for turn in range(max(len(jobs) for jobs in clients.values())):
                    for jobs in clients.values():
                        if turn < len(jobs):
                            yield jobs[turn], before[kind]
                            before[kind] += 1

    def _kind_to_serve(self, kinds: Mapping[JobKind, object]) -> JobKind:
        return max(kinds, key=lambda kind: self._credit[kind] + self._weights[kind])

    def _account(self, job: Job, sign: int) -> None:
        self._count[job.kind] += sign
        self.tokens += sign * job.prompt_tokens
        self._next = None


def refuse_if_full(waiting: int, limit: int, what: str, flag: str, retry_after_s: float) -> None:
    """Raises QueueFullError when no further job may wait."""
    if waiting >= limit:
        error = QueueFullError(
            f"{waiting} {what} are waiting, the limit is {limit} ({flag}): "
            f"try again in {retry_after_s:.0f} s"
        )
        error.retry_after_s = retry_after_s
        raise error
