"""Runs the `tpserve` command as a user does: with pipes, or at a terminal."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.client.peer import DEADLINE_S

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "client.cli"]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours, without what would change the command's behaviour."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TPSERVE_", "XDG_"))}
    return {**inherited, "PYTHONPATH": str(ROOT), "TERM": "xterm", **(extra or {})}


def tpserve(
    *arguments: str,
    stdin: str | bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> "subprocess.CompletedProcess[str]":
    """Run to the end with pipes."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [*COMMAND, *arguments],
        input=data,
        capture_output=True,
        timeout=DEADLINE_S * 2,
        env=environment(env),
        cwd=cwd,
        check=False,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


class Terminal:
    """The other side of a pseudo-terminal: types, and reads what is on the screen."""

    def __init__(self, descriptor: int, process: "subprocess.Popen[bytes]") -> None:
        self._descriptor = descriptor
        self.process = process
        self.screen = ""

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._descriptor, text.encode())

    def wait_for(self, text: str) -> str:
        """Read until `text` comes; what had come before it. Raises AssertionError if it does not."""
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.screen:
            left = deadline - time.monotonic()
            if left < 0 or not self._read(left):
                raise AssertionError(f"{text!r} does not come, only {self.screen!r}")
        before, _, self.screen = self.screen.partition(text)
        return before

    def wait_for_exit(self) -> int:
        """Read to the end; the exit code."""
        while self._read(DEADLINE_S):
            pass
        return self.process.wait(DEADLINE_S)

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self._descriptor], [], [], timeout_s)[0]:
            return False
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # how Linux says that the other side is closed
            return False
        self.screen += data.decode(errors="replace")
        return bool(data)


@contextmanager
def at_terminal(*arguments: str, env: Mapping[str, str] | None = None) -> Iterator[Terminal]:
    """Run with a terminal for input, output and errors."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env=environment({"PROMPT_TOOLKIT_NO_CPR": "1", **(env or {})}),
        cwd=ROOT,
    )
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
