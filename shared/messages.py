"""Every message that crosses a process, as frozen structs, and their msgpack form.

Two families: what clients and the coordinator say to each other (described for other languages in
docs/protocol.md; versioned, strictly validated), and what the coordinator and its workers say.
Unknown fields are refused, never ignored; nothing is pickled.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from shared.errors import InvalidRequestError, TpserveError

PROTOCOL_VERSION = 1
BLOCK_TOKENS = 16
"""Positions of one KV block: what a block table in a plan means, so the same for all processes."""
MAX_MESSAGE_BYTES = 1 << 20
"""Limit of one frame from a client."""

Kind = Literal["story", "chat"]
Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]
RequestId = Annotated[str, Meta(min_length=1, max_length=64)]
ModelName = Annotated[str, Meta(min_length=1, max_length=256)]


# --- client -> coordinator ------------------------------------------------------------------------


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Role
    content: str


StopString = Annotated[str, Meta(min_length=1, max_length=256)]
TokenIdNumber = Annotated[int, Meta(ge=0, lt=1 << 24)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]


Precision = Literal["fp32", "bf16", "fp16", "int8", "int4"]
"""Of weights. int8, int4: in groups of 32 with a scale each."""
KVPrecision = Literal["fp32", "bf16", "fp16", "int8"]
"""Of keys and values. int8: with a scale for each position and head."""


class SamplingParams(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """How tokens are chosen and when to stop. None means: the model's own default."""

    max_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    """New tokens at most; None: as many as the context holds."""
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    """0 is greedy: the most probable token, the lowest id among equals."""
    top_k: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None
    """Sample among the k most probable tokens only; 0: among all."""
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    """Sample among the fewest most probable tokens whose probabilities add up to top_p."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    """Leave out tokens less probable than min_p times the most probable one."""
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None
    """Same request and seed, same tokens. None: a random one."""
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    """Divides positive and multiplies negative logits of tokens in the prompt or the answer."""
    presence_penalty: Penalty = 0.0
    """Taken off the logits of tokens that the answer already has."""
    frequency_penalty: Penalty = 0.0
    """The same, times how often it has them."""
    logit_bias: Annotated[
        dict[TokenIdNumber, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)
    ] = {}
    """Added to the logits of these token ids."""
    stop: Annotated[list[StopString], Meta(max_length=16)] = []
    """The answer ends before the first of these texts."""
    stop_token_ids: Annotated[list[TokenIdNumber], Meta(max_length=64)] = []
    """The answer ends with the first of these tokens."""
    min_tokens: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    """No end before so many new tokens."""
    ignore_eos: bool = False
    """Go on after the model's own end-of-text token."""
    n: Annotated[int, Meta(ge=1, le=64)] = 1
    """Answers to the same prompt; with a seed, answer i uses seed + i."""
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    """Report each token's log probability and those of so many most probable ones."""
    echo: bool = False
    """The text begins with the prompt; stories only."""


class _Request(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    tag_field="op",
):
    id: RequestId
    """Chosen by the client; every event of the answer carries it."""
    v: int = PROTOCOL_VERSION


class Generate(_Request, frozen=True, kw_only=True, tag="generate"):
    """Continue `prompt` (a story) or answer `messages` (a chat): exactly one of the two."""

    kind: Kind
    model: ModelName | None = None
    """None: the model named like the kind, else the first."""
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)] | None = None
    params: SamplingParams = SamplingParams()
    stream: bool = True
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    """Jobs with a lower number start first."""
    continue_last: bool = False
    """The last message is the assistant's and is to be written on; chats only."""

    def __post_init__(self) -> None:
        if self.continue_last and (not self.messages or self.messages[-1].role != "assistant"):
            raise ValueError("continue_last needs messages, the last of them the assistant's")
        if self.params.echo and self.kind != "story":
            raise ValueError("echo needs kind 'story'")
        wanted, other = ("prompt", "messages") if self.kind == "story" else ("messages", "prompt")
        if getattr(self, wanted) is None:
            raise ValueError(f"kind {self.kind!r} needs {wanted!r}")
        if getattr(self, other) is not None:
            raise ValueError(f"kind {self.kind!r} takes {wanted!r}, not {other!r}")


class Cancel(_Request, frozen=True, kw_only=True, tag="cancel"):
    """End the job that this client started with the request id `job`."""

    job: RequestId


class ListModels(_Request, frozen=True, kw_only=True, tag="models"):
    """What is loaded."""


