"""What clients and the coordinator say to each other about jobs and models, as frozen structs.

Sessions, stored jobs, embeddings and workers have modules of messages beside this one;
shared/protocol.py has all of a client's together and their form on the wire. Unknown fields are
refused, never ignored; nothing is pickled.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

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
UserName = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[\w.@-]+$")]


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
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
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
    cache_prompt: bool = True
    """False: no part of the prompt is taken from what other requests left in the KV cache, nor left there."""
    n: Annotated[int, Meta(ge=1, le=64)] = 1
    """Answers to the same prompt; with a seed, answer i uses seed + i."""
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    """Report each token's log probability and those of so many most probable ones."""
    echo: bool = False
    """The text begins with the prompt; stories only."""


class BaseRequest(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    tag_field="op",
):
    """Whatever a client asks."""

    id: RequestId
    """Chosen by the client; every event of the answer carries it."""
    v: int = PROTOCOL_VERSION


class OwnedRequest(BaseRequest, frozen=True, kw_only=True):
    """About what the server keeps for one user; what others own is not found."""

    user: UserName = "local"
    """As a gateway knows them. Whoever reaches the coordinator's socket may speak for anyone."""


class PromptRequest(BaseRequest, frozen=True, kw_only=True):
    """To continue `prompt` (a story) or answer `messages` (a chat): exactly one of the two."""

    kind: Kind
    model: ModelName | None = None
    """None: the model named like the kind, else the first."""
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)] | None = None
    params: SamplingParams = SamplingParams()
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


class Generate(PromptRequest, frozen=True, kw_only=True, tag="generate"):
    """Generate now, for this client: when it goes away, the job ends."""

    stream: bool = True


class Cancel(BaseRequest, frozen=True, kw_only=True, tag="cancel"):
    """End the job that this client started with the request id `job`."""

    job: RequestId


class ListModels(BaseRequest, frozen=True, kw_only=True, tag="models"):
    """What is loaded."""


class GetStatus(BaseRequest, frozen=True, kw_only=True, tag="status"):
    """Workers, queue, memory, rates."""


class GetHealth(BaseRequest, frozen=True, kw_only=True, tag="health"):
    """Is a token coming through all workers."""


class Load(BaseRequest, frozen=True, kw_only=True, tag="load"):
    """Load one more model while the others go on. None means: as the server's own settings say."""

    name: ModelName
    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    """A folder on the server's machine."""
    dtype: Literal["auto"] | Precision | None = None
    kv_dtype: Literal["auto"] | KVPrecision | None = None
    max_model_len: Annotated[int, Meta(ge=0, le=1 << 24)] | None = None


class Unload(BaseRequest, frozen=True, kw_only=True, tag="unload"):
    """Give a model's memory back. It takes no new jobs; those it has are finished first."""

    name: ModelName
    force: bool = False
    """End its jobs at once."""


class Tokenize(BaseRequest, frozen=True, kw_only=True, tag="tokenize"):
    """The tokens that the model would read: of a story's prompt, or of a conversation."""

    model: ModelName | None = None
    """None: as in Generate."""
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)] | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")


class Detokenize(BaseRequest, frozen=True, kw_only=True, tag="detokenize"):
    """The text of tokens."""

    model: ModelName | None = None
    """None: the model named story, else the first."""
    token_ids: Annotated[list[TokenIdNumber], Meta(max_length=65536)]


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


class BaseEvent(Struct, frozen=True, kw_only=True, tag_field="event"):
    """Whatever the server answers."""

    id: str
    v: int = PROTOCOL_VERSION


class Queued(BaseEvent, frozen=True, kw_only=True, tag="queued"):
    """The job was accepted; `position` jobs of its kind stand before it."""

    position: int


class Started(BaseEvent, frozen=True, kw_only=True, tag="started"):
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


class Token(BaseEvent, frozen=True, kw_only=True, tag="token", omit_defaults=True):
    """New text of answer `index`; it may be empty while a character is incomplete."""

    text: str
    token_ids: list[int]
    index: int = 0
    logprobs: list[TokenLogprob] = []
    finish_reason: FinishReason | None = None
    """Why the answer ends with these tokens; None: it goes on."""
    stop_reason: str | int | None = None
    """As of `Choice`."""


class Progress(BaseEvent, frozen=True, kw_only=True, tag="progress"):
    """Sent once a second for a job that sends nothing else: it waits, or it does not stream."""

    position: int | None
    """Jobs of its kind, or turns of its session, that stand before it; None once it runs."""
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


class Done(BaseEvent, frozen=True, kw_only=True, tag="done"):
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


class Failed(BaseEvent, frozen=True, kw_only=True, tag="failed"):
    """The request was refused or its job ended by an error."""

    code: str
    message: str
    retry_after_s: float | None = None
    """For queue_full: when to try again."""


class Partial(Struct, frozen=True):
    """What there is of an answer that was cancelled."""

    text: str
    token_ids: list[int]


class Cancelled(BaseEvent, frozen=True, kw_only=True, tag="cancelled"):
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


class Models(BaseEvent, frozen=True, kw_only=True, tag="models"):
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


class Loading(BaseEvent, frozen=True, kw_only=True, tag="loading"):
    """Several times a second while a model is loaded."""

    model: str
    phase: LoadPhase
    ranks: list[RankProgress] = []


class ModelReady(BaseEvent, frozen=True, kw_only=True, tag="model_ready"):
    """Answer to `load`: the model takes jobs; a token came through all workers."""

    model: ModelInfo
    seconds: float


class ModelGone(BaseEvent, frozen=True, kw_only=True, tag="model_gone"):
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
    texts_embedded: int = 0
    jobs_done: int = 0
    restarts: int = 0
    """Of the workers, after one of them was lost."""
    jobs_resumed: int = 0
    """Jobs that went on after a restart of the workers, each time counted."""
    jobs_given_up: int = 0
    """Jobs that were ended because the workers were lost with each try."""
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


class Status(BaseEvent, frozen=True, kw_only=True, tag="status"):
    """Answer to `status`."""

    version: str
    ready: bool
    uptime_s: float
    pid: int
    epoch: int
    """How often the workers were started."""
    comm: str
    kernels: str
    """What the workers compute with: "native " and the instruction set, "torch", or "triton on " or "torch on " and a device; empty: not yet known."""
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


class Health(BaseEvent, frozen=True, kw_only=True, tag="health"):
    """Answer to `health`: `ready` means a token came through all workers since they started."""

    ready: bool
    reason: str = ""


class Tokens(BaseEvent, frozen=True, kw_only=True, tag="tokens"):
    """Answer to `tokenize`."""

    model: str
    token_ids: list[int]
    max_model_len: int
    """Tokens that the model holds, prompt and answer together."""


class Text(BaseEvent, frozen=True, kw_only=True, tag="text"):
    """Answer to `detokenize`. Special tokens are shown."""

    model: str
    text: str
