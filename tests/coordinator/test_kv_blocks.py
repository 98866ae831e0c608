"""Blocks are never lost, never given out twice, and found by what they hold."""

import hypothesis.strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from coordinator.kv_blocks import BlockPool, chain_digest

BLOCKS = 6


class PoolMachine(RuleBasedStateMachine):
    """Any order of taking, publishing, sharing and releasing keeps the books right."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.users: dict[int, int] = {}

    @rule(target=held)
    def take(self) -> int:
        if not self.pool.available:
            return -1
        block = self.pool.take()
        assert self.users.get(block, 0) == 0
        self.users[block] = 1
        return block

    @rule(block=held, content=st.integers(0, 4))
    def publish(self, block: int, content: int) -> None:
        if block >= 0 and self.users.get(block):
            self.pool.publish(block, chain_digest(b"", [content]))

    @rule(target=held, content=st.integers(0, 4))
    def share(self, content: int) -> int:
        block = self.pool.find(chain_digest(b"", [content]))
        if block is None:
            return -1
        assert self.pool.is_idle(block) == (self.users.get(block, 0) == 0)
        self.pool.share(block)
        self.users[block] = self.users.get(block, 0) + 1
        return block

    @rule(block=consumes(held))
    def release(self, block: int) -> None:
        if block >= 0:
            self.pool.release([block])
            self.users[block] -= 1

    @invariant()
    def books_balance(self) -> None:
        assert self.pool.used == sum(1 for n in self.users.values() if n)
        assert self.pool.available + self.pool.used == BLOCKS


TestPool = PoolMachine.TestCase


def test_a_block_that_nobody_uses_is_still_found_until_its_memory_is_wanted() -> None:
    pool = BlockPool(2)
    first, second = pool.take(), pool.take()
    pool.publish(first, b"one")
    pool.publish(second, b"two")
    pool.release([first])
    pool.release([second])
    assert pool.find(b"one") == first
    pool.share(second)
    assert pool.take() == first, "the least recently used goes first"
    assert pool.find(b"one") is None
    assert pool.find(b"two") == second


def test_the_end_of_a_sequence_is_forgotten_before_its_beginning() -> None:
    pool = BlockPool(2)
    blocks = [pool.take(), pool.take()]
    pool.publish(blocks[0], b"begin")
    pool.publish(blocks[1], b"end")
    pool.release(blocks)
    pool.take()
    assert pool.find(b"begin") is not None
    assert pool.find(b"end") is None


def test_a_digest_stands_for_everything_before_it() -> None:
    a, b = chain_digest(b"", [1, 2]), chain_digest(b"", [1, 3])
    assert chain_digest(a, [4]) != chain_digest(b, [4])
    assert chain_digest(a, [4]) == chain_digest(chain_digest(b"", [1, 2]), [4])
