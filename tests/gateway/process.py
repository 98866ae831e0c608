"""A real gateway for tests, and what they do with it."""

import os
import queue
import signal
import subprocess
import sys
import threading
from types import TracebackType
from typing import Any, Self

import httpx
from openai import DefaultHttpxClient, OpenAI

from tests.e2e.server import PROJECT

START_TIMEOUT_S = 60.0


class GatewayProcess:
    """`python -m gateway` on a free port."""

    def __init__(self, server: str, *arguments: str, env: dict[str, str] | None = None) -> None:
        http = () if "--http" in arguments else ("--http", "127.0.0.1:0")
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gateway", "--server", server, *http, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(PROJECT), **(env or {})},
        )
        self.log: list[str] = []
        self._output: queue.Queue[str] = queue.Queue()
        self._readers = [
            threading.Thread(target=self._read_output, daemon=True),
            threading.Thread(target=self._read_log, daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        line = self._output.get(timeout=START_TIMEOUT_S)
        if not line.startswith("gateway http://"):
            self.stop()
        assert line.startswith("gateway http://"), f"{line!r}\n" + "".join(self.log)
        self.url = line.split()[1]
        self.port = int(self.url.rpartition(":")[2])

    def http(self, **options: Any) -> httpx.Client:
        """A client for raw requests."""
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **options)

    def openai(self, api_key: str = "unused") -> OpenAI:
        """The official client; it does not try again by itself."""
        return OpenAI(
            base_url=f"{self.url}/v1",
            api_key=api_key,
            max_retries=0,
            timeout=60,
            http_client=DefaultHttpxClient(trust_env=False),
        )

    def wait_exit(self, timeout_s: float) -> int:
        """The exit code."""
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(timeout_s)
        return code

    def stop(self) -> int:
        """End it as a service manager does; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.wait_exit(20)
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
