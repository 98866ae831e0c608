"""One accepted request: whom it answers, and its sequences, one for each answer asked for."""

import time
from dataclasses import dataclass, field
from typing import Literal

from coordinator.sequence import Sequence
from shared.embedding_messages import Embed, Embeddings
from shared.messages import Cancelled, Done, Generate, Partial, Timings, Usage

JobKind = Literal["story", "chat", "embedding"]


@dataclass(eq=False)
class Job:
    """A request on its way to exactly one last event."""

    client: bytes
    """Routing id of the client's connection."""
    request: Generate | Embed
    model: str
    sequences: list[Sequence]
    """Answers have the same prompt: the first one reads it, the others share its KV blocks. Of an
    embedding each is a text of its own."""

    queued_at: float = field(default_factory=time.monotonic)
    started_at: float = 0.0

    @property
    def id(self) -> str:
        """The id that the client chose."""
        return self.request.id

    @property
    def key(self) -> tuple[bytes, str]:
        """What names a job: its client's connection and its id."""
        return self.client, self.request.id

    @property
    def kind(self) -> JobKind:
        """What it waits in line with."""
        return "embedding" if isinstance(self.request, Embed) else self.request.kind

    @property
    def streams(self) -> bool:
        """Whether its client wants to hear of it before it ends."""
        return isinstance(self.request, Generate) and self.request.stream

    @property
    def echoes(self) -> bool:
        """Whether the text begins with the prompt."""
        return isinstance(self.request, Generate) and self.request.params.echo

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt, or of all texts."""
        if isinstance(self.request, Embed):
            return sum(sequence.prompt_tokens for sequence in self.sequences)
        return self.sequences[0].prompt_tokens

    @property
    def finished(self) -> bool:
        """Whether every answer has ended."""
        return all(sequence.finished for sequence in self.sequences)

    def quiet(self, since: float) -> bool:
        """Whether a started job has sent its client nothing since then."""
        return not self.streams or all(
            sequence.last_token_at < since for sequence in self.sequences
        )

    def done(self) -> Done:
        """The event that ends a job of answers well."""
        return Done(
            id=self.id,
            choices=[sequence.choice() for sequence in self.sequences],
            model=self.model,
            usage=self._usage(),
            timings=self._timings(),
        )

    def embeddings(self) -> Embeddings:
        """The event that ends a job of texts well."""
        return Embeddings(
            id=self.id,
            model=self.model,
            vectors=[sequence.embedding for sequence in self.sequences],
            token_counts=[sequence.prompt_tokens for sequence in self.sequences],
        )

    def cancelled(self) -> Cancelled:
        """The event that ends a job which was cancelled."""
        if isinstance(self.request, Embed) or not self.started_at:
            return Cancelled(id=self.id)
        partial = [Partial(s.text, s.tokens[s.prompt_tokens :]) for s in self.sequences]
        return Cancelled(id=self.id, partial=partial)

    def _usage(self) -> Usage:
        new = sum(sequence.new_tokens for sequence in self.sequences)
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=new,
            total_tokens=self.prompt_tokens + new,
            cached_tokens=self.sequences[0].cached_tokens,
        )

    def _timings(self) -> Timings:
        first = min(sequence.first_token_at for sequence in self.sequences)
        last = max(sequence.last_token_at for sequence in self.sequences)
        prefill, decode = max(first - self.started_at, 1e-9), last - first
        computed = self.prompt_tokens - self.sequences[0].cached_tokens
        decoded = sum(sequence.new_tokens for sequence in self.sequences) - 1
        gaps = [
            (s.last_token_at - s.first_token_at) / (s.new_tokens - 1)
            for s in self.sequences
            if s.new_tokens > 1
        ]
        return Timings(
            queue_s=self.started_at - self.queued_at,
            ttft_s=first - self.queued_at,
            time_per_token_s=sum(gaps) / len(gaps) if gaps else 0.0,
            prefill_s=prefill,
            decode_s=decode,
            prefill_tokens_per_s=computed / prefill,
            decode_tokens_per_s=decoded / decode if decode > 0 else 0.0,
        )
