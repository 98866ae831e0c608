"""Turns of a session: several answers at once, and turns that wait for each other."""

import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.zmq_client import Client, Stream
from shared.errors import SessionBusyError, SessionNotFoundError
from shared.messages import Cancelled, Done, Progress, SamplingParams, Token
from shared.protocol import encode_request
from shared.session_messages import SendTurn
from tests.e2e.server import Server
from tests.e2e.sessions import greedy, path
from tests.e2e.test_server import raw_socket


def test_several_answers_are_kept_as_siblings(client: Client) -> None:
    session = greedy(client)
    options = {"temperature": 1.0, "seed": 7, "n": 3, "max_tokens": 20}
    stream = client.sessions.send(session, "Hello!", **options)  # type: ignore[arg-type]
    events = list(stream.events())
    assert isinstance(stream.end, Done)
    texts = [choice.text for choice in stream.end.choices]
    for index, text in enumerate(texts):
        pieces = [e.text for e in events if isinstance(e, Token) and e.index == index]
        assert "".join(pieces) == text
    hello = [{"role": "user", "content": "Hello!"}]
    plain = client.chat(hello, **options).result()  # type: ignore[arg-type]
    assert [choice.text for choice in plain.choices] == texts
    assert stream.stored is not None
    answer = client.sessions.get(session).messages[-1]
    assert answer.siblings == stream.stored.answers
    for message, choice in zip(answer.siblings, stream.end.choices, strict=True):
        last = client.sessions.branch(session, message).messages[-1]
        assert (last.id, last.content) == (message, choice.text)
        assert (last.finish_reason, last.partial) == (choice.finish_reason, False)
        assert last.completion_tokens == len(choice.token_ids)
    more = client.sessions.regenerate(session, **options).result()  # type: ignore[arg-type]
    assert [choice.text for choice in more.choices] == texts
    assert client.sessions.get(session).messages[-1].position == 4
    assert client.sessions.undo(session).messages[-1].id == answer.siblings[2]


def test_several_answers_that_are_cut_short_are_kept_as_far_as_they_came(client: Client) -> None:
    options = {"temperature": 1.0, "seed": 1, "n": 2, "ignore_eos": True}
    hello = [{"role": "user", "content": "Hello!"}]
    plain = client.chat(hello, max_tokens=100, **options).result()  # type: ignore[arg-type]
    first, second = (choice.text for choice in plain.choices)
    stop = first[20:40]
    assert stop not in second, "only the first answer is to end"

    session = greedy(client)
    stream = client.sessions.send(session, "Hello!", max_tokens=900, stop=[stop], **options)  # type: ignore[arg-type]
    seen = 0
    for event in stream.events():
        if isinstance(event, Token) and event.index == 1 and (seen := seen + 1) == 80:
            stream.cancel()
    assert isinstance(stream.end, Cancelled)
    assert stream.stored is not None
    ended, cut = (
        client.sessions.branch(session, message).messages[-1] for message in stream.stored.answers
    )
    assert (ended.content, ended.finish_reason, ended.partial) == (first[:20], "stop", False)
    assert (cut.content, cut.finish_reason) == (stream.end.partial[1].text, None)
    assert cut.partial


LENGTHY = SamplingParams(temperature=1, seed=1, max_tokens=900, ignore_eos=True, n=16)


@contextmanager
def busy(client: Client, session: int) -> Iterator[Stream]:
    """While an answer is written; cancelled at the end of the block."""
    stream = client.start(SendTurn(id=uuid.uuid4().hex, session=session, text="1", params=LENGTHY))
    events = stream.events()
    next(event for event in events if isinstance(event, Token))
    yield stream
    assert stream.end is None, "it was to outlast the block"
    stream.cancel()
    list(events)
    assert isinstance(stream.end, Cancelled)


def test_turns_that_wait_follow_in_order_of_arrival(client: Client, server: Server) -> None:
    session = greedy(client)
    said: list[str] = []
    with Client(server.address) as ada, Client(server.address) as bob:
        with busy(client, session):
            waiting = []
            for name, speaker in (("ada", ada), ("bob", bob), ("ada again", ada)):
                waiting.append(
                    speaker.sessions.send(session, name, wait=True, stream=name != "bob")
                )
                speaker.health()  # it has been taken
            arriving = [stream.events() for stream in waiting]
            for before, (stream, events) in enumerate(zip(waiting, arriving, strict=True), start=1):
                assert next(events) == Progress(id=stream.id, position=before, new_tokens=0)
            with pytest.raises(SessionBusyError):
                bob.sessions.rollback(session, None)
            with pytest.raises(SessionBusyError):
                bob.sessions.send(session, "now").result()
            assert path(client, session) == ["1"]
        for name, stream in zip(("ada", "bob", "ada again"), waiting, strict=True):
            said += [name, stream.result().text]
    assert path(client, session)[2:] == said


def test_a_turn_that_waits_can_be_cancelled_and_changes_nothing(
    client: Client, server: Server
) -> None:
    session = greedy(client)
    with Client(server.address) as other:
        with busy(client, session):
            cancelled = other.sessions.send(session, "never mind", wait=True)
            kept = other.sessions.send(session, "me too", wait=True)
            cancelled.cancel()
            assert [type(e) for e in cancelled.events() if not isinstance(e, Progress)] == [
                Cancelled
            ]
            assert cancelled.stored is None
        kept.result()
    assert path(client, session)[2:] == ["me too", kept.text]


def test_a_turn_that_waits_goes_with_its_client(client: Client, server: Server) -> None:
    session = greedy(client)
    socket = raw_socket(server.address)
    with Client(server.address) as other:
        with busy(client, session):
            turn = SendTurn(id="t", session=session, text="gone", wait=True)
            socket.send(encode_request(turn))
            assert socket.poll(10_000)
            socket.close()
            kept = other.sessions.send(session, "me too", wait=True)
            events = kept.events()
            assert any(isinstance(event, Progress) and event.position == 1 for event in events)
            again = other.sessions.send(session, "and me", wait=True)
        list(again)
    assert path(client, session)[2::2] == ["me too", "and me"]


def test_only_so_many_turns_wait_in_a_session(client: Client, server: Server) -> None:
    session = greedy(client)
    with Client(server.address) as other:
        with busy(client, session):
            waiting = [other.sessions.send(session, str(n), wait=True) for n in range(16)]
            with pytest.raises(SessionBusyError, match="16 turns wait"):
                other.sessions.send(session, "x", wait=True).result()
            for stream in waiting[1:]:
                stream.cancel()
        waiting[0].result()
    assert path(client, session)[2::2] == ["0"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_turn_that_waits_for_a_session_which_goes_is_told(
    client: Client, server: Server, file: Path
) -> None:
    session = greedy(client)
    with Client(server.address) as other:
        stream = client.start(SendTurn(id="t", session=session, text="1", params=LENGTHY))
        events = stream.events()
        next(event for event in events if isinstance(event, Token))
        waiting = other.sessions.send(session, "me too", wait=True)
        other.health()
        with sqlite3.connect(file) as database:
            database.execute("PRAGMA foreign_keys = ON")
            database.execute("DELETE FROM messages WHERE session_id = ?", (session,))
            database.execute("DELETE FROM sessions WHERE id = ?", (session,))
        database.close()
        stream.cancel()
        with pytest.raises(SessionNotFoundError, match="the answer was not stored"):
            list(events)
        with pytest.raises(SessionNotFoundError, match=f"no session {session}"):
            waiting.result()
