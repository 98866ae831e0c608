"""What clients and the coordinator say to each other about sessions."""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from shared.messages import (
    BaseEvent,
    FinishReason,
    Kind,
    ModelName,
    OwnedRequest,
    Role,
    SamplingParams,
    Timings,
)

# --- client -> coordinator ------------------------------------------------------------------------

StoredId = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
"""Of a session or a message, given by the database."""
Title = Annotated[str, Meta(max_length=200)]


def _no_echo(params: SamplingParams | None) -> None:
    if params is not None and params.echo:
        raise ValueError("an answer of a session is without the prompt: echo is false")


class CreateSession(OwnedRequest, frozen=True, kw_only=True, tag="create_session"):
    """Start a conversation, or a story, that the server keeps."""

    kind: Kind
    title: Title = ""
    """Empty: the beginning of the user's first message."""
    model: ModelName | None = None
    """None: at each turn as in `generate`."""
    system: str | None = None
    """Instructions that precede the conversation; chats only."""
    params: SamplingParams = SamplingParams()
    """Of all turns that bring none of their own."""

    def __post_init__(self) -> None:
        _no_echo(self.params)
        if self.kind == "story" and self.system is not None:
            raise ValueError("a story has no system prompt")


class ListSessions(OwnedRequest, frozen=True, kw_only=True, tag="sessions"):
    """The sessions, those changed last first."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 50
    cursor: Annotated[str, Meta(max_length=64)] | None = None
    """That the page before this one came with."""


class SearchSessions(OwnedRequest, frozen=True, kw_only=True, tag="search"):
    """Sessions and messages that have all words of a text, the newest first."""

    text: Annotated[str, Meta(min_length=1, max_length=256)]
    limit: Annotated[int, Meta(ge=1, le=1000)] = 50


class ImportSession(OwnedRequest, frozen=True, kw_only=True, tag="import_session"):
    """Make a session of an exported one."""

    data: "SessionExport"


class _AboutSession(OwnedRequest, frozen=True, kw_only=True):
    session: StoredId


class GetSession(_AboutSession, frozen=True, kw_only=True, tag="session"):
    """A session with the messages on its selected path."""


class ConfigureSession(_AboutSession, frozen=True, kw_only=True, tag="configure_session"):
    """Change what is set of it; what is left out stays. Counts from the next turn on."""

    title: Annotated[str, Meta(min_length=1, max_length=200)] | UnsetType = UNSET
    model: ModelName | UnsetType | None = UNSET
    """None: at each turn as in `generate`."""
    system: str | UnsetType | None = UNSET
    """None: no instructions."""
    params: SamplingParams | UnsetType = UNSET
    """In place of all that were set before."""

    def __post_init__(self) -> None:
        if self.params is not UNSET:
            _no_echo(self.params)
        if all(new is UNSET for new in (self.title, self.model, self.system, self.params)):
            raise ValueError("nothing to change: give title, model, system or params")


class DeleteSession(_AboutSession, frozen=True, kw_only=True, tag="delete_session"):
    """Delete it with all messages."""


class ExportSession(_AboutSession, frozen=True, kw_only=True, tag="export_session"):
    """All of it, for `import_session`."""


class Rollback(_AboutSession, frozen=True, kw_only=True, tag="rollback"):
    """Go back to a message, after which the next turn goes on. Nothing is deleted."""

    message: StoredId | None
    """None: to before the first one."""


class SelectBranch(_AboutSession, frozen=True, kw_only=True, tag="branch"):
    """Select a message, and what was selected last after it."""

    message: StoredId


class Undo(_AboutSession, frozen=True, kw_only=True, tag="undo"):
    """Select the path that was selected before."""


class Redo(_AboutSession, frozen=True, kw_only=True, tag="redo"):
    """Take an undo back."""


class WriteStory(_AboutSession, frozen=True, kw_only=True, tag="write"):
    """Make a story's whole text another one; nothing is generated.

    The pieces on the selected path stay as far as the text begins with them, the rest becomes one
    of the user's.
    """

    text: str


class _Turn(_AboutSession, frozen=True, kw_only=True):
    params: SamplingParams | None = None
    """None: the session's."""
    stream: bool = True
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    wait: bool = False
    """Whether to wait for the session's other turns instead of being refused."""

    def __post_init__(self) -> None:
        _no_echo(self.params)


class SendTurn(_Turn, frozen=True, kw_only=True, tag="send"):
    """Append what the user says, or writes of the story, and have it answered or continued."""

    text: str = ""
    """Empty: just go on; stories only."""


class Regenerate(_Turn, frozen=True, kw_only=True, tag="regenerate"):
    """Write another answer beside one."""

    message: StoredId | None = None
    """The answer, or the user's message that it follows. None: the last message."""


class EditTurn(_Turn, frozen=True, kw_only=True, tag="edit"):
    """Put another message beside one of the user's, and have it answered."""

    message: StoredId
    text: Annotated[str, Meta(min_length=1)]


