"""Servers and gateways as real processes: started as a user starts them, ended by their own id."""

import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

import psutil

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0


class ServedProcess:
    """A process that prints a line when it is ready and runs until it is told to stop."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], stop_signal: signal.Signals
    ) -> None:
        """Start it. `env` is added to the environment of the tests."""
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )
        self.log: list[str] = []
        """What it has written to stderr."""
        self._stop_signal = stop_signal
        self._output: queue.Queue[str] = queue.Queue()
        self._readers = [
            threading.Thread(target=self._read_output, daemon=True),
            threading.Thread(target=self._read_log, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def wait_line(self, start: str) -> list[str]:
        """The words of the next line that it prints, which must begin with `start`."""
        line = self._output.get(timeout=START_TIMEOUT_S)
        assert line.startswith(start), f"{line!r}\n" + "".join(self.log)
        return line.split()

    def wait_exit(self, timeout_s: float) -> int:
        """The exit code."""
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(timeout_s)
        return code

    def stop(self) -> int:
        """End it as its users do; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(self._stop_signal)
        try:
            return self.wait_exit(STOP_TIMEOUT_S)
        finally:
            if self.process.poll() is None:
                self.process.kill()
            for stream in (self.process.stdout, self.process.stderr):
                assert stream is not None
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._output.put(line)
        self._output.put("")

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)


@contextmanager
def suspended(processes: Iterable[psutil.Process]) -> Iterator[None]:
    """They stand still meanwhile."""
    stopped = list(processes)
    for process in stopped:
        process.suspend()
    try:
        yield
    finally:
        for process in stopped:
            with suppress(psutil.NoSuchProcess):  # it may have been ended meanwhile
                process.resume()
