"""Which KV block belongs to whom: reference counts, and finding blocks by what they hold.

A full block is found by a digest of all token ids up to its end, so equal prefixes share blocks
across requests. A block that nobody uses keeps its content until the memory is wanted; the least
recently used goes first.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def chain_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of a block's tokens and of everything before them."""
    return blake2b(parent + array("i", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """The KV blocks of one model."""

    def __init__(self, blocks: int) -> None:
        self.total = blocks
        self._users = [0] * blocks
        self._digest_of: list[bytes | None] = [None] * blocks
        self._block_of: dict[bytes, int] = {}
        self._blank = deque(range(blocks))  # nobody's, and holding nothing worth finding
        self._idle: dict[int, None] = {}  # nobody's, but findable; oldest first

    @property
    def available(self) -> int:
        """Blocks that can be taken now."""
        return len(self._blank) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that some sequence holds."""
        return self.total - self.available

    def take(self) -> int:
        """A block for one user. Only call it when one is available."""
        if self._blank:
            block = self._blank.popleft()
        else:
            block = next(iter(self._idle))
            del self._idle[block]
            digest = self._digest_of[block]
            assert digest is not None, "idle blocks are findable"
            del self._block_of[digest]
            self._digest_of[block] = None
        self._users[block] = 1
        return block

    def find(self, digest: bytes) -> int | None:
        """The block with this content, if there is one. It is not taken yet: see `share`."""
        return self._block_of.get(digest)

    def is_shared(self, block: int) -> bool:
        """Whether more than one sequence holds `block`: nobody may write to it."""
        return self._users[block] > 1

    def is_idle(self, block: int) -> bool:
        """Whether nobody holds `block`: sharing it takes one from `available`."""
        return block in self._idle

    def share(self, block: int) -> None:
        """One more user of a findable block."""
        self._idle.pop(block, None)
        self._users[block] += 1

    def publish(self, block: int, digest: bytes) -> None:
        """From now on `block` can be found; the first of two equal blocks stays the one found."""
        if digest not in self._block_of and self._digest_of[block] is None:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def release(self, blocks: Iterable[int]) -> None:
        """One user less of each block. Give them in order: the last ones are forgotten first."""
        for block in reversed(list(blocks)):
            self._users[block] -= 1
            if self._users[block] == 0:
                if self._digest_of[block] is None:
                    self._blank.append(block)
                else:
                    self._idle[block] = None
