"""A real gateway for tests, and what they do with it."""

import signal
import sys
from typing import Any

import httpx
from openai import DefaultHttpxClient, OpenAI

from shared.processes import GIVES_MEMORY_BACK
from tests.conftest import PROJECT
from tests.processes import ServedProcess


class GatewayProcess(ServedProcess):
    """`python -m gateway` on a free port, ready."""

    def __init__(self, server: str, *arguments: str, env: dict[str, str] | None = None) -> None:
        http = () if "--http" in arguments else ("--http", "127.0.0.1:0")
        super().__init__(
            [sys.executable, "-P", "-m", "gateway", "--server", server, *http, *arguments],
            {"PYTHONPATH": str(PROJECT), **GIVES_MEMORY_BACK, **(env or {})},
            stop_signal=signal.SIGTERM,  # as a service manager does
        )
        try:
            self.url = self.wait_line("gateway http://")[1]
        except BaseException:
            self.stop()
            raise
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
