"""A server for the client's tests: a real ROUTER that speaks the protocol, with scripted answers."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import zmq
from msgspec import Struct

from shared.errors import SessionsOffError
from shared.messages import (
    Cancel,
    Cancelled,
    Choice,
    Done,
    Failed,
    Generate,
    GetHealth,
    GetStatus,
    Health,
    ListModels,
    ModelInfo,
    Models,
    Partial,
    Percentiles,
    Queued,
    Started,
    Status,
    Timings,
    Token,
    Totals,
    Usage,
    WorkerStatus,
)
from shared.protocol import (
    TERMINAL_EVENTS,
    BadRequestError,
    Event,
    Request,
    decode_request,
    encode_events,
)
from shared.session_messages import SessionRequest
from shared.sockets import client_facing

R = TypeVar("R", bound=Struct)
Script = Callable[[Generate], Iterator[Event]]

DEADLINE_S = 20.0
PACE_S = 0.005

MODEL = ModelInfo(
    name="demo",
    path="models/demo",
    model_type="llama",
    dtype="fp32",
    kv_dtype="fp32",
    parameters=1_234_567,
    max_model_len=512,
    vocab_size=4096,
    kv_capacity_tokens=8192,
    has_chat_template=True,
)


def answer(request: Generate) -> Iterator[Event]:
    """A story goes on with ' and so it went'; a chat repeats all that was said."""
    if request.messages is None:
        return tell(request, " and so it went")
    return tell(request, " | ".join(f"{turn.role}: {turn.content}" for turn in request.messages))


def tell(request: Generate, text: str) -> Iterator[Event]:
    """The events of a job that generates `text`, one word a token."""
    pieces = [piece for piece in text.replace(" ", "\0 ").split("\0") if piece]
    yield Queued(id=request.id, position=0)
    yield Started(id=request.id, model=MODEL.name, prompt_tokens=3)
    for token, piece in enumerate(pieces):
        yield Token(id=request.id, text=piece, token_ids=[token])
    yield Done(
        id=request.id,
        choices=[Choice(text=text, token_ids=list(range(len(pieces))), finish_reason="stop")],
        model=MODEL.name,
        usage=Usage(prompt_tokens=3, completion_tokens=len(pieces), total_tokens=3 + len(pieces)),
        timings=Timings(
            queue_s=0.0,
            ttft_s=0.1,
            time_per_token_s=0.05,
            prefill_s=0.1,
            decode_s=0.2,
            prefill_tokens_per_s=30.0,
            decode_tokens_per_s=20.0,
        ),
    )


def endless(request: Generate) -> Iterator[Event]:
    """A job that ends only by being cancelled."""
    yield Queued(id=request.id, position=0)
    yield Started(id=request.id, model=MODEL.name, prompt_tokens=3)
    for number in itertools.count():
        yield Token(id=request.id, text=f" {number}", token_ids=[number])


def refusal(code: str, message: str) -> Script:
    """A script that refuses every job."""

    def refuse(request: Generate) -> Iterator[Event]:
        yield Failed(id=request.id, code=code, message=message)

    return refuse


class Peer:
    """Serves on a free port, from a thread, until it is closed."""

    def __init__(
        self, script: Script = answer, address: str = "tcp://127.0.0.1:*", ready: bool = True
    ) -> None:
        self._script = script
        self._ready = ready
        self._context = zmq.Context()
        self._socket = client_facing(self._context, address)
        endpoint = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        self.address = endpoint.rstrip(b"\0").decode()
        self._jobs: dict[tuple[bytes, str], _Job] = {}
        self._stopping = threading.Event()
        self._muted = threading.Event()
        self.requests: list[Request] = []
        """All that were received, in order."""
        self._thread = threading.Thread(target=self._serve, name="peer", daemon=True)
        self._thread.start()

    def mute(self) -> None:
        """Hang: read nothing and say nothing any more, but stay connected."""
        self._muted.set()

    def close(self) -> None:
        """Go away; to a client it looks the same as the end of the process."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._thread.join()
            self._socket.close(0)
            self._context.term()

    def wait_for(self, kind: type[R], count: int = 1) -> Sequence[R]:
        """The first `count` requests of a kind, once they have been received."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            found = [request for request in self.requests if isinstance(request, kind)]
            if len(found) >= count:
                return found[:count]
            time.sleep(PACE_S)
        raise AssertionError(f"no {count} {kind.__name__} requests came, only {self.requests}")

    def _serve(self) -> None:
        while not self._stopping.is_set():
            if self._muted.is_set():
                self._stopping.wait()
            elif self._socket.poll(int(PACE_S * 1000)):
                client, frame = self._socket.recv_multipart()
                self._receive(client, frame)
            else:
                for key, job in list(self._jobs.items()):
                    self._advance(key, job)

    def _receive(self, client: bytes, frame: bytes) -> None:
        try:
            request = decode_request(frame)
        except BadRequestError as error:
            failed = Failed(id=error.request_id, code=error.code, message=error.message)
            self._send(client, failed)
            return
        self.requests.append(request)
        if isinstance(request, Generate):
            self._jobs[client, request.id] = _Job(request, self._script(request))
        elif isinstance(request, Cancel):
            self._cancel(client, request)
        elif isinstance(request, GetHealth):
            reason = "" if self._ready else "a worker is being replaced"
            self._send(client, Health(id=request.id, ready=self._ready, reason=reason))
        elif isinstance(request, ListModels):
            self._send(client, Models(id=request.id, models=[MODEL]))
        elif isinstance(request, GetStatus):
            self._send(client, status(request.id))
        elif isinstance(request, SessionRequest):
            off = SessionsOffError("this server keeps no sessions")
            self._send(client, Failed(id=request.id, code=off.code, message=off.message))

    def _cancel(self, client: bytes, request: Cancel) -> None:
        job = self._jobs.pop((client, request.job), None)
        if job is None:
            self._send(client, Failed(id=request.id, code="not_found", message="no such job"))
            return
        self._send(client, Cancelled(id=request.id))
        self._send(client, Cancelled(id=request.job, partial=[Partial(job.text, job.token_ids)]))

    def _advance(self, key: tuple[bytes, str], job: "_Job") -> None:
        client, _ = key
        event = next(job.events)
        if isinstance(event, Token):
            job.text += event.text
            job.token_ids += event.token_ids
        final = isinstance(event, TERMINAL_EVENTS)
        if final:
            del self._jobs[key]
        if final or job.request.stream:
            self._send(client, event)

    def _send(self, client: bytes, event: Event) -> None:
        # A client that has gone is not this peer's concern.
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send_multipart((client, encode_events([event])), zmq.NOBLOCK)


@dataclass
class _Job:
    request: Generate
    events: Iterator[Event]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)


def status(request_id: str) -> Status:
    """A server with two workers."""
    return Status(
        id=request_id,
        version="1.2.3",
        ready=True,
        uptime_s=61.0,
        pid=4711,
        epoch=1,
        comm="shm",
        kernels="native avx2",
        workers=[
            WorkerStatus(
                rank=rank,
                pid=4712 + rank,
                virtual_shards=list(range(4 * rank, 4 * rank + 4)),
                memory_bytes=3 << 20,
                compute_s=2.0,
                comm_s=0.5,
            )
            for rank in range(2)
        ],
        models=[MODEL],
        queued={"story": 2, "chat": 0},
        running=1,
        totals=Totals(steps=99, tokens_generated=123),
        queue_time=Percentiles(0.001, 0.002),
        ttft=Percentiles(0.01, 0.02),
        time_per_token=Percentiles(0.003, 0.004),
        kv_blocks_used=5,
        kv_blocks_total=512,
    )
