"""A real server for tests: started as a user starts it, ended by its own process id."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import psutil

PROJECT = Path(__file__).resolve().parents[2]
TPSERVE = str(Path(sys.executable).parent / "tpserve")
START_TIMEOUT_S = 120.0


class Server:
    """`tpserve serve` on a free port; without HTTP unless `--http` is among the arguments."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        listen = () if "--listen" in arguments else ("--listen", "tcp://127.0.0.1:*")
        http = () if "--http" in arguments else ("--no-http",)
        # Tests leave the user's own sessions alone.
        database = () if "--database" in arguments else ("--database", "none")
        self.process = subprocess.Popen(
            [TPSERVE, "serve", *listen, *http, *database, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.address = ""
        """That clients use, once it is ready."""
        self.log: list[str] = []
        self._output: queue.Queue[str] = queue.Queue()
        self._readers = [
            threading.Thread(target=self._read_output, daemon=True),
            threading.Thread(target=self._read_log, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def wait_ready(self) -> str:
        """The address that clients use, once the ready line has come."""
        line = self._output.get(timeout=START_TIMEOUT_S)
        assert line.startswith("ready "), f"{line!r}\n" + "".join(self.log)
        self.address = line.split()[1]
        return self.address

    def http_url(self) -> str:
        """Where the HTTP API is; the line after the ready line says it."""
        line = self._output.get(timeout=START_TIMEOUT_S)
        assert line.startswith("gateway "), line
        return line.split()[1]

    def workers(self) -> list[psutil.Process]:
        """The worker processes, by rank."""
        children = psutil.Process(self.process.pid).children()
        alive = [p for p in children if p.status() != psutil.STATUS_ZOMBIE]
        found = [p for p in alive if "--rank" in p.cmdline()]
        return sorted(found, key=lambda p: int(p.cmdline()[p.cmdline().index("--rank") + 1]))

    def wait_exit(self, timeout_s: float) -> int:
        """The exit code."""
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(timeout_s)
        return code

    def stop(self) -> int:
        """End the server as Ctrl-C does; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.wait_exit(20)
        finally:
            if self.process.poll() is None:
                self.process.kill()
            for stream in (self.process.stdout, self.process.stderr):
                assert stream is not None
                stream.close()

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._output.put(line)
        self._output.put("")

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)


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
