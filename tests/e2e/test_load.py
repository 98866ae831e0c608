"""Many clients at once: nobody's text changes, nobody starves, nothing leaks."""

import asyncio
import random
from pathlib import Path
from typing import Any

import psutil
import pytest

from client.zmq_client import AsyncClient, Client, JobCancelledError
from tests.e2e.server import Server, wait_until

REQUESTS = 64
# Blocks of the story model take 8 KiB on each of two workers; 64 requests want about 640 of them.
QUARTER_OF_WANTED = str(160 * 8192 / (1 << 20)) + "M"


def test_a_crowd_with_a_quarter_of_the_memory_it_wants(
    story_model: Path, golden: list[dict[str, Any]]
) -> None:
    """Greedy and sampled, arriving at random times, some cancelled."""
    rng = random.Random(7)
    limits = ("--kv-memory", QUARTER_OF_WANTED, "--max-num-seqs", "32")
    with Server("--workers", "2", "--model", f"story={story_model}", *limits) as server:
        address = server.wait_ready()
        with Client(address) as client:
            assert client.status().kv_blocks_total == 160
            sampled = client.story(
                "The", temperature=1, seed=3, max_tokens=120, ignore_eos=True
            ).result()
        plans = [(rng.choice(golden), rng.random() * 4, rng.random()) for _ in range(REQUESTS)]

        async def one(client: AsyncClient, case: dict[str, Any], delay: float, lot: float) -> str:
            await asyncio.sleep(delay)
            if lot < 0.15:  # cancelled early
                stream = client.story(case["prompt"], temperature=0, max_tokens=200)
                async for _ in stream:
                    break
                return "cancelled"
            if lot < 0.4:
                done = await client.story(
                    "The", temperature=1, seed=3, max_tokens=120, ignore_eos=True
                ).result()
                assert done.token_ids == sampled.token_ids
                return "sampled"
            try:
                done = await client.story(case["prompt"], temperature=0, max_tokens=200).result()
            except JobCancelledError:
                pytest.fail("a job was cancelled that nobody cancelled")
            assert done.token_ids == case["new_ids"]
            return "greedy"

        async def everybody() -> list[str]:
            async with AsyncClient(address) as a, AsyncClient(address) as b:
                jobs = [one((a, b)[i % 2], *plan) for i, plan in enumerate(plans)]
                return await asyncio.wait_for(asyncio.gather(*jobs), 180)

        ended = asyncio.run(everybody())
        assert min(ended.count(kind) for kind in ("greedy", "sampled", "cancelled")) >= 3
        with Client(address) as client:
            assert wait_until(lambda: client.status().kv_blocks_used == 0, 5)
            status = client.status()
            assert status.running == 0
            assert not any(status.queued.values())


def footprint(server: Server) -> tuple[float, int]:
    """Memory in MiB and open descriptors of the coordinator and its workers."""
    processes = [psutil.Process(server.process.pid), *server.workers()]
    memory = sum(p.memory_full_info().uss for p in processes) / (1 << 20)
    return memory, sum(p.num_fds() for p in processes)


def test_two_thousand_requests_leave_memory_and_descriptors_as_they_were(
    story_model: Path,
) -> None:
    async def serve(address: str, count: int) -> None:
        """`count` requests from 20 connections one after the other, 32 at a time."""
        limit = asyncio.Semaphore(32)

        async def one(client: AsyncClient, number: int) -> None:
            async with limit:
                prompt = f"One day, a boy named {number}"
                done = await client.story(prompt, seed=number, max_tokens=6).result()
                assert 1 <= len(done.token_ids) <= 6

        for batch in range(20):
            async with AsyncClient(address) as client:
                numbers = range(batch * count // 20, (batch + 1) * count // 20)
                await asyncio.gather(*(one(client, number) for number in numbers))

    # A small KV cache: its memory counts only once it has been written to.
    small = ("--kv-memory", "2M", "--max-num-seqs", "16")
    with Server("--workers", "2", "--model", f"story={story_model}", *small) as server:
        address = server.wait_ready()
        asyncio.run(serve(address, 500))  # caches fill, allocators settle
        memory, descriptors = footprint(server)
        asyncio.run(serve(address, 2000))
        memory_after, descriptors_after = footprint(server)
    assert descriptors_after <= descriptors + 2
    assert memory_after < memory + 8, f"{memory:.0f} MiB before, {memory_after:.0f} MiB after"
