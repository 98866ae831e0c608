"""One request's life: its tokens, KV blocks, state and times."""

import time
from array import array
from dataclasses import dataclass, field

from coordinator.kv_blocks import BLOCK_TOKENS, chain_digest
from coordinator.text import Detokenizer
from shared.messages import Done, FinishReason, Kind, Sampling, Timings, Usage


@dataclass(eq=False)
class Sequence:
    """A prompt and what has been generated after it."""

    client: bytes
    """Routing id of the client's connection."""
    request_id: str
    kind: Kind
    model: str
    stream: bool
    tokens: list[int]
    """Prompt and all new tokens that are known."""
    prompt_tokens: int
    max_new_tokens: int
    eos_ids: frozenset[int]
    sampling: Sampling
    detokenizer: Detokenizer

    text: str = ""
    finished: bool = False
    slot: int = -1
    computed: int = 0
    """Positions whose KV is in the cache once the plans that were sent have run."""
    in_flight: int = 0
    """Sampled tokens that the workers have or will have, and that are not known here yet."""
    blocks: "array[int]" = field(default_factory=lambda: array("i"))
    digests: list[bytes] = field(default_factory=list)
    """Of the full blocks whose tokens are known, as far as they were wanted."""
    published: int = 0
    """How many of its blocks can be found by others."""
    cached_tokens: int = 0
    """Prompt tokens whose KV was found instead of computed."""

    queued_at: float = field(default_factory=time.monotonic)
    started_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    @property
    def key(self) -> tuple[bytes, str]:
        """What names a request: its connection and the id that the client chose."""
        return self.client, self.request_id

    @property
    def new_tokens(self) -> int:
        """Generated tokens that are known."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def pending(self) -> int:
        """Positions to compute before the next token can be sampled; 0 when none may follow."""
        if self.new_tokens + self.in_flight >= self.max_new_tokens:
            return 0
        return len(self.tokens) + self.in_flight - self.computed

    def digest(self, block: int) -> bytes:
        """Digest of full block number `block` and all before it; its tokens must be known."""
        while len(self.digests) <= block:
            start = len(self.digests) * BLOCK_TOKENS
            parent = self.digests[-1] if self.digests else b""
            self.digests.append(chain_digest(parent, self.tokens[start : start + BLOCK_TOKENS]))
        return self.digests[block]

    def append(self, token: int) -> FinishReason | None:
        """Take a sampled token; why the sequence ends with it, or None."""
        self.in_flight -= 1
        self.tokens.append(token)
        self.last_token_at = time.monotonic()
        self.first_token_at = self.first_token_at or self.last_token_at
        if token in self.eos_ids:
            return "stop"
        return "length" if self.new_tokens >= self.max_new_tokens else None

    def done(self, reason: FinishReason) -> Done:
        """The event that ends a job well."""
        return Done(
            id=self.request_id,
            text=self.text,
            token_ids=self.tokens[self.prompt_tokens :],
            finish_reason=reason,
            model=self.model,
            usage=self.usage(),
            timings=self.timings(),
        )

    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.new_tokens,
            total_tokens=len(self.tokens),
            cached_tokens=self.cached_tokens,
        )

    def timings(self) -> Timings:
        """Where the time went."""
        prefill = max(self.first_token_at - self.started_at, 1e-9)
        decode = self.last_token_at - self.first_token_at
        return Timings(
            queue_s=self.started_at - self.queued_at,
            prefill_s=prefill,
            decode_s=decode,
            prefill_tokens_per_s=(self.prompt_tokens - self.cached_tokens) / prefill,
            decode_tokens_per_s=(self.new_tokens - 1) / decode if decode > 0 else 0.0,
        )