class GetStatus(_Request, frozen=True, kw_only=True, tag="status"):
    """Workers, queue, memory, rates."""


class GetHealth(_Request, frozen=True, kw_only=True, tag="health"):
    """Is a token coming through all workers."""


class Load(_Request, frozen=True, kw_only=True, tag="load"):
    """Load one more model while the others go on. None means: as the server's own settings say."""

    name: ModelName
    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    """A folder on the server's machine."""
    dtype: Literal["auto"] | Precision | None = None
    kv_dtype: Literal["auto"] | KVPrecision | None = None
    max_model_len: Annotated[int, Meta(ge=0, le=1 << 24)] | None = None


class Unload(_Request, frozen=True, kw_only=True, tag="unload"):
    """Give a model's memory back. It takes no new jobs; those it has are finished first."""

    name: ModelName
    force: bool = False
    """End its jobs at once."""


class Tokenize(_Request, frozen=True, kw_only=True, tag="tokenize"):
    """The tokens that the model would read: of a story's prompt, or of a conversation."""

    model: ModelName | None = None
    """None: as in Generate."""
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)] | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")


class Detokenize(_Request, frozen=True, kw_only=True, tag="detokenize"):
    """The text of tokens."""

    model: ModelName | None = None
    """None: the model named story, else the first."""
    token_ids: Annotated[list[TokenIdNumber], Meta(max_length=65536)]


# --- sessions: client -> coordinator --------------------------------------------------------------

StoredId = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
"""Of a session or a message, given by the database."""
Title = Annotated[str, Meta(max_length=200)]


def _one_answer(params: SamplingParams | None) -> None:
    if params is not None and (params.n != 1 or params.echo):
        raise ValueError("in a session an answer is one, and without an echo: n is 1, echo false")


class CreateSession(_Request, frozen=True, kw_only=True, tag="create_session"):
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
        _one_answer(self.params)
        if self.kind == "story" and self.system is not None:
            raise ValueError("a story has no system prompt")


class ListSessions(_Request, frozen=True, kw_only=True, tag="sessions"):
    """The sessions, those changed last first."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 50
    cursor: Annotated[str, Meta(max_length=64)] | None = None
    """That the page before this one came with."""


class SearchSessions(_Request, frozen=True, kw_only=True, tag="search"):
    """Sessions and messages that have all words of a text, the newest first."""

    text: Annotated[str, Meta(min_length=1, max_length=256)]
    limit: Annotated[int, Meta(ge=1, le=1000)] = 50


class ImportSession(_Request, frozen=True, kw_only=True, tag="import_session"):
    """Make a session of an exported one."""

    data: "SessionExport"


class _AboutSession(_Request, frozen=True, kw_only=True):
    session: StoredId


class GetSession(_AboutSession, frozen=True, kw_only=True, tag="session"):
    """A session with the messages on its selected path."""


class RenameSession(_AboutSession, frozen=True, kw_only=True, tag="rename_session"):
    """Give it another title."""

    title: Annotated[str, Meta(min_length=1, max_length=200)]


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


class _Turn(_AboutSession, frozen=True, kw_only=True):
    params: SamplingParams | None = None
    """None: the session's."""
    stream: bool = True
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0

    def __post_init__(self) -> None:
        _one_answer(self.params)


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
    """Write on at the last answer, which was cut short."""


TurnRequest = SendTurn | Regenerate | EditTurn | ContinueTurn
SessionRequest = (
    CreateSession
    | ListSessions
    | GetSession
    | RenameSession
    | DeleteSession
    | SearchSessions
    | ExportSession
    | ImportSession
    | Rollback
    | SelectBranch
    | Undo
    | Redo
    | SendTurn
    | Regenerate
    | EditTurn
    | ContinueTurn
)

Request = (
    Generate
    | Cancel
    | ListModels
    | GetStatus
    | GetHealth
    | Load
    | Unload
    | Tokenize
    | Detokenize
    | SessionRequest
)


# --- coordinator -> client ------------------------------------------------------------------------


class Usage(Struct, frozen=True, kw_only=True):
    """Token counts of one job."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0
    """Prompt tokens whose KV was found in the cache."""


class Timings(Struct, frozen=True, kw_only=True):
    """Seconds spent, by phase, and rates in tokens per second."""

    queue_s: float
    ttft_s: float
    """Time to first token: from the request's acceptance to its first token."""
    time_per_token_s: float
    """Mean time between tokens after the first one."""
    prefill_s: float
    """From the start of the first step to the first token."""
    decode_s: float
    """From the first token to the last."""
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


