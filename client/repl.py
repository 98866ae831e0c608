"""A conversation at the prompt: its history, the /commands on it, and where its lines come from."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from client.commands.common import decode_input, show, speed
from client.render import note, write
from client.requests import SamplingOptions
from client.zmq_client import Client
from shared.errors import InvalidRequestError
from shared.messages import Cancelled, Done, Message

_KEPT_ONLY = (
    *("/regen", "/edit", "/continue", "/branch", "/rollback", "/redo"),
    *("/rename", "/sessions", "/open"),
)


class Conversation:
    """Turns with a model. Shows answers as they come."""

    help = """\
/help            this list
/reset           forget the conversation
/undo            forget the last turn and its answer
/system [TEXT]   the instructions that precede the conversation; without TEXT, none
/stats           tokens and speed of the last answer
/exit            leave (so does Ctrl-D)
A line that begins with a blank is sent as it is, even if a / follows.
"""
    """The commands, each at the beginning of a line, and what they do."""

    def __init__(
        self, client: Client, model: str | None, system: str | None, options: SamplingOptions
    ) -> None:
        self._client = client
        self._model = model
        self._options = options
        self._system = system
        self._turns: list[Message] = []
        """User and assistant in turns."""
        self._last: Done | None = None

    @property
    def commands(self) -> list[str]:
        """Their names."""
        return [line.split()[0] for line in self.help.splitlines() if line.startswith("/")]

    def say(self, text: str) -> bool:
        """Send a turn and show the answer; False when Ctrl-C cut it short.

        What was said until then stays in the history, so that one can refer to it. Raises
        TpserveError; then the turn is not part of the history.
        """
        turn = Message("user", text)
        system = [Message("system", self._system)] if self._system is not None else []
        messages = [*system, *self._turns, turn]
        stream = self._client.chat(messages, model=self._model, **self._options)
        show(stream)
        if isinstance(stream.end, Done):
            self._last = stream.end
        if stream.text or isinstance(stream.end, Done):
            self._turns += [turn, Message("assistant", stream.text)]
        return not isinstance(stream.end, Cancelled)

    def command(self, line: str) -> bool:
        """Carry out a /command; False when its answer was cut short.

        Raises InvalidRequestError for an unknown one.
        """
        match line.split(maxsplit=1):
            case ["/help"]:
                write(self.help)
            case ["/reset"]:
                self._turns.clear()
                note("the conversation starts anew")
            case ["/undo"]:
                note("the last turn is forgotten" if self._turns else "there is no turn to forget")
                del self._turns[-2:]
            case ["/system", *text]:
                self._system = text[0].rstrip() if text else None
            case ["/stats"]:
                write(self._stats())
            case [name, *_] if name in _KEPT_ONLY and name not in self.commands:
                raise InvalidRequestError(
                    f"{name}: the server does not keep this conversation; see tpserve chat --help"
                )
            case _:
                raise InvalidRequestError(
                    f"{line!r} is no command; /help lists them, and a line that begins with a "
                    "blank is sent as it is"
                )
        return True

    def _stats(self) -> str:
        if self._last is None:
            return "no answer has been finished yet\n"
        usage, timings = self._last.usage, self._last.timings
        return (
            f"model {self._last.model}, {len(self._turns) // 2} turns\n"
            f"prompt {usage.prompt_tokens} tokens, read in {timings.prefill_s:.2f} s "
            f"({timings.prefill_tokens_per_s:.1f} tokens/s)\n"
            f"answer {speed(self._last)}, {timings.queue_s:.2f} s in the queue\n"
        )


def typed_lines(commands: Sequence[str]) -> Iterator[str]:
    """Lines that somebody types, edited with a history over sessions, until Ctrl-D.

    Tab completes the names of commands.
    """
    session: PromptSession[str] = PromptSession(
        history=_history(),
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
    )
    while True:
        try:
            line = session.prompt("> ")
        except KeyboardInterrupt:
            note("/exit or Ctrl-D leaves")
            continue
        except EOFError:
            return
        yield line


def piped_lines() -> Iterator[str]:
    """Lines of standard input, each as soon as it is there."""
    for line in sys.stdin.buffer:
        yield decode_input(line).rstrip("\r\n")


def _history() -> History:
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    folder = state / "tpserve"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)  # what people ask a model is theirs
        (folder / "chat_history").touch()
    except OSError as error:
        note(f"lines are not remembered: {error}")
        return InMemoryHistory()
    return FileHistory(folder / "chat_history")
