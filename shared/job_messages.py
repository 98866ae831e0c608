"""What clients and the coordinator say to each other about jobs that the server keeps."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from shared.messages import (
    BaseEvent,
    Cancelled,
    Done,
    Failed,
    Kind,
    ModelName,
    OwnedRequest,
    PromptRequest,
    UserName,
)

# --- client -> coordinator ------------------------------------------------------------------------

JobName = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[\w.:@-]+$")]
"""Chosen by the client or, if it has not, by the server; unique among its user's jobs."""
JobState = Literal["queued", "running", "done", "failed", "cancelled"]
MAX_KEEP_S = 10 * 365 * 86_400


class SubmitJob(PromptRequest, frozen=True, kw_only=True, tag="submit"):
    """Generate whether or not this client, or this server process, lives to see the end.

    Answered once it is stored. The same `job` again, asking for the same, is the job that is there.
    """

    user: UserName = "local"
    job: JobName | None = None
    """None: the server makes one up."""
    keep_s: Annotated[int, Meta(ge=0, le=MAX_KEEP_S)] | None = None
    """How long to keep it after its end; None: as the server's setting says."""


class _AboutJob(OwnedRequest, frozen=True, kw_only=True):
    job: JobName


class GetJob(_AboutJob, frozen=True, kw_only=True, tag="job"):
    """Its state and, when it has ended, its result."""


class FollowJob(_AboutJob, frozen=True, kw_only=True, tag="follow"):
    """Its events as a stream, as `generate` gives them. To stop following ends nothing."""

    from_token: Annotated[int, Meta(ge=0, le=1 << 31)] = 0
    """So many tokens of each answer are known already."""


class ListJobs(OwnedRequest, frozen=True, kw_only=True, tag="jobs"):
    """The jobs, the newest first."""

    state: JobState | None = None
    """None: all."""
    limit: Annotated[int, Meta(ge=1, le=1000)] = 50
    cursor: Annotated[str, Meta(max_length=64)] | None = None
    """That the page before this one came with."""


class CancelJob(_AboutJob, frozen=True, kw_only=True, tag="cancel_job"):
    """End it early; what was generated until then is kept. One that has ended stays as it is."""


class DeleteJob(_AboutJob, frozen=True, kw_only=True, tag="delete_job"):
    """Forget one that has ended."""


StoredJobRequest = SubmitJob | GetJob | FollowJob | ListJobs | CancelJob | DeleteJob


# --- coordinator -> client ------------------------------------------------------------------------


class JobInfo(Struct, frozen=True, kw_only=True):
    """A job that the server keeps, without its prompt and result. Times: seconds since 1970."""

    job: str
    state: JobState
    kind: Kind
    model: ModelName
    priority: int
    created: float
    started: float | None
    """When it was begun last."""
    ended: float | None
    expires: float | None
    """When it will be forgotten."""
    attempts: int
    """How often it was begun: more than once when the server or a worker ended meanwhile."""


class StoredJob(BaseEvent, frozen=True, kw_only=True, tag="job"):
    """Answer to `submit`, `job` and `cancel_job`."""

    job: JobInfo
    end: Done | Failed | Cancelled | None = None
    """Its last event; None: it has not ended."""


class StoredJobs(BaseEvent, frozen=True, kw_only=True, tag="jobs"):
    """Answer to `jobs`."""

    jobs: list[JobInfo]
    cursor: str | None
    """For the next page; None: this was the last one."""


class JobGone(BaseEvent, frozen=True, kw_only=True, tag="job_gone"):
    """Answer to `delete_job`."""

    job: str
