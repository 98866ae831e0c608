"""One answer while it is generated: its tokens, KV blocks, text, and where it stands."""

import time
from array import array
from dataclasses import dataclass, field

from coordinator.kv_blocks import chain_digest
from coordinator.text import Detokenizer, StopStrings
from shared.messages import BLOCK_TOKENS, Choice, FinishReason, TokenLogprob
from shared.worker_messages import History, Sampling


@dataclass(eq=False)
class Sequence:
    """A prompt and what has been generated after it."""

    job_key: tuple[bytes, str]
    """Of the job that it is an answer of."""
    tokens: list[int]
    """Prompt and all new tokens that are known."""
    prompt_tokens: int
    max_new_tokens: int
    sampling: Sampling
    detokenizer: Detokenizer
    root_digest: bytes
    """What KV depends on besides the tokens: the model and its precision."""
    index: int = 0
    """Which of its job's answers it is."""
    leader: "Sequence | None" = None
    """For all answers of a job but the first: the first one, whose KV blocks it shares."""
    min_new_tokens: int = 0
    end_ids: frozenset[int] = frozenset()
    """Tokens that end it; they have no text."""
    stop_strings: StopStrings | None = None
    pooled: bool = False
    """Not continued: the mean of its hidden states is wanted, which counts as its one new token."""

    text: str = ""
    """What has been given out."""
    text_ends: list[int] | None = None
    """Length of `text` after each new token, where a reader may come back for the rest; else None."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    embedding: bytes = b""
    """[hidden] float32 little-endian of a pooled sequence that has ended."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    finished: bool = False
    """It has ended, well or not, and holds nothing any more."""

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
    admitted: bool = False
    """It has run before, though it may have been preempted since."""
    cached_tokens: int = 0
    """Prompt tokens whose KV was found instead of computed."""
    fresh_in_slot: bool = True
    """No step of it has run in its slot yet."""
    losses: int = 0
    """How often in a row the workers were lost during a step of it, without its being trusted between."""
    trusted_at: int = 0
    """Tokens that it must have before it may share a step with others."""

    first_token_at: float = 0.0
    last_token_at: float = 0.0

    @property
    def new_tokens(self) -> int:
        """Generated tokens that are known."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def pending(self) -> int:
        """Positions to compute before the next token can be sampled; 0 when none may follow."""
        return len(self.tokens) + self.in_flight - self.computed if self.remaining > 0 else 0

    @property
    def remaining(self) -> int:
        """Tokens that may still be asked for."""
        return self.max_new_tokens - self.new_tokens - self.in_flight

    @property
    def trusted(self) -> bool:
        """Whether it may share a step with others."""
        return len(self.tokens) >= self.trusted_at

    def suspect(self) -> None:
        """The workers were lost during a step of it: call it before it is put back.

        It is not trusted until it has more tokens than what was under way would have given it.
        """
        self.losses = 1 if self.trusted else self.losses + 1
        self.trusted_at = len(self.tokens) + self.in_flight + 1

    def forget_computed(self) -> None:
        """It has no slot and no KV any more; all known tokens are to be computed again."""
        del self.blocks[:]
        self.slot, self.computed, self.published = -1, 0, 0

    def digest(self, block: int) -> bytes:
        """Digest of full block number `block` and all before it; its tokens must be known."""
        while len(self.digests) <= block:
            start = len(self.digests) * BLOCK_TOKENS
            parent = self.digests[-1] if self.digests else self.root_digest
            self.digests.append(chain_digest(parent, self.tokens[start : start + BLOCK_TOKENS]))
        return self.digests[block]

    def history(self) -> History:
        """The tokens so far, for the workers' penalties."""
        prompt, output = self.tokens[: self.prompt_tokens], self.tokens[self.prompt_tokens :]
        return History(array("i", prompt).tobytes(), array("i", output).tobytes())

    def append(self, token: int) -> str:
        """Take a sampled token; returns the text that it completes and may be given out.

        Sets `finish_reason` when the sequence ends with it.
        """
        self.in_flight -= 1
        self.tokens.append(token)
        self.last_token_at = time.monotonic()
        self.first_token_at = self.first_token_at or self.last_token_at
        new_tokens = len(self.tokens) - self.prompt_tokens
        if token in self.end_ids:
            self.finish_reason, self.stop_reason = "stop", token
            text = self.detokenizer.flush()
        else:
            text = self.detokenizer.push(token)
            if new_tokens >= self.max_new_tokens:
                self.finish_reason = "length"
                text += self.detokenizer.flush()
        if self.stop_strings is not None:
            text, found = self.stop_strings.push(text, new_tokens >= self.min_new_tokens)
            if found is not None:
                self.finish_reason, self.stop_reason = "stop", found
            elif self.finish_reason is not None:
                text += self.stop_strings.flush()
        self.text += text
        if self.text_ends is not None:
            self.text_ends.append(len(self.text))
        return text

    def choice(self) -> Choice:
        """The finished answer."""
        assert self.finish_reason is not None, "asked for once it has ended"
        return Choice(
            index=self.index,
            text=self.text,
            token_ids=self.tokens[self.prompt_tokens :],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=self.logprobs,
        )
