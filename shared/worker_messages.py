"""What the coordinator and its workers say to each other, and its msgpack form."""

from typing import Literal

import msgspec
from msgspec import Struct

from shared.messages import KVPrecision, Precision

# --- coordinator -> worker ------------------------------------------------------------------------


class CommSetup(Struct, frozen=True, kw_only=True):
    """How the workers of one epoch reach each other."""

    kind: Literal["local", "shm", "zmq", "gloo", "nccl"]
    rank: int
    owned: list[tuple[int, int]]
    """Virtual shards [start, stop) of every rank; its length is the world size."""
    deadline_s: float
    """A peer that stays silent for so long in a collective is an error."""
    addresses: list[str] = []
    """zmq: the address each rank binds. gloo and nccl: one, file:///PATH of a rendezvous file."""


class _ToWorker(Struct, frozen=True, kw_only=True, tag_field="t"): ...


class SetUp(_ToWorker, frozen=True, kw_only=True, tag="setup"):
    """First message to a worker that said hello."""

    epoch: int
    comm: CommSetup
    virtual_shards: int
    threads: int
    core: int | None = None
    """Pin the process to this core and the threads-1 after it."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What computes; cuda: the GPU with the rank's number."""
    deterministic: bool = False
    """Of a GPU: results are to depend on no batch, and on no number of ranks."""


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
    pooled: int = 0
    """Tokens of the whole text if the mean of its hidden states is wanted, which comes with its last
    chunk; such a sequence begins at position 0 and samples nothing. 0: it is not."""
    request: str = ""
    """Of a client, by its id: for the worker's log. Given with the first step of a sequence in its slot."""

    @property
    def mean_is_due(self) -> bool:
        """Whether this is the last chunk of a text whose mean is wanted."""
        return self.pooled != 0 and self.start + len(self.tokens) == self.pooled


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


class CommReady(_FromWorker, frozen=True, kw_only=True, tag="comm_ready"):
    """A barrier with all peers was passed."""

    kernels: str
    """What it computes with: "native " and the instruction set, "torch", or "triton on " or "torch on " and a device."""


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
    means: list[bytes] = []
    """[hidden] float32 little-endian of each text that ended in the step, in the plan's order: the mean
    of what the final norm makes of its tokens."""
    out_of_memory: str = ""
    """Why the plan could not be carried out, and there is nothing else in the message: a GPU had no room.
    What the plan was to write into the KV cache is not there."""


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

_encoder = msgspec.msgpack.Encoder()
_to_worker_decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker_decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encode(message: ToWorker | FromWorker) -> bytes:
    """A message as a msgpack map."""
    return _encoder.encode(message)


def decode_to_worker(frame: bytes) -> ToWorker:
    """A message to a worker. Raises msgspec.DecodeError."""
    return _to_worker_decoder.decode(frame)


def decode_from_worker(frame: bytes) -> FromWorker:
    """A message from a worker. Raises msgspec.DecodeError."""
    return _from_worker_decoder.decode(frame)
