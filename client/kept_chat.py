"""A conversation at the prompt whose messages the server keeps."""

from collections.abc import Iterator, Sequence
from itertools import islice

import msgspec

from client.commands.common import show
from client.commands.sessions import write_sessions
from client.render import note, write
from client.repl import Conversation
from client.requests import SamplingOptions
from client.zmq_client import Client, Stream
from shared.errors import (
    DatabaseError,
    InvalidRequestError,
    SessionNotFoundError,
    SessionsOffError,
)
from shared.messages import Cancelled, Done, Message, SamplingParams
from shared.session_messages import SessionInfo, SessionState, StoredMessage

_PAGE = 100
_LISTED = 20
"""Chats that /sessions shows at most."""


class KeptConversation(Conversation):
    """In a session of the server: one that `open` names, else a new one, once it is needed."""

    help = """\
/help            this list
/regen           another answer beside the last one
/edit [N] TEXT   say TEXT in place of your last message, or your Nth, and have it answered
/continue        write on at an answer that was cut short
/branch [K]      which of how many the last answer is, as ‹2/3›; K: go to the Kth
/rollback [N]    go back to before your last message, or your Nth
/reset           go back to before the first message
/undo            take the last change back, be it a message or a command
/redo            take an undo back
/rename TITLE    give the session another title
/system [TEXT]   the instructions that precede the conversation; without TEXT, none
/sessions        the chats that the server keeps
/open ID         go on with another one
/stats           tokens and speed of the last answer
/exit            leave (so does Ctrl-D)
A line that begins with a blank is sent as it is, even if a / follows. Nothing is ever lost: what
is left or replaced stays in the session as a branch.
"""

    def __init__(
        self, client: Client, model: str | None, system: str | None, options: SamplingOptions
    ) -> None:
        """What is given is for a new session; in another one, `options` go before its own."""
        super().__init__(client, model, system, options)
        self._flags = options
        self._sessions = client.sessions
        self._session: int | None = None

    def open(self, session: int) -> None:
        """Go on with a session.

        Raises SessionNotFoundError, InvalidRequestError when the session is a story.
        """
        state = self._sessions.get(session)
        if state.session.kind != "chat":
            raise InvalidRequestError(
                f"session {session} is a {state.session.kind}, not a chat: see tpserve sessions list"
            )
        self._session = session
        defaults = SamplingParams()
        flags = {k: v for k, v in self._flags.items() if v != getattr(defaults, k)}
        params = msgspec.structs.replace(state.session.params, **flags)
        self._options = SamplingOptions(**msgspec.structs.asdict(params))  # type: ignore[typeddict-item]
        title = state.session.title or "without a title yet"
        note(f"session {session}, {title}: {len(state.messages)} messages")

    def say(self, text: str) -> bool:
        """Send a turn and show the answer; False when Ctrl-C cut it short. Raises TpserveError."""
        return self._show(self._sessions.send(self._id(), text, **self._options))

    def command(self, line: str) -> bool:
        """Carry out a /command; False when its answer was cut short.

        Raises InvalidRequestError for an unknown one, TpserveError when it fails.
        """
        match line.split(maxsplit=1):
            case ["/regen"]:
                return self._show(self._sessions.regenerate(self._id(), **self._options))
            case ["/edit", rest]:
                return self._edit(rest.rstrip())
            case ["/continue"]:
                options = SamplingOptions(**{**self._options, "n": 1})
                return self._show(self._sessions.go_on(self._id(), **options))
            case ["/branch", *place]:
                self._branch(place)
            case ["/rollback", *number]:
                message = self._said(number)
                _tell_length(self._sessions.rollback(self._id(), message.parent))
            case ["/reset"]:
                _tell_length(self._sessions.rollback(self._id(), None))
            case ["/undo"]:
                _tell_length(self._sessions.undo(self._id()))
            case ["/redo"]:
                _tell_length(self._sessions.redo(self._id()))
            case ["/rename", title]:
                self._sessions.rename(self._id(), title.rstrip())
            case ["/system", *text]:
                self._sessions.configure(self._id(), system=text[0].rstrip() if text else None)
            case ["/sessions"]:
                write_sessions(list(islice(_chats(self._client), _LISTED)))
            case ["/open", session]:
                self.open(_number(session, "the id of a session", (1 << 63) - 1))
            case ["/stats"]:
                self._turns = [Message(m.role, m.content) for m in self._messages()]
                super().command(line)
            case _:
                return super().command(line)
        return True

    def _id(self) -> int:
        if self._session is None:
            created = self._sessions.create(model=self._model, system=self._system, **self._options)
            self._session = created.session.id
            note(f"session {self._session}; tpserve chat --session {self._session} goes on with it")
        return self._session

    def _messages(self) -> list[StoredMessage]:
        return self._sessions.get(self._id()).messages

    def _said(self, number: Sequence[str]) -> StoredMessage:
        """The user's message that a command names by its number, or by none: the last one."""
        said = [message for message in self._messages() if message.role == "user"]
        if not said:
            raise InvalidRequestError("you have said nothing yet")
        return said[_number(number[0], "a message of yours", len(said)) - 1 if number else -1]

    def _edit(self, rest: str) -> bool:
        first, *text = rest.split(maxsplit=1)
        if text and first.isdecimal():
            message, new = self._said([first]), text[0]
        else:
            message, new = self._said([]), rest
        return self._show(self._sessions.edit(self._id(), message.id, new, **self._options))

    def _branch(self, place: Sequence[str]) -> None:
        answers = [message for message in self._messages() if message.role == "assistant"]
        if not answers:
            raise InvalidRequestError("there is no answer yet")
        last, count = answers[-1], len(answers[-1].siblings)
        if not place:
            write(f"‹{last.position}/{count}›\n")
            return
        chosen = last.siblings[_number(place[0], "one of the answers", count) - 1]
        state = self._sessions.branch(self._id(), chosen)
        for message in state.messages:
            if message.id == chosen:
                write(f"‹{message.position}/{count}› {message.content}\n")
        _tell_length(state)

    def _show(self, stream: Stream) -> bool:
        show(stream)
        if isinstance(stream.end, Done):
            self._last = stream.end
        return not isinstance(stream.end, Cancelled)


def last_chat(client: Client) -> int:
    """The chat that was changed last. Raises SessionNotFoundError when there is none."""
    for chat in _chats(client):
        return chat.id
    raise SessionNotFoundError("the server keeps no chat yet")


def _chats(client: Client) -> Iterator[SessionInfo]:
    """Those changed last first."""
    cursor = None
    while True:
        page = client.sessions.page(_PAGE, cursor)
        yield from (session for session in page.sessions if session.kind == "chat")
        if (cursor := page.cursor) is None:
            return


def keeps_sessions(client: Client) -> bool:
    """Whether the server can; whoever sits at a terminal is told why not."""
    try:
        client.sessions.page(1)
    except (SessionsOffError, DatabaseError) as error:
        note(f"this conversation is not kept: {error.message}")
        return False
    return True


def _number(text: str, what: str, most: int) -> int:
    """Raises InvalidRequestError when it is not one from 1 to `most`."""
    digits = text.strip()
    if not digits.isdecimal() or not 1 <= int(digits) <= most:
        raise InvalidRequestError(f"{digits!r} is not {what}: a number from 1 to {most}")
    return int(digits)


def _tell_length(state: SessionState) -> None:
    note(f"the conversation has {len(state.messages)} messages now")
