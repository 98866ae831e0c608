"""How many decode steps one plan should have.

A plan costs the coordinator, the workers and the client a message each. Where a step takes
milliseconds that is nothing; where it takes a tenth of one, several steps share a plan.
"""

_WORTH_S = 0.002
"""What a plan should keep the workers busy for; a newcomer or a cancellation waits no longer."""
_SHARE = 0.1
"""Weight of the latest measurement."""


def passes_of(step_s: float, most: int) -> int:
    """Decode steps that one plan may have where a step takes so long."""
    return max(1, min(most, round(_WORTH_S / step_s)))


class Pace:
    """Time of one model's decode steps, and what follows from it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._step_s = _WORTH_S

    @property
    def passes(self) -> int:
        """Decode steps that the next plan may have."""
        return passes_of(self._step_s, self._most)

    def took(self, seconds: float, passes: int) -> None:
        """A plan of so many decode steps kept the workers so long."""
        self._step_s += (seconds / passes - self._step_s) * _SHARE
