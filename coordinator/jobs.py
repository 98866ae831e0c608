"""The bounded queue of jobs that wait to start: first come, first served within a kind.

The two kinds take turns, so that many waiting stories do not keep a chat waiting, or the reverse.
"""

from collections import deque

from coordinator.sequence import Sequence
from shared.errors import QueueFullError
from shared.messages import Kind


class JobQueue:
    """Waiting sequences of one model."""

    def __init__(self) -> None:
        self._waiting: dict[Kind, deque[Sequence]] = {"story": deque(), "chat": deque()}
        self._turn: Kind = "story"

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    def count(self, kind: Kind) -> int:
        """Waiting jobs of one kind."""
        return len(self._waiting[kind])

    def add(self, sequence: Sequence) -> int:
        """Queue a job; how many of its kind stand before it."""
        queue = self._waiting[sequence.kind]
        queue.append(sequence)
        return len(queue) - 1

    def peek(self) -> Sequence | None:
        """The job whose turn it is."""
        other: Kind = "chat" if self._turn == "story" else "story"
        for kind in (self._turn, other):
            if self._waiting[kind]:
                return self._waiting[kind][0]
        return None

    def pop(self) -> Sequence:
        """Take the job that `peek` showed; the other kind has the next turn."""
        sequence = self.peek()
        assert sequence is not None, "pop follows a successful peek"
        self._waiting[sequence.kind].popleft()
        self._turn = "chat" if sequence.kind == "story" else "story"
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take out a job that was cancelled while it waited."""
        self._waiting[sequence.kind].remove(sequence)

    def positions(self) -> list[tuple[Sequence, int]]:
        """All waiting jobs, each with how many of its kind stand before it."""
        return [(s, i) for queue in self._waiting.values() for i, s in enumerate(queue)]

    def waiting(self) -> list[Sequence]:
        """All of them."""
        return [s for queue in self._waiting.values() for s in queue]


def refuse_if_full(waiting: int, limit: int) -> None:
    """Raises QueueFullError when no further job may wait."""
    if waiting >= limit:
        raise QueueFullError(
            f"{waiting} jobs are waiting, the limit is {limit} (--queue-limit): try again later"
        )
