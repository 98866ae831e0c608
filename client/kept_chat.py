"""A conversation at the prompt whose messages the server keeps: `tpserve chat --session`."""

import msgspec

from client.commands.common import show
from client.render import note
from client.repl import Conversation
from client.requests import SamplingOptions
from client.zmq_client import Client
from shared.errors import InvalidRequestError, SessionNotFoundError
from shared.messages import Cancelled, Done, Message, SamplingParams


class KeptConversation(Conversation):
    """Goes on with a session of the server."""

    def __init__(self, client: Client, session: int, options: SamplingOptions) -> None:
        """options: those that differ from the defaults go before the session's own.

        Raises SessionNotFoundError, InvalidRequestError when the session is a story.
        """
        super().__init__(client, None, None, options)
        state = client.sessions.get(session)
        if state.session.kind != "chat":
            raise InvalidRequestError(
                f"session {session} is a {state.session.kind}, not a chat: see tpserve sessions list"
            )
        self._session = session
        defaults = SamplingParams()
        flags = {k: v for k, v in options.items() if v != getattr(defaults, k)}
        params = msgspec.structs.replace(state.session.params, **flags)
        self._options = SamplingOptions(**msgspec.structs.asdict(params))  # type: ignore[typeddict-item]
        title = state.session.title or "without a title yet"
        note(f"session {session}, {title}: {len(state.messages)} messages")

    def say(self, text: str) -> bool:
        """Send a turn and show the answer; False when Ctrl-C cut it short. Raises TpserveError."""
        stream = self._client.sessions.send(self._session, text, **self._options)
        show(stream)
        if isinstance(stream.end, Done):
            self._last = stream.end
        return not isinstance(stream.end, Cancelled)

    def command(self, line: str) -> None:
        """Carry out a /command. Raises InvalidRequestError for an unknown one."""
        match line.split():
            case ["/reset"]:
                self._client.sessions.rollback(self._session, None)
                note("the conversation starts anew; what was said is kept as a branch")
            case ["/undo"]:
                self._forget_last_turn()
            case _:
                messages = self._client.sessions.get(self._session).messages
                self._turns = [Message(m.role, m.content) for m in messages]
                super().command(line)

    def _forget_last_turn(self) -> None:
        messages = self._client.sessions.get(self._session).messages
        said = [message for message in messages if message.role == "user"]
        if said:
            self._client.sessions.rollback(self._session, said[-1].parent)
        note("the last turn is kept as a branch" if said else "there is no turn to forget")


def last_chat(client: Client) -> int:
    """The chat that was changed last. Raises SessionNotFoundError when there is none."""
    cursor = None
    while True:
        page = client.sessions.page(1000, cursor)
        for session in page.sessions:
            if session.kind == "chat":
                return session.id
        if (cursor := page.cursor) is None:
            raise SessionNotFoundError("the server keeps no chat yet")
