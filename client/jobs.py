"""Jobs that the server keeps: the part of both clients that is about them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Unpack

from client.requests import SamplingOptions, as_messages, new_id
from client.sessions import Ask, AsyncAsk
from client.streams import AsyncStream, Stream
from shared.job_messages import (
    CancelJob,
    DeleteJob,
    FollowJob,
    GetJob,
    JobGone,
    JobInfo,
    JobState,
    ListJobs,
    StoredJob,
    StoredJobs,
    SubmitJob,
)
from shared.messages import Message, SamplingParams
from shared.protocol import JobRequest

Prompt = str | Sequence[Message | Mapping[str, str]]
"""A story's beginning, or a conversation."""


class Jobs:
    """`Client.jobs`: generation that goes on without this client, even over the server's restart.

    Every method may raise what `Client` raises, JobNotFoundError, DatabaseError, and JobsOffError
    when the server keeps none.
    """

    def __init__(self, ask: Ask, start: Callable[[JobRequest], Stream]) -> None:
        self._ask, self._start = ask, start

    def submit(
        self,
        prompt: Prompt,
        *,
        job: str | None = None,
        model: str | None = None,
        priority: int = 0,
        keep_s: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> JobInfo:
        """Have a story continued or a conversation answered; returns once the job is stored.

        With an id of your own, `job`, this may be repeated: the job runs once. Raises JobExistsError
        if another one has that id.
        """
        request = _submit(prompt, options, job, model, priority, keep_s)
        return self._ask(request, StoredJob).job

    def get(self, job: str) -> StoredJob:
        """Its state and, once it has ended, its last event."""
        return self._ask(GetJob(id=new_id(), job=job), StoredJob)

    def follow(self, job: str, from_token: int = 0) -> Stream:
        """Its answer as it comes, less the first `from_token` tokens. Closing it ends nothing."""
        return self._start(FollowJob(id=new_id(), job=job, from_token=from_token))

    def page(
        self, limit: int = 50, cursor: str | None = None, *, state: JobState | None = None
    ) -> StoredJobs:
        """The newest, or those after the page that came with `cursor`."""
        request = ListJobs(id=new_id(), limit=limit, cursor=cursor, state=state)
        return self._ask(request, StoredJobs)

    def cancel(self, job: str) -> StoredJob:
        """End it early; it keeps what there is of its answer."""
        return self._ask(CancelJob(id=new_id(), job=job), StoredJob)

    def delete(self, job: str) -> None:
        """Forget one that has ended."""
        self._ask(DeleteJob(id=new_id(), job=job), JobGone)


class AsyncJobs:
    """`Jobs` for an event loop; `follow` is called without await, it does not wait.

    Raises what `Jobs` raises.
    """

    def __init__(self, ask: AsyncAsk, start: Callable[[JobRequest], AsyncStream]) -> None:
        self._ask, self._start = ask, start

    async def submit(
        self,
        prompt: Prompt,
        *,
        job: str | None = None,
        model: str | None = None,
        priority: int = 0,
        keep_s: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> JobInfo:
        """Have a story continued or a conversation answered; returns once the job is stored.

        With an id of your own, `job`, this may be repeated: the job runs once. Raises JobExistsError
        if another one has that id.
        """
        request = _submit(prompt, options, job, model, priority, keep_s)
        return (await self._ask(request, StoredJob)).job

    async def get(self, job: str) -> StoredJob:
        """Its state and, once it has ended, its last event."""
        return await self._ask(GetJob(id=new_id(), job=job), StoredJob)

    def follow(self, job: str, from_token: int = 0) -> AsyncStream:
        """Its answer as it comes, less the first `from_token` tokens. Closing it ends nothing."""
        return self._start(FollowJob(id=new_id(), job=job, from_token=from_token))

    async def page(
        self, limit: int = 50, cursor: str | None = None, *, state: JobState | None = None
    ) -> StoredJobs:
        """The newest, or those after the page that came with `cursor`."""
        request = ListJobs(id=new_id(), limit=limit, cursor=cursor, state=state)
        return await self._ask(request, StoredJobs)

    async def cancel(self, job: str) -> StoredJob:
        """End it early; it keeps what there is of its answer."""
        return await self._ask(CancelJob(id=new_id(), job=job), StoredJob)

    async def delete(self, job: str) -> None:
        """Forget one that has ended."""
        await self._ask(DeleteJob(id=new_id(), job=job), JobGone)


def _submit(
    prompt: Prompt,
    options: SamplingOptions,
    job: str | None,
    model: str | None,
    priority: int,
    keep_s: int | None,
) -> SubmitJob:
    is_story = isinstance(prompt, str)
    return SubmitJob(
        id=new_id(),
        job=job,
        kind="story" if is_story else "chat",
        prompt=prompt if isinstance(prompt, str) else None,
        messages=None if isinstance(prompt, str) else as_messages(prompt),
        model=model,
        params=SamplingParams(**options),
        priority=priority,
        keep_s=keep_s,
    )
