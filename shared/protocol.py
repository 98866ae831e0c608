"""The clients' protocol: all requests and events together, and their msgpack form.

Described for other languages in docs/protocol.md; versioned, strictly validated.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from shared.embedding_messages import Embed, Embeddings
from shared.errors import InvalidRequestError, TpserveError
from shared.job_messages import FollowJob, JobGone, StoredJob, StoredJobRequest, StoredJobs
from shared.messages import (
    PROTOCOL_VERSION,
    Cancel,
    Cancelled,
    Detokenize,
    Done,
    Failed,
    Generate,
    GetHealth,
    GetStatus,
    Health,
    ListModels,
    Load,
    Loading,
    ModelGone,
    ModelReady,
    Models,
    Progress,
    Queued,
    Started,
    Status,
    Text,
    Token,
    Tokenize,
    Tokens,
    Unload,
)
from shared.session_messages import (
    SessionExported,
    SessionGone,
    SessionHits,
    SessionRequest,
    Sessions,
    SessionState,
    TurnRequest,
    TurnStored,
)

JobRequest = Generate | TurnRequest | FollowJob
"""Answered by the events of a job that may be streamed."""
CancellableRequest = JobRequest | Embed

Request = (
    Generate
    | Cancel
    | ListModels
    | GetStatus
    | GetHealth
    | Load
    | Unload
    | Tokenize
    | Detokenize
    | Embed
    | SessionRequest
    | StoredJobRequest
)


Event = (
    Queued
    | Started
    | Token
    | Progress
    | Done
    | Failed
    | Cancelled
    | Models
    | Status
    | Health
    | Loading
    | ModelReady
    | ModelGone
    | Tokens
    | Text
    | Embeddings
    | SessionState
    | Sessions
    | SessionGone
    | SessionHits
    | SessionExported
    | TurnStored
    | StoredJob
    | StoredJobs
    | JobGone
)
TERMINAL_EVENTS = (
    Done,
    Failed,
    Cancelled,
    Embeddings,
    ModelReady,
    ModelGone,
    SessionState,
    Sessions,
    SessionGone,
    SessionHits,
    SessionExported,
    StoredJob,
    StoredJobs,
    JobGone,
)


# --- wire form ------------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_events_decoder: msgspec.msgpack.Decoder[list[Event]] = msgspec.msgpack.Decoder(list[Event])


class _Envelope(Struct):
    id: Any = None
    v: Any = None


_envelope_decoder = msgspec.msgpack.Decoder(_Envelope)


class BadRequestError(InvalidRequestError):
    """A frame that is not a valid request; `request_id` is its id as far as it could be read."""

    def __init__(self, request_id: str, message: str) -> None:
        super().__init__(message)
        self.request_id = request_id


def encode_request(request: Request) -> bytes:
    """A request as a msgpack map, as a client sends it."""
    return _encoder.encode(request)


def decode_request(frame: bytes) -> Request:
    """A client's frame. Raises BadRequestError naming the field and the limit."""
    try:
        request = _request_decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        request_id, version = _envelope(frame)
        if version is not None and version != PROTOCOL_VERSION:
            raise BadRequestError(request_id, _version_message(version)) from None
        raise BadRequestError(request_id, f"bad request: {error}") from None
    if request.v != PROTOCOL_VERSION:
        raise BadRequestError(request.id, _version_message(request.v))
    return request


def encode_events(events: Sequence[Event]) -> bytes:
    """Events for one client as one frame: an array of maps."""
    return _encoder.encode(events)


def decode_events(frame: bytes) -> list[Event]:
    """A coordinator's frame, as a client reads it. Raises TpserveError when it is not understood."""
    try:
        return _events_decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise TpserveError(f"the server sent events that are not understood: {error}") from None


def _envelope(frame: bytes) -> tuple[str, Any]:
    """The id and version of a frame that is not a valid request, as far as they can be read."""
    try:
        envelope = _envelope_decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return "", None
    request_id = envelope.id if isinstance(envelope.id, str) else ""
    return request_id[:64], envelope.v


def _version_message(version: object) -> str:
    return f"protocol version {version!r} is not supported; this server speaks {PROTOCOL_VERSION}"
