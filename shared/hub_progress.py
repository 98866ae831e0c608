"""How far a download is: a line that changes on a terminal, a line now and then elsewhere."""

import sys
import time

from shared.hub import Report

_LINE_INTERVAL_S = 5.0


class Progress:
    """Tells people about one download."""

    def __init__(self, what: str, total: int, report: Report) -> None:
        """`total` bytes of `what` are missing; `report` takes the lines when nobody watches."""
        self._what = what
        self._total = total
        self._report = report
        self._terminal = sys.stderr.isatty()
        self._began = self._last = time.monotonic()
        self._width = 0
        report(f"downloading {what}: {readable_bytes(total)}")

    def update(self, done: int) -> None:
        """So many bytes have come."""
        now = time.monotonic()
        rate = done / max(now - self._began, 1e-3)
        share = 100 * done // max(self._total, 1)
        line = f"{self._what}: {share} % of {readable_bytes(self._total)}, {readable_bytes(rate)}/s"
        if self._terminal:
            sys.stderr.write("\r" + line.ljust(self._width))
            sys.stderr.flush()
            self._width = len(line)
        elif now - self._last >= _LINE_INTERVAL_S:
            self._report(line)
            self._last = now

    def close(self) -> None:
        """Leave an empty line behind on a terminal."""
        if self._terminal:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()


def readable_bytes(count: float) -> str:
    """Such as 2.2 GB; decimal units, as the hub shows them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
