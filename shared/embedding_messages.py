"""What clients and the coordinator say to each other about embeddings."""

from struct import unpack
from typing import Annotated

from msgspec import Meta

from shared.messages import BaseEvent, BaseRequest, ModelName, TokenIdNumber

MAX_TEXTS = 2048
"""Of one request."""


class Embed(BaseRequest, frozen=True, kw_only=True, tag="embed"):
    """A vector for each text: the mean of the model's last hidden states, scaled to length 1."""

    model: ModelName | None = None
    """None: the model named story, else the first."""
    texts: Annotated[list[str | list[TokenIdNumber]], Meta(min_length=1, max_length=MAX_TEXTS)]
    """Each a text, or the tokens of one, which are taken as they are; none may be empty."""
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    """As in Generate."""


class Embeddings(BaseEvent, frozen=True, kw_only=True, tag="embeddings"):
    """Answer to `embed`."""

    model: str
    vectors: list[bytes]
    """By text, [hidden] float32 little-endian."""
    token_counts: list[int]
    """By text: how many tokens the mean is over, special ones included."""

    @property
    def floats(self) -> list[list[float]]:
        """The vectors as numbers."""
        return [list(unpack(f"<{len(vector) // 4}f", vector)) for vector in self.vectors]
