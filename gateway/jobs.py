"""The jobs of one HTTP request: one for a chat, one for each prompt of a completion."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from client.errors import JobCancelledError
from client.zmq_client import AsyncClient, AsyncStream
from gateway.openai_requests import Generation
from shared.errors import TpserveError
from shared.messages import Cancelled, Done
from shared.protocol import Event

JobEvent = tuple[int, Event]
"""A job's number within its request, and what has happened to it."""

_numbers = itertools.count(1)


def start_jobs(client: AsyncClient, wanted: Generation, request_id: str) -> list[AsyncStream]:
    """Send the jobs. Raises TpserveError; then none of them runs."""
    streams: list[AsyncStream] = []
    try:
        prompts: list[str | None] = [*wanted.prompts] or [None]
        for prompt in prompts:
            # Users may use an id twice at once; the coordinator wants a different one each time.
            job_id = f"{request_id}-{next(_numbers):x}"
            if prompt is None:
                stream = client.chat(
                    wanted.messages,
                    model=wanted.model,
                    stream=wanted.stream,
                    priority=wanted.priority,
                    continue_last=wanted.continue_last,
                    request_id=job_id,
                    **wanted.options,
                )
            else:
                stream = client.story(
                    prompt,
                    model=wanted.model,
                    stream=wanted.stream,
                    priority=wanted.priority,
                    request_id=job_id,
                    **wanted.options,
                )
            streams.append(stream)
    except TpserveError:
        for stream in streams:
            stream.close()
        raise
    return streams


async def accepted(streams: Sequence[AsyncStream]) -> AsyncGenerator[JobEvent, None]:
    """The events of streamed jobs, once the coordinator has accepted all of them.

    Raises TpserveError when it refuses one; then the others are cancelled.
    """
    events = all_events(streams)
    first: list[JobEvent] = []
    try:
        heard: set[int] = set()
        while len(heard) < len(streams):
            job, event = await anext(events)
            heard.add(job)
            first.append((job, event))
    except BaseException:
        await events.aclose()
        raise
    return _chain(first, events)


async def _chain(
    first: Sequence[JobEvent], rest: AsyncGenerator[JobEvent, None]
) -> AsyncGenerator[JobEvent, None]:
    async with aclosing(rest):
        for item in first:
            yield item
        async for item in rest:
            yield item


async def results(streams: Sequence[AsyncStream]) -> list[Done]:
    """What the jobs end with. Raises what ends one of them; then the others are cancelled."""
    ends: dict[int, Done] = {}
    async with aclosing(all_events(streams)) as events:
        async for job, event in events:
            if isinstance(event, Done):
                ends[job] = event
    return [ends[job] for job in range(len(streams))]


async def all_events(streams: Sequence[AsyncStream]) -> AsyncGenerator[JobEvent, None]:
    """The events of all jobs as they come. Closing it cancels the jobs that have not ended."""
    if len(streams) == 1:
        async with aclosing(_events(streams[0])) as events:
            async for event in events:
                yield 0, event
        return
    arrived: asyncio.Queue[JobEvent | TpserveError | None] = asyncio.Queue(maxsize=len(streams))
    readers = [asyncio.create_task(_read(i, s, arrived)) for i, s in enumerate(streams)]
    try:
        running = len(streams)
        while running:
            item = await arrived.get()
            if isinstance(item, TpserveError):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        for stream in streams:
            stream.close()


async def _read(
    job: int, stream: AsyncStream, arrived: "asyncio.Queue[JobEvent | TpserveError | None]"
) -> None:
    try:
        async with aclosing(_events(stream)) as events:
            async for event in events:
                await arrived.put((job, event))
    except TpserveError as error:
        await arrived.put(error)
    else:
        await arrived.put(None)


async def _events(stream: AsyncStream) -> AsyncGenerator[Event, None]:
    try:
        async for event in stream.events():
            if isinstance(event, Cancelled):
                raise JobCancelledError(event.text, event.token_ids)
            yield event
    finally:
        stream.close()