class _Event(Struct, frozen=True, kw_only=True, tag_field="event"):
    id: str
    v: int = PROTOCOL_VERSION


class Queued(_Event, frozen=True, kw_only=True, tag="queued"):
    """The job was accepted; `position` jobs of its kind stand before it."""

    position: int


class Started(_Event, frozen=True, kw_only=True, tag="started"):
    """Prefill begins."""

    model: str
    prompt_tokens: int


class Alternative(Struct, frozen=True):
    """A token that could have come, with the natural logarithm of its probability."""

    token_id: int
    text: str
    logprob: float


class TokenLogprob(Struct, frozen=True):
    """A token that came, and the most probable ones in its place, best first."""

    token_id: int
    text: str
    logprob: float
    top: list[Alternative]


class Token(_Event, frozen=True, kw_only=True, tag="token", omit_defaults=True):
    """New text of answer `index`; it may be empty while a character is incomplete."""

    text: str
    token_ids: list[int]
    index: int = 0
    logprobs: list[TokenLogprob] = []


class Progress(_Event, frozen=True, kw_only=True, tag="progress"):
    """Sent once a second for a job that sends nothing else: it waits, or it does not stream."""

    position: int | None
    """Jobs of its kind that stand before it; None once it runs."""
    new_tokens: int


class Choice(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One finished answer. `text` is what was generated, without the prompt unless it is echoed."""

    index: int = 0
    text: str
    token_ids: list[int]
    """All new tokens, an end-of-text token included."""
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    """The stop string, or the id of the token, that ended it."""
    logprobs: list[TokenLogprob] = []


class Done(_Event, frozen=True, kw_only=True, tag="done"):
    """All answers are finished."""

    choices: list[Choice]
    model: str
    usage: Usage
    timings: Timings

    @property
    def text(self) -> str:
        """Text of the first answer."""
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        """New tokens of the first answer."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first answer ended."""
        return self.choices[0].finish_reason


class Failed(_Event, frozen=True, kw_only=True, tag="failed"):
    """The request was refused or its job ended by an error."""

    code: str
    message: str
    retry_after_s: float | None = None
    """For queue_full: when to try again."""


class Partial(Struct, frozen=True):
    """What there is of an answer that was cancelled."""

    text: str
    token_ids: list[int]


class Cancelled(_Event, frozen=True, kw_only=True, tag="cancelled"):
    """The job was ended by `cancel`. Also the answer to the cancel request itself."""

    partial: list[Partial] = []
    """By answer; empty if the job had not started."""

    @property
    def text(self) -> str:
        """What there is of the first answer's text."""
        return self.partial[0].text if self.partial else ""

    @property
    def token_ids(self) -> list[int]:
        """What there is of the first answer's tokens."""
        return self.partial[0].token_ids if self.partial else []


ModelState = Literal["ready", "loading", "unloading"]


class ModelInfo(Struct, frozen=True, kw_only=True):
    """A model that is loaded, or on its way in or out."""

    name: str
    path: str
    model_type: str
    dtype: str
    kv_dtype: str
    parameters: int
    max_model_len: int
    vocab_size: int
    kv_capacity_tokens: int
    has_chat_template: bool
    state: ModelState = "ready"
    weight_bytes: list[int] = []
    """By worker."""
    kv_bytes: list[int] = []
    """Of the KV cache, by worker."""


class Models(_Event, frozen=True, kw_only=True, tag="models"):
    """Answer to `models`."""

    models: list[ModelInfo]


class RankProgress(Struct, frozen=True):
    """How far one worker has come with loading a model."""

    rank: int
    bytes_done: int
    bytes_total: int
    """Of packed weights, as planned."""
    seconds_left: float | None
    """None: not known yet."""


LoadPhase = Literal["waiting", "opening", "reading", "testing"]
"""Behind another one; its files are checked; workers read weights; a token is computed."""


class Loading(_Event, frozen=True, kw_only=True, tag="loading"):
    """Several times a second while a model is loaded."""

    model: str
    phase: LoadPhase
    ranks: list[RankProgress] = []


class ModelReady(_Event, frozen=True, kw_only=True, tag="model_ready"):
    """Answer to `load`: the model takes jobs; a token came through all workers."""

    model: ModelInfo
    seconds: float


class ModelGone(_Event, frozen=True, kw_only=True, tag="model_gone"):
    """Answer to `unload`: every worker has given the model's memory back."""

    model: str
    freed_bytes: int
    """Weights and KV cache, over all workers."""


class WorkerStatus(Struct, frozen=True, kw_only=True):
    """One worker process. Times are sums over its steps, at most a second old; all of them at rest."""

    rank: int
    pid: int
    virtual_shards: list[int]
    memory_bytes: int
    """Resident memory that it shares with nobody."""
    compute_s: float
    comm_s: float
    """In collectives, waiting for slower ranks included."""


class Totals(Struct, kw_only=True):
    """Sums since the server started; a rate is the difference of two of them over time."""

    steps: int = 0
    sequence_steps: int = 0
    """Sequences over all steps: divided by steps, the mean batch."""
    tokens_computed: int = 0
    """Prompt and decode tokens that went through the model."""
    prompt_tokens: int = 0
    """Of the jobs that were started, whether computed or found in the cache."""
    tokens_generated: int = 0
    jobs_done: int = 0
    plan_s: float = 0.0
    """Coordinator: making plans."""
    other_s: float = 0.0
    """Coordinator: taking results and requests, detokenising, sending events."""
    wait_s: float = 0.0
    """Coordinator: waiting for sockets."""


class Percentiles(Struct, frozen=True):
    """Of the last jobs, in seconds."""

    p50: float
    p99: float


class Status(_Event, frozen=True, kw_only=True, tag="status"):
    """Answer to `status`."""

    version: str
    ready: bool
    uptime_s: float
    pid: int
    epoch: int
    """How often the workers were started."""
    comm: str
    kernels: str
    """What the workers compute with: "native " and the instruction set, or "torch"; empty: not yet known."""
    workers: list[WorkerStatus]
    models: list[ModelInfo]
    queued: dict[str, int]
    running: int
    totals: Totals
    queue_time: Percentiles
    ttft: Percentiles
    time_per_token: Percentiles
    kv_blocks_used: int
    kv_blocks_total: int


class Health(_Event, frozen=True, kw_only=True, tag="health"):
    """Answer to `health`: `ready` means a token came through all workers since they started."""

    ready: bool
    reason: str = ""


class Tokens(_Event, frozen=True, kw_only=True, tag="tokens"):
    """Answer to `tokenize`."""

    model: str
    token_ids: list[int]
    max_model_len: int
    """Tokens that the model holds, prompt and answer together."""


class Text(_Event, frozen=True, kw_only=True, tag="text"):
    """Answer to `detokenize`. Special tokens are shown."""

    model: str
    text: str


# --- sessions: coordinator -> client --------------------------------------------------------------


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
        _one_answer(self.params)
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


class SessionState(_Event, frozen=True, kw_only=True, tag="session"):
    """A session and its selected path; the answer to all that makes or changes one."""

    session: SessionInfo
    messages: list[StoredMessage]
    can_undo: bool
    can_redo: bool


class Sessions(_Event, frozen=True, kw_only=True, tag="sessions"):
    """Answer to `sessions`."""

    sessions: list[SessionInfo]
    cursor: str | None
    """For the next page; None: this was the last one."""


class SessionGone(_Event, frozen=True, kw_only=True, tag="session_gone"):
    """Answer to `delete_session`."""

    session: int


class SessionHits(_Event, frozen=True, kw_only=True, tag="hits"):
    """Answer to `search`."""

    hits: list[SessionHit]


class SessionExported(_Event, frozen=True, kw_only=True, tag="exported"):
    """Answer to `export_session`."""

    data: SessionExport


class TurnStored(_Event, frozen=True, kw_only=True, tag="stored"):
    """Before the last event of a turn: what the session has got by it."""

    session: int
    user_message: int | None
    """Id of what the user said; None: nothing new."""
    answer: int | None
    """Id of the answer; None: nothing of it was written."""


Event = (
    Queued
    | Started
    | Token
    | Progress
    | Done
    | Failed
    | Cancelled
    | Models
    | Status
    | Health
    | Loading
    | ModelReady
    | ModelGone
    | Tokens
    | Text
    | SessionState
    | Sessions
    | SessionGone
    | SessionHits
    | SessionExported
    | TurnStored
)
TERMINAL_EVENTS = (
    Done,
    Failed,
    Cancelled,
    ModelReady,
    ModelGone,
    SessionState,
    Sessions,
    SessionGone,
    SessionHits,
    SessionExported,
)


# --- coordinator -> worker ------------------------------------------------------------------------


class CommSetup(Struct, frozen=True, kw_only=True):
    """How the workers of one epoch reach each other."""

    kind: Literal["local", "shm", "zmq", "gloo"]
    rank: int
    owned: list[tuple[int, int]]
    """Virtual shards [start, stop) of every rank; its length is the world size."""
    deadline_s: float
    """A peer that stays silent for so long in a collective is an error."""
    addresses: list[str] = []
    """zmq: the address each rank binds. gloo: one, file:///PATH of its rendezvous file."""


class _ToWorker(Struct, frozen=True, kw_only=True, tag_field="t"): ...


class SetUp(_ToWorker, frozen=True, kw_only=True, tag="setup"):
    """First message to a worker that said hello."""

    epoch: int
    comm: CommSetup
    virtual_shards: int
    threads: int
    core: int | None = None
    """Pin the process to this core and the threads-1 after it."""


class LoadModel(_ToWorker, frozen=True, kw_only=True, tag="load"):
    """Read this rank's slices of a checkpoint, beside the steps of other models.

    Answered by LoadProgress, then by Loaded or WorkerFailed.
    """

    model: str
    path: str
    dtype: Precision
    kv_dtype: KVPrecision
    max_model_len: int
    threads: int = 1
    """That pack weights."""
    shard_cache: str = ""
    """Folder for packed int8 and int4 weights; empty: none."""


class UnloadModel(_ToWorker, frozen=True, kw_only=True, tag="unload"):
    """Forget a model, loaded or not. Answered by Unloaded."""

    model: str


class AllocateKV(_ToWorker, frozen=True, kw_only=True, tag="kv"):
    """Make room for `blocks` KV blocks. Answered by Allocated."""

    model: str
    blocks: int
    slots: int
    """Sequences that may run at once: the size of the table of last tokens."""
    tokens: int
    """Of one step at most."""


class Sampling(Struct, frozen=True, array_like=True):
    """Resolved sampling parameters of one sequence.

    Order: logit_bias and penalties change the logits; then temperature, top_k, top_p, min_p.
    """

    temperature: float
    """0 is greedy."""
    top_k: int
    """0: no limit."""
    top_p: float
    seed: int
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    banned: list[int] = []
    """Token ids that may not be sampled for positions before `banned_before`."""
    banned_before: int = 0
    logprobs: int = -1
    """How many of the most probable tokens to report; 0: the chosen one only; -1: nothing."""

    @property
    def penalises(self) -> bool:
        """Whether it depends on the tokens that came before."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


class History(Struct, frozen=True, array_like=True):
    """The tokens of a sequence so far, for penalties; int32 little-endian."""

    prompt: bytes
    output: bytes


class SequenceStep(Struct, frozen=True, array_like=True):
    """What one sequence does in a step: process tokens at positions start, start+1, ..."""

    slot: int
    start: int
    tokens: list[int]
    """Token ids; empty: one token, the last one sampled for this slot."""
    blocks: bytes
    """Block table, int32 little-endian: block i holds the BLOCK_TOKENS positions from BLOCK_TOKENS * i on."""
    sampling: Sampling | None
    """None: only fill the KV cache (a prefill chunk that is not the last)."""
    history: History | None = None
    """Given with the first step of a sequence in its slot, if its sampling has penalties."""


class BlockCopy(Struct, frozen=True, array_like=True):
    """Copy a KV block before the step."""

    source: int
    target: int


class StepPlan(_ToWorker, frozen=True, kw_only=True, tag="step"):
    """Forward passes of one model. Complete: workers add only weights, KV and last tokens."""

    epoch: int
    step: int
    model: str
    sequences: list[SequenceStep]
    passes: int = 1
    """More than one: all sequences decode, and each pass goes on from the tokens of the one before."""
    copies: list[BlockCopy] = []


class ShutDown(_ToWorker, frozen=True, kw_only=True, tag="shutdown"):
    """Leave, with exit code 0."""


ToWorker = SetUp | LoadModel | UnloadModel | AllocateKV | StepPlan | ShutDown


# --- worker -> coordinator ------------------------------------------------------------------------


class _FromWorker(Struct, frozen=True, kw_only=True, tag_field="t"):
    rank: int
    epoch: int


class Hello(_FromWorker, frozen=True, kw_only=True, tag="hello"):
    """The process is up. `epoch` is the one it was started for."""

    pid: int
    kernels: str
    """What it computes with: "native " and the instruction set, or "torch"."""


class CommReady(_FromWorker, frozen=True, kw_only=True, tag="comm_ready"):
    """A barrier with all peers was passed."""


class LoadProgress(_FromWorker, frozen=True, kw_only=True, tag="load_progress"):
    """A few times a second while weights are read."""

    model: str
    weight_bytes: int
    """Packed so far."""


class Loaded(_FromWorker, frozen=True, kw_only=True, tag="loaded"):
    """Weights are in memory."""

    model: str
    weight_bytes: int
    kv_block_bytes: int
    free_bytes: int


class Allocated(_FromWorker, frozen=True, kw_only=True, tag="allocated"):
    """KV memory is there."""

    model: str


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Natural logarithms of probabilities under the model's own logits, before any sampling."""

    chosen: float
    top: list[tuple[int, float]]
    """The most probable tokens, best first."""


class StepResult(_FromWorker, frozen=True, kw_only=True, tag="result"):
    """The sampled token of each sequence that wanted one, in the plan's order. From rank 0 only."""

    step: int
    tokens: list[int]
    """Pass after pass. -1: this sequence's logits were not finite numbers."""
    logprobs: list[TokenLogprobs | None] = []
    """As `tokens`, with None where they are not wanted; empty if nobody wants them."""


class WorkerTimes(_FromWorker, frozen=True, kw_only=True, tag="times"):
    """Sums over all steps of this rank; sent about once a second while it computes, and at rest."""

    compute_s: float
    comm_s: float


class Unloaded(_FromWorker, frozen=True, kw_only=True, tag="unloaded"):
    """A model's memory was given back."""

    model: str


class WorkerFailed(_FromWorker, frozen=True, kw_only=True, tag="failed"):
    """Something went wrong; `fatal` means the worker cannot go on."""

    code: str
    message: str
    fatal: bool
    model: str = ""
    """That could not be loaded."""


FromWorker = (
    Hello
    | CommReady
    | LoadProgress
    | Loaded
    | Allocated
    | Unloaded
    | StepResult
    | WorkerTimes
    | WorkerFailed
)


# --- wire form ------------------------------------------------------------------------------------

T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_events_decoder: msgspec.msgpack.Decoder[list[Event]] = msgspec.msgpack.Decoder(list[Event])
_to_worker_decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker_decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


class _Envelope(Struct):
    id: Any = None
    v: Any = None


_envelope_decoder = msgspec.msgpack.Decoder(_Envelope)


class BadRequestError(InvalidRequestError):
    """A frame that is not a valid request; `request_id` is its id as far as it could be read."""

    def __init__(self, request_id: str, message: str) -> None:
        super().__init__(message)
        self.request_id = request_id


def encode(message: Struct) -> bytes:
    """Any message of this module as a msgpack map."""
    return _encoder.encode(message)


def decode_request(frame: bytes) -> Request:
    """A client's frame. Raises BadRequestError naming the field and the limit."""
    try:
        request = _request_decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        request_id, version = _envelope(frame)
        if version is not None and version != PROTOCOL_VERSION:
            raise BadRequestError(request_id, _version_message(version)) from None
        raise BadRequestError(request_id, f"bad request: {error}") from None
    if request.v != PROTOCOL_VERSION:
        raise BadRequestError(request.id, _version_message(request.v))
    return request


def encode_events(events: Sequence[Event]) -> bytes:
    """Events for one client as one frame: an array of maps."""
    return _encoder.encode(events)


def decode_events(frame: bytes) -> list[Event]:
    """A coordinator's frame, as a client reads it. Raises TpserveError when it is not understood."""
    try:
        return _events_decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise TpserveError(f"the server sent events that are not understood: {error}") from None


def decode_to_worker(frame: bytes) -> ToWorker:
    """A message to a worker. Raises msgspec.DecodeError."""
    return _to_worker_decoder.decode(frame)


def decode_from_worker(frame: bytes) -> FromWorker:
    """A message from a worker. Raises msgspec.DecodeError."""
    return _from_worker_decoder.decode(frame)


def _envelope(frame: bytes) -> tuple[str, Any]:
    """The id and version of a frame that is not a valid request, as far as they can be read."""
    try:
        envelope = _envelope_decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return "", None
    request_id = envelope.id if isinstance(envelope.id, str) else ""
    return request_id[:64], envelope.v


def _version_message(version: object) -> str:
    return f"protocol version {version!r} is not supported; this server speaks {PROTOCOL_VERSION}"
