"""A real server for tests."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.processes import ServedProcess

TPSERVE = str(Path(sys.executable).parent / "tpserve")


class Server(ServedProcess):
    """`tpserve serve` on a free port; without HTTP unless `--http` is among the arguments."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        listen = () if "--listen" in arguments else ("--listen", "tcp://127.0.0.1:*")
        http = () if "--http" in arguments else ("--no-http",)
        # Tests leave the user's own sessions alone.
        database = () if "--database" in arguments else ("--database", "none")
        command = [TPSERVE, "serve", *listen, *http, *database, *arguments]
        super().__init__(command, env or {}, stop_signal=signal.SIGINT)
        self.address = ""
        """That clients use, once it is ready."""

    def wait_ready(self) -> str:
        """The address that clients use, once the ready line has come."""
        self.address = self.wait_line("ready ")[1]
        return self.address

    def http_url(self) -> str:
        """Where the HTTP API is; the line after the ready line says it."""
        return self.wait_line("gateway ")[1]

    def workers(self) -> list[psutil.Process]:
        """The worker processes, by rank."""
        children = psutil.Process(self.process.pid).children()
        alive = [p for p in children if p.status() != psutil.STATUS_ZOMBIE]
        found = [p for p in alive if "--rank" in p.cmdline()]
        return sorted(found, key=lambda p: int(p.cmdline()[p.cmdline().index("--rank") + 1]))


def run_tpserve(
    arguments: Sequence[str], stdin: str = "", timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run the `tpserve` command to its end."""
    return subprocess.run(
        [TPSERVE, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Poll a condition until it holds or the time is over."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())
