"""What a program relies on that uses the client in an event loop."""

import asyncio
import gc
import socket
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import pytest
from msgspec import Struct

from client.zmq_client import AsyncClient, AsyncStream, JobCancelledError
from shared.errors import ConnectionLostError, QueueFullError
from shared.messages import Cancel, Cancelled, Done, Generate, Message, Queued, Started, Token
from tests.client.conftest import MakePeer
from tests.client.peer import DEADLINE_S, MODEL, Peer, endless, refusal, tell

T = TypeVar("T")
R = TypeVar("R", bound=Struct)
WORDS = [" and", " so", " it", " went"]


def run(test: Coroutine[Any, Any, T]) -> T:
    """Run in a loop of its own; a hang is a failure."""
    return asyncio.run(asyncio.wait_for(test, DEADLINE_S))


async def received(peer: Peer, kind: type[R], count: int = 1) -> Sequence[R]:
    """`Peer.wait_for` without blocking the loop."""
    return await asyncio.to_thread(peer.wait_for, kind, count)


async def pieces_of(stream: AsyncStream) -> list[str]:
    return [piece async for piece in stream]


def test_a_story_arrives_piece_by_piece(make_peer: MakePeer) -> None:
    async def test() -> None:
        async with AsyncClient(make_peer().address) as client:
            stream = client.story("Once")
            assert await pieces_of(stream) == WORDS
            assert (await stream.result()).text == stream.text == " and so it went"

    run(test())


def test_events_come_in_order_and_end_with_done(make_peer: MakePeer) -> None:
    async def test() -> None:
        async with AsyncClient(make_peer().address) as client:
            stream = client.chat([Message("user", "Hi")])
            events = [event async for event in stream.events()]
            assert [type(event) for event in events] == [Queued, Started, Token, Token, Done]

    run(test())


def test_many_tasks_share_one_client(make_peer: MakePeer) -> None:
    async def test() -> None:
        async with AsyncClient(make_peer().address) as client:
            chats = [client.chat([Message("user", f"number {n}")]) for n in range(20)]
            answers = await asyncio.gather(*(pieces_of(chat) for chat in chats))
            assert ["".join(answer) for answer in answers] == [
                f"user: number {n}" for n in range(20)
            ]

    run(test())


def test_models_status_and_health_are_answered_beside_a_stream(make_peer: MakePeer) -> None:
    async def test() -> None:
        async with (
            AsyncClient(make_peer(endless).address) as client,
            client.story("Once") as stream,
        ):
            pieces = aiter(stream)
            assert await anext(pieces) == " 0"
            assert await client.models() == [MODEL]
            assert (await client.status()).comm == "shm"
            assert (await client.health()).ready
            assert await anext(pieces) == " 1"

    run(test())


def test_breaking_out_of_the_loop_cancels_the_job(make_peer: MakePeer) -> None:
    async def test() -> None:
        peer = make_peer(endless)
        async with AsyncClient(peer.address) as client:
            stream = client.story("Once")
            async for _ in stream:
                break
            assert (await received(peer, Cancel))[0].job == stream.id

    run(test())


def test_cancelling_the_task_that_reads_cancels_the_job(make_peer: MakePeer) -> None:
    async def test() -> None:
        peer = make_peer(endless)
        async with AsyncClient(peer.address) as client:
            task = asyncio.create_task(pieces_of(client.story("Once")))
            await received(peer, Generate)
            task.cancel()
            await received(peer, Cancel)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await client.health()).ready

    run(test())


def test_a_stream_that_nobody_holds_cancels_its_job(make_peer: MakePeer) -> None:
    async def test() -> None:
        peer = make_peer(endless)
        async with AsyncClient(peer.address) as client:
            job = client.story("Once").id
            gc.collect()
            assert (await received(peer, Cancel))[0].job == job

    run(test())


def test_a_stream_collected_in_another_thread_cancels_its_job(make_peer: MakePeer) -> None:
    async def test() -> None:
        peer = make_peer(endless)
        async with AsyncClient(peer.address) as client:
            held = [client.story("Once")]
            job = held[0].id
            await asyncio.to_thread(held.clear)
            assert (await client.health()).ready
            assert (await received(peer, Cancel))[0].job == job

    run(test())


def test_a_cancelled_stream_ends_and_keeps_the_partial_text(make_peer: MakePeer) -> None:
    async def test() -> None:
        async with AsyncClient(make_peer(endless).address) as client:
            stream = client.story("Once")
            async for piece in stream:
                if piece == " 2":
                    stream.cancel()
            assert isinstance(stream.end, Cancelled)
            assert stream.text.startswith(" 0 1 2")
            with pytest.raises(JobCancelledError):
                await stream.result()

    run(test())


def test_closing_the_client_cancels_what_runs_and_wakes_who_waits(make_peer: MakePeer) -> None:
    async def test() -> None:
        peer = make_peer(endless)
        client = AsyncClient(peer.address)
        waiting = asyncio.create_task(client.story("Once", stream=False).result())
        assert (await client.health()).ready
        await client.close()
        with pytest.raises(ConnectionLostError, match="closed"):
            await waiting
        await received(peer, Cancel)
        await client.close()

    run(test())


def test_a_refused_job_raises_the_error_of_its_code(make_peer: MakePeer) -> None:
    async def test() -> None:
        async with AsyncClient(make_peer(refusal("queue_full", "8 wait")).address) as client:
            with pytest.raises(QueueFullError, match="8 wait"):
                await client.story("Once").result()

    run(test())


def test_an_address_without_a_server_says_how_to_start_one() -> None:
    async def test() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
            async with AsyncClient(address, timeout_s=0.3) as client:
                with pytest.raises(ConnectionLostError, match=r"running\? \./launch\.sh"):
                    await client.health()
                with pytest.raises(ConnectionLostError, match=address):
                    await client.story("Once").result()

    run(test())


def test_a_server_that_goes_away_in_mid_stream_is_noticed_by_all(make_peer: MakePeer) -> None:
    async def test() -> None:
        peer = make_peer(endless)
        async with AsyncClient(peer.address) as client:
            streams = [client.story(str(n), stream=n % 2 == 0) for n in range(4)]
            tasks = [asyncio.create_task(stream.result()) for stream in streams]
            await received(peer, Generate, 4)
            await client.health()
            await asyncio.to_thread(peer.close)
            errors = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(error) for error in errors] == [ConnectionLostError] * 4

    run(test())


def test_a_server_that_hangs_in_mid_stream_is_noticed(make_peer: MakePeer) -> None:
    async def test() -> None:
        peer = make_peer(endless)
        async with AsyncClient(peer.address, silence_s=1.0) as client:
            pieces = aiter(client.story("Once"))
            await anext(pieces)
            peer.mute()
            with pytest.raises(ConnectionLostError, match="silent for 1 s"):
                [piece async for piece in pieces]

    run(test())


def test_a_slow_job_is_not_an_error_as_long_as_the_server_answers(make_peer: MakePeer) -> None:
    async def test() -> None:
        peer = make_peer(lambda request: tell(request, " word" * 700))
        async with AsyncClient(peer.address, silence_s=2.0) as client:
            assert (await client.story("Once", stream=False).result()).text == " word" * 700

    run(test())


def test_a_client_works_again_after_a_restart_of_the_server(make_peer: MakePeer) -> None:
    async def test() -> None:
        peer = make_peer()
        async with AsyncClient(peer.address) as client:
            assert (await client.health()).ready
            peer.close()
            make_peer(address=peer.address)
            assert await pieces_of(client.story("Once")) == WORDS

    run(test())
