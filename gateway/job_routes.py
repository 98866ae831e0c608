"""The routes of jobs that the server keeps: they go on whether or not their client does."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from client.errors import remote_error
from gateway.body import read_object, read_query
from gateway.context import Gateway, ask, note, once, owned, user
from gateway.errors import error_body, json_response
from gateway.event_stream import DONE, EventStream, data, unless_gone
from gateway.openapi import COORDINATOR, JOB_ERRORS, ErrorDetail, operation, trimmed
from gateway.openapi_types import NEVER_GIVEN, answer_of
from gateway.plain import ENVELOPE, named, plain, request_from
from shared.errors import DatabaseError, JobExistsError, JobNotFoundError, JobsOffError
from shared.job_messages import (
    CancelJob,
    DeleteJob,
    FollowJob,
    GetJob,
    JobGone,
    JobInfo,
    JobName,
    JobState,
    ListJobs,
    StoredJob,
    StoredJobs,
    SubmitJob,
)
from shared.messages import Cancelled, Done, Failed, Partial
from shared.protocol import Event

ERRORS = (*COORDINATOR, DatabaseError, JobsOffError)
ABOUT_ONE = (*ERRORS, JobNotFoundError)
PATH = {"job": JobName}


class JobsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which jobs to list."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 50
    cursor: Annotated[str, Meta(max_length=64)] | None = None
    state: JobState | None = None


class FollowQuery(Struct, frozen=True, forbid_unknown_fields=True, rename={"start": "from"}):
    """Where to go on: after so many tokens of each answer."""

    start: Annotated[int, Meta(ge=0, le=1 << 31)] = 0


SUBMIT = trimmed(SubmitJob, "SubmitJobBody", NEVER_GIVEN, renamed={"job": "id"})
JOB = msgspec.defstruct(
    "JobBody",
    [
        ("result", answer_of(Done, "JobResult") | None, None),
        ("error", ErrorDetail | None, None),
        ("partial", list[Partial] | None, None),
    ],
    bases=(trimmed(JobInfo, "JobInfoBody", (), renamed={"job": "id"}),),
    kw_only=True,
)
"""The last three only of a job that is done, that has failed, that was cancelled."""
PAGE = msgspec.defstruct("JobPage", [("jobs", list[JOB]), ("cursor", str | None)])  # type: ignore[valid-type]


def job_routes(gateway: Gateway) -> APIRouter:
    """Everything under /api/jobs."""
    router = APIRouter(prefix="/api/jobs")
    limits = gateway.settings

    @router.get(
        "",
        **operation("Jobs, the newest first", query=JobsQuery, answer=PAGE, errors=ERRORS),
    )
    async def jobs(request: Request) -> Response:
        wanted = read_query(request, JobsQuery)
        question = ListJobs(
            id=once(request),
            user=user(request),
            state=wanted.state,
            limit=wanted.limit,
            cursor=wanted.cursor,
        )
        page = await ask(gateway, request, question, StoredJobs)
        found = [_info(info) for info in page.jobs]
        return json_response({"jobs": found, "cursor": page.cursor})

    @router.post(
        "",
        **operation(
            "Generate, whether or not this client waits for it",
            body=SUBMIT,
            answer=JOB,
            status=202,
            errors=(*ERRORS, *JOB_ERRORS, JobExistsError),
        ),
    )
    async def submit(request: Request) -> Response:
        body = await read_object(request, limits.max_body_bytes, limits.body_timeout)
        wanted = request_from(SubmitJob, body, renamed={"id": "job"}, **owned(request))
        job = await ask(gateway, request, wanted, StoredJob)
        note(request, job=job.job.job)
        return json_response(_whole(job), 202)

    @router.get(
        "/{job}",
        **operation(
            "A job and, when it has ended, its end", path=PATH, answer=JOB, errors=ABOUT_ONE
        ),
    )
    async def get(request: Request, job: str) -> Response:
        wanted = request_from(GetJob, {}, job=job, **owned(request))
        return json_response(_whole(await ask(gateway, request, wanted, StoredJob)))

    @router.get(
        "/{job}/stream",
        **operation(
            "The answer of a job as it comes",
            path=PATH,
            query=FollowQuery,
            answer=None,
            events_only=True,
            errors=(*ABOUT_ONE, *JOB_ERRORS),
        ),
    )
    async def follow(request: Request, job: str) -> Response:
        start = read_query(request, FollowQuery).start
        wanted = request_from(FollowJob, {}, job=job, from_token=start, **owned(request))
        note(request, job=job)
        events = gateway.client.start(wanted).events()
        first = await unless_gone(request.receive, anext(events))
        return EventStream(
            _followed(first, events),
            ping_s=limits.ping,
            slow_reader_s=limits.slow_reader,
            on_end=gateway.metrics.stream_ended,
        )

    @router.post(
        "/{job}/cancel", **operation("End a job early", path=PATH, answer=JOB, errors=ABOUT_ONE)
    )
    async def cancel(request: Request, job: str) -> Response:
        wanted = request_from(CancelJob, {}, job=job, **owned(request))
        return json_response(_whole(await ask(gateway, request, wanted, StoredJob)))

    @router.delete(
        "/{job}",
        **operation(
            "Forget a job that has ended",
            path=PATH,
            answer=trimmed(JobGone, "DeletedJob", ENVELOPE, renamed={"job": "id"}),
            errors=ABOUT_ONE,
        ),
    )
    async def delete(request: Request, job: str) -> Response:
        wanted = request_from(DeleteJob, {}, job=job, **owned(request))
        gone = await ask(gateway, request, wanted, JobGone)
        return json_response({"id": gone.job})

    return router


async def _followed(first: Event, rest: AsyncIterator[Event]) -> AsyncGenerator[bytes, None]:
    yield data(named(first))
    async for event in rest:
        yield data(named(event))
    yield DONE


def _whole(job: StoredJob) -> dict[str, Any]:
    """A job with what it ended with, if it has ended."""
    content = _info(job.job)
    match job.end:
        case Done():
            content["result"] = plain(job.end)
        case Failed():
            error = remote_error(job.end.code, job.end.message)
            content["error"] = error_body(error)["error"]
        case Cancelled():
            content["partial"] = job.end.partial
    return content


def _info(info: JobInfo) -> dict[str, Any]:
    content = msgspec.structs.asdict(info)
    return {"id": content.pop("job"), **content}
