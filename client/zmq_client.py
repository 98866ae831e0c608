"""The client library: `Client` for programs that wait, `AsyncClient` for event loops.

    with Client() as client:
        for piece in client.story("Once upon a time", max_tokens=50):
            print(piece, end="", flush=True)

Both connect when they are first used, and again after a server has gone away. A client belongs to
one thread (or one event loop); any number of its streams may be open at once. A `request_id` that is
given names the request in the server's logs; it must differ from those that are under way.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar, Unpack

from client.connection import AsyncConnection, Connection
from client.defaults import DEFAULT_ADDRESS, DEFAULT_SILENCE_S, DEFAULT_TIMEOUT_S
from client.errors import JobCancelledError, RemoteError, expect
from client.jobs import AsyncJobs, Jobs
from client.requests import (
    LoadOptions,
    SamplingOptions,
    chat_request,
    embed_request,
    load_request,
    new_id,
    story_request,
    tokenize_request,
)
from client.sessions import AsyncSessions, Sessions
from client.streams import AsyncStream, Stream
from shared.embedding_messages import Embeddings
from shared.errors import ConnectionLostError
from shared.messages import (
    Detokenize,
    GetHealth,
    GetStatus,
    Health,
    ListModels,
    Loading,
    Message,
    ModelGone,
    ModelInfo,
    ModelReady,
    Models,
    Progress,
    Status,
    Text,
    Tokens,
    Unload,
)
from shared.protocol import Event, JobRequest, Request

__all__ = ["AsyncClient", "AsyncStream", "Client", "JobCancelledError", "RemoteError", "Stream"]

E = TypeVar("E", bound=Event)
C = TypeVar("C", Connection, AsyncConnection)
S = TypeVar("S", bound=Stream | AsyncStream)


class _BaseClient(ABC, Generic[C, S]):
    """Where the server is, the connection to it while there is one, and what only sends."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        silence_s: float = DEFAULT_SILENCE_S,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._silence_s = silence_s
        self._current: C | None = None
        self._closed = False

    def story(
        self,
        prompt: str,
        *,
        model: str | None = None,
        stream: bool = True,
        priority: int = 0,
        request_id: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> S:
        """Continue `prompt`. Without `stream` the text comes in one piece, at the end."""
        request = story_request(
            prompt, options, request_id, model=model, stream=stream, priority=priority
        )
        return self.start(request)

    def chat(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        *,
        model: str | None = None,
        stream: bool = True,
        priority: int = 0,
        continue_last: bool = False,
        request_id: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> S:
        """Answer a conversation. Without `stream` the text comes in one piece, at the end.

        continue_last: the last message is the assistant's, and the answer goes on from it.
        """
        request = chat_request(
            messages,
            options,
            request_id,
            continue_last,
            model=model,
            stream=stream,
            priority=priority,
        )
        return self.start(request)

    @abstractmethod
    def start(self, request: JobRequest) -> S:
        """Send what is answered by a job's events, made by hand."""

    @abstractmethod
    def _connect(self) -> C: ...

    def _connection(self) -> C:
        if self._closed:
            raise ConnectionLostError("this client was closed")
        if self._current is None or not self._current.usable:
            self._current = self._connect()
        return self._current


class Client(_BaseClient[Connection, Stream]):
    """Talks to the server at `address` and waits where it has to.

    Every method may raise ConnectionLostError: no server has answered within `timeout_s`, it has
    closed the connection, or it has not even answered questions for its health for `silence_s`.
    """

    @property
    def sessions(self) -> Sessions:
        """Conversations and stories that the server keeps."""
        return Sessions(self.ask, self.start)

    @property
    def jobs(self) -> Jobs:
        """Generation that goes on without this client."""
        return Jobs(self.ask, self.start)

    def load(
        self,
        name: str,
        path: str | Path,
        *,
        on_progress: Callable[[Loading], None] = lambda _: None,
        request_id: str | None = None,
        **options: Unpack[LoadOptions],
    ) -> ModelInfo:
        """Load the model in folder `path` and serve it as `name`, beside those that are served.

        Raises what refuses it (RemoteError); then nothing of it is left on the workers.
        """
        request = load_request(name, path, options, request_id)
        connection = self._connection()
        connection.exchange.open(request)
        try:
            while isinstance(event := connection.next_event(request.id), Loading):
                on_progress(event)
            return expect(event, ModelReady).model
        finally:
            connection.exchange.close(request.id)

    def unload(self, name: str, *, force: bool = False, request_id: str | None = None) -> int:
        """Give a model's memory back; how many bytes that was, over all workers.

        Its jobs are finished first, unless `force` ends them.
        """
        request = Unload(id=request_id or new_id(), name=name, force=force)
        return self.ask(request, ModelGone).freed_bytes

    def tokenize(
        self,
        text: str | Sequence[Message | Mapping[str, str]],
        *,
        model: str | None = None,
        request_id: str | None = None,
    ) -> Tokens:
        """The tokens that a model reads for a prompt or, with its template, for a conversation."""
        return self.ask(tokenize_request(text, model, request_id), Tokens)

    def detokenize(
        self, token_ids: Sequence[int], *, model: str | None = None, request_id: str | None = None
    ) -> str:
        """The text of tokens, special ones included."""
        request = Detokenize(id=request_id or new_id(), model=model, token_ids=list(token_ids))
        return self.ask(request, Text).text

    def embed(
        self,
        texts: str | Sequence[str | Sequence[int]],
        *,
        model: str | None = None,
        priority: int = 0,
        request_id: str | None = None,
    ) -> Embeddings:
        """A vector of length 1 for each text: the mean of the model's last hidden states over it.

        texts: one, or several; each a string, or its token ids, which are taken as they are. The mean
        of a decoder's states, not what a trained embedding model gives. Whatever ends the wait early cancels it.
        """
        request = embed_request(texts, model, priority, request_id)
        connection = self._connection()
        connection.exchange.open(request)
        try:
            while isinstance(event := connection.next_event(request.id), Progress):
                pass
            return expect(event, Embeddings)
        finally:
            connection.exchange.close(request.id)

    def models(self) -> list[ModelInfo]:
        """What is loaded."""
        return self.ask(ListModels(id=new_id()), Models).models

    def status(self) -> Status:
        """Workers, queue, memory, rates."""
        return self.ask(GetStatus(id=new_id()), Status)

    def health(self) -> Health:
        """Whether tokens come through all workers."""
        return self.ask(GetHealth(id=new_id()), Health)

    def close(self) -> None:
        """Cancel what is still running and leave. May be called twice."""
        self._closed = True
        if self._current is not None:
            self._current.close()

    def start(self, request: JobRequest) -> Stream:
        """Send what is answered by a job's events, made by hand."""
        return Stream(self._connection(), request)

    def ask(self, request: Request, answer: type[E]) -> E:
        """Send a request made by hand, and wait for its one answer."""
        connection = self._connection()
        connection.exchange.open(request)
        try:
            return expect(connection.next_event(request.id), answer)
        finally:
            connection.exchange.close(request.id)

    def _connect(self) -> Connection:
        return Connection(self.address, self._timeout_s, self._silence_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncClient(_BaseClient[AsyncConnection, AsyncStream]):
    """`Client` for an event loop: `story` and `chat` are called without await, they do not wait.

    Raises what `Client` raises.
    """

    @property
    def sessions(self) -> AsyncSessions:
        """Conversations and stories that the server keeps."""
        return AsyncSessions(self.ask, self.start)

    @property
    def jobs(self) -> AsyncJobs:
        """Generation that goes on without this client."""
        return AsyncJobs(self.ask, self.start)

    async def load(
        self,
        name: str,
        path: str | Path,
        *,
        on_progress: Callable[[Loading], None] = lambda _: None,
        request_id: str | None = None,
        **options: Unpack[LoadOptions],
    ) -> ModelInfo:
        """Load the model in folder `path` and serve it as `name`, beside those that are served.

        Raises what refuses it (RemoteError); then nothing of it is left on the workers.
        """
        request = load_request(name, path, options, request_id)
        connection = self._connection()
        connection.exchange.open(request)
        try:
            while isinstance(event := await connection.next_event(request.id), Loading):
                on_progress(event)
            return expect(event, ModelReady).model
        finally:
            connection.exchange.close(request.id)

    async def unload(self, name: str, *, force: bool = False, request_id: str | None = None) -> int:
        """Give a model's memory back; how many bytes that was, over all workers.

        Its jobs are finished first, unless `force` ends them.
        """
        request = Unload(id=request_id or new_id(), name=name, force=force)
        return (await self.ask(request, ModelGone)).freed_bytes

    async def tokenize(
        self,
        text: str | Sequence[Message | Mapping[str, str]],
        *,
        model: str | None = None,
        request_id: str | None = None,
    ) -> Tokens:
        """The tokens that a model reads for a prompt or, with its template, for a conversation."""
        return await self.ask(tokenize_request(text, model, request_id), Tokens)

    async def detokenize(
        self, token_ids: Sequence[int], *, model: str | None = None, request_id: str | None = None
    ) -> str:
        """The text of tokens, special ones included."""
        request = Detokenize(id=request_id or new_id(), model=model, token_ids=list(token_ids))
        return (await self.ask(request, Text)).text

    async def embed(
        self,
        texts: str | Sequence[str | Sequence[int]],
        *,
        model: str | None = None,
        priority: int = 0,
        request_id: str | None = None,
    ) -> Embeddings:
        """A vector of length 1 for each text: the mean of the model's last hidden states over it.

        texts: one, or several; each a string, or its token ids, which are taken as they are. The mean
        of a decoder's states, not what a trained embedding model gives. Whatever ends the wait early cancels it.
        """
        request = embed_request(texts, model, priority, request_id)
        connection = self._connection()
        connection.exchange.open(request)
        try:
            while isinstance(event := await connection.next_event(request.id), Progress):
                pass
            return expect(event, Embeddings)
        finally:
            connection.exchange.close(request.id)

    async def models(self) -> list[ModelInfo]:
        """What is loaded."""
        return (await self.ask(ListModels(id=new_id()), Models)).models

    async def status(self) -> Status:
        """Workers, queue, memory, rates."""
        return await self.ask(GetStatus(id=new_id()), Status)

    async def health(self) -> Health:
        """Whether tokens come through all workers."""
        return await self.ask(GetHealth(id=new_id()), Health)

    async def close(self) -> None:
        """Cancel what is still running and leave. May be called twice."""
        self._closed = True
        if self._current is not None:
            await self._current.close()

    def start(self, request: JobRequest) -> AsyncStream:
        """Send what is answered by a job's events, made by hand."""
        return AsyncStream(self._connection(), request)

    async def ask(self, request: Request, answer: type[E]) -> E:
        """Send a request made by hand, and wait for its one answer."""
        connection = self._connection()
        connection.exchange.open(request)
        try:
            return expect(await connection.next_event(request.id), answer)
        finally:
            connection.exchange.close(request.id)

    def _connect(self) -> AsyncConnection:
        return AsyncConnection(self.address, self._timeout_s, self._silence_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