class ContinueTurn(_Turn, frozen=True, kw_only=True, tag="continue"):
    """Write on at the last answer, which was cut short; the session's `n` does not count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.params is not None and self.params.n != 1:
            raise ValueError(f"n is {self.params.n}, but continue writes on at one answer: n is 1")


TurnRequest = SendTurn | Regenerate | EditTurn | ContinueTurn
SessionRequest = (
    CreateSession
    | ListSessions
    | GetSession
    | ConfigureSession
    | DeleteSession
    | SearchSessions
    | ExportSession
    | ImportSession
    | Rollback
    | SelectBranch
    | Undo
    | Redo
    | WriteStory
    | SendTurn
    | Regenerate
    | EditTurn
    | ContinueTurn
)

# --- coordinator -> client ------------------------------------------------------------------------


class SessionInfo(Struct, frozen=True, kw_only=True):
    """A session without its messages. Times are seconds since 1970."""

    id: int
    kind: Kind
    title: str
    model: str | None
    system: str | None
    params: SamplingParams
    created: float
    updated: float
    leaf: int | None
    """Id of the last message on the selected path; None: it is empty."""


class StoredMessage(Struct, frozen=True, kw_only=True):
    """One message of a session's tree."""

    id: int
    parent: int | None
    """Id of the message before it."""
    role: Role
    content: str
    prompt_tokens: int
    """Read for it; 0 for what the user wrote."""
    completion_tokens: int
    timings: Timings | None
    """None where it was not generated, or not to its end."""
    model: str | None
    finish_reason: FinishReason | None
    partial: bool
    """It was cancelled, or failed, before its end."""
    created: float
    position: int
    """Its place among its siblings, from 1."""
    siblings: list[int]
    """Ids of all messages after the same parent, itself included, the oldest first."""


class ExportedMessage(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A message in a file; others are named by their place in the list, from 0."""

    parent: Annotated[int, Meta(ge=0)] | None
    role: Role
    content: str
    created: float
    selected: Annotated[int, Meta(ge=0)] | None = None
    """Which of its children was selected last."""
    prompt_tokens: Annotated[int, Meta(ge=0, lt=1 << 31)] = 0
    completion_tokens: Annotated[int, Meta(ge=0, lt=1 << 31)] = 0
    timings: Timings | None = None
    model: str | None = None
    finish_reason: FinishReason | None = None
    partial: bool = False


class SessionExport(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A session with all messages, independent of the database that it comes from."""

    format: Literal["tpserve session 1"]
    kind: Kind
    title: Title
    model: ModelName | None
    system: str | None
    params: SamplingParams
    created: float
    updated: float
    root: Annotated[int, Meta(ge=0)] | None
    """Which of the first messages is selected."""
    leaf: Annotated[int, Meta(ge=0)] | None
    messages: list[ExportedMessage]
    """Parents before children, siblings in order."""

    def __post_init__(self) -> None:
        _no_echo(self.params)
        for place, message in enumerate(self.messages):
            if message.parent is not None and message.parent >= place:
                raise ValueError(f"message {place} has a parent that does not come before it")
            chosen = message.selected
            if chosen is not None and (
                chosen >= len(self.messages) or self.messages[chosen].parent != place
            ):
                raise ValueError(f"message {place} selects {chosen}, which is no child of it")
        for name, chosen in (("root", self.root), ("leaf", self.leaf)):
            if chosen is not None and chosen >= len(self.messages):
                raise ValueError(f"{name} is {chosen}, but there are {len(self.messages)} messages")
        if self.root is not None and self.messages[self.root].parent is not None:
            raise ValueError(f"root is {self.root}, which has a parent")


class SessionHit(Struct, frozen=True, kw_only=True):
    """Where a search has found its words."""

    session: int
    title: str
    message: int | None
    """None: in the title."""
    text: str
    """The beginning of the title or message that has them, or what surrounds them."""


class SessionState(BaseEvent, frozen=True, kw_only=True, tag="session"):
    """A session and its selected path; the answer to all that makes or changes one."""

    session: SessionInfo
    messages: list[StoredMessage]
    can_undo: bool
    can_redo: bool


class Sessions(BaseEvent, frozen=True, kw_only=True, tag="sessions"):
    """Answer to `sessions`."""

    sessions: list[SessionInfo]
    cursor: str | None
    """For the next page; None: this was the last one."""


class SessionGone(BaseEvent, frozen=True, kw_only=True, tag="session_gone"):
    """Answer to `delete_session`."""

    session: int


class SessionHits(BaseEvent, frozen=True, kw_only=True, tag="hits"):
    """Answer to `search`."""

    hits: list[SessionHit]


class SessionExported(BaseEvent, frozen=True, kw_only=True, tag="exported"):
    """Answer to `export_session`."""

    data: SessionExport


class TurnStored(BaseEvent, frozen=True, kw_only=True, tag="stored"):
    """Before the last event of a turn: what the session has got by it."""

    session: int
    user_message: int | None
    """Id of what the user said; None: nothing new."""
    answers: list[int]
    """Ids of what was written, in order of index; the first one is selected."""
