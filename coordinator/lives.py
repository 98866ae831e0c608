"""Whether lost workers are to have successors, and how long these may take to get ready."""

from collections import deque

from shared.errors import WorkerLostError

MAX_RESTARTS = 5
"""Within a minute, or in a row without getting ready."""
_MINUTE_S = 60.0


class Lives:
    """The workers' epochs in time; times are of the monotonic clock."""

    def __init__(self, step_timeout_s: float, now: float) -> None:
        """now: when the first workers are started."""
        self.reason = "the workers are being started"
        """Why they are not ready."""
        self._patience_s = max(step_timeout_s, _MINUTE_S)
        self._began = now
        self._ready = self._ever_ready = False
        self._restarts: deque[float] = deque()

    def got_ready(self, now: float) -> float:
        """A token has come through all of them; seconds since they were started."""
        self._ready = self._ever_ready = True
        return now - self._began

    def overdue(self, heard_at: float, now: float) -> bool:
        """Whether workers that were started again have been silent for too long, and are not ready.

        The first ones may take their time: nobody waits for them but who has started the server.
        """
        silent_s = now - max(heard_at, self._began)
        return self._ever_ready and not self._ready and silent_s > self._patience_s

    def may_restart(self, error: WorkerLostError, now: float, *, jobs_fault: bool) -> bool:
        """The workers were lost: whether new ones are to be started now.

        jobs_fault: a job has killed them, and is given up: they are sound without it.
        """
        if not self._ever_ready:
            return False  # whoever has started the server should hear of it at once
        while self._ready and self._restarts and now - self._restarts[0] > _MINUTE_S:
            self._restarts.popleft()
        if jobs_fault:
            self._restarts.clear()
        elif len(self._restarts) == MAX_RESTARTS:
            return False
        self._restarts.append(now)
        self.reason = f"the workers are being started again: {error.message}"
        self._ready, self._began = False, now
        return True
