"""Sessions of a whole server: what was said is kept, whoever asks and whatever ends."""

import asyncio
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from client.zmq_client import AsyncClient, Client, JobCancelledError
from shared.errors import (
    ContextLengthError,
    DatabaseError,
    InvalidRequestError,
    ModelNotFoundError,
    NotReadyError,
    SessionBusyError,
    SessionNotFoundError,
    SessionsOffError,
)
from shared.messages import (
    Cancel,
    Cancelled,
    Done,
    Queued,
    SamplingParams,
    Started,
    Token,
)
from shared.protocol import Event, decode_events, encode_request
from shared.session_messages import (
    CreateSession,
    ListSessions,
    SendTurn,
    Sessions,
    SessionState,
    TurnStored,
)
from tests.e2e.server import Server, wait_until
from tests.e2e.sessions import CHAT, greedy, path, say, start
from tests.e2e.test_server import raw_socket
from tests.postgres import Postgres


def test_what_one_user_keeps_is_not_found_by_others(client: Client) -> None:
    session = greedy(client)
    request = CreateSession(id="mine", kind="chat", user="ada")
    hers = client.ask(request, SessionState).session.id

    assert [s.id for s in client.sessions.page().sessions].count(hers) == 0
    listed = client.ask(ListSessions(id="list", user="ada"), Sessions).sessions
    assert [s.id for s in listed] == [hers]
    with pytest.raises(SessionNotFoundError):
        client.sessions.rename(hers, "mine now")
    with pytest.raises(SessionNotFoundError):
        client.sessions.send(hers, "Hello!").result()
    with pytest.raises(SessionNotFoundError):
        client.start(SendTurn(id="hers", session=session, text="Hello!", user="ada")).result()
    assert path(client, session) == []


def test_a_conversation_is_remembered_and_can_go_another_way(client: Client) -> None:
    session = greedy(client)
    say(client, session, "Hello, my name is Ada.")
    before_colour = client.sessions.get(session).session.leaf
    say(client, session, "My favourite colour is green.")
    both = client.sessions.send(session, "What is my name and my favourite colour?").result()
    assert "Ada" in both.text
    assert "green" in both.text
    with_colour = path(client, session)

    client.sessions.rollback(session, before_colour)
    without = client.sessions.send(session, "What is my name?").result()
    assert "Ada" in without.text

    fresh = greedy(client)
    say(client, fresh, "Hello, my name is Ada.")
    again = client.sessions.send(fresh, "What is my name?").result()
    assert again.token_ids == without.token_ids
    assert path(client, fresh) == path(client, session)
    assert client.sessions.undo(session).session.leaf == before_colour
    state = client.sessions.undo(session)
    assert [message.content for message in state.messages] == with_colour


def test_regenerating_and_branching_give_back_exactly_what_there_was(client: Client) -> None:
    session = greedy(client)
    first = say(client, session, "Tell me something about cats.")
    state = client.sessions.get(session)
    assert client.sessions.regenerate(session).result().token_ids == first
    other = client.sessions.regenerate(session, temperature=5, seed=5).result()
    assert other.token_ids != first
    answers = client.sessions.get(session).messages[-1]
    assert (answers.position, len(answers.siblings)) == (3, 3)
    back = client.sessions.branch(session, answers.siblings[0])
    assert [m.content for m in back.messages] == [m.content for m in state.messages]
    edited = client.sessions.edit(session, state.messages[0].id, "Hello!")
    edited.result()
    assert path(client, session) == ["Hello!", edited.text]
    undone = client.sessions.undo(session)
    assert [m.content for m in undone.messages] == [m.content for m in state.messages]


def test_a_turn_tells_what_was_stored_before_its_last_event(client: Client) -> None:
    session = greedy(client)
    stream = client.sessions.send(session, "Hello!")
    events = list(stream.events())
    kinds = [type(event) for event in events]
    assert kinds[:2] == [Queued, Started]
    assert kinds[-2:] == [TurnStored, Done]
    assert set(kinds[2:-2]) == {Token}
    assert isinstance(stream.end, Done)
    assert stream.stored is not None
    user, answer = client.sessions.get(session).messages
    assert (user.id, answer.id) == (stream.stored.user_message, *stream.stored.answers)
    assert (user.role, user.content) == ("user", "Hello!")
    assert (answer.role, answer.content, answer.model) == ("assistant", stream.text, "chat")
    assert answer.timings == stream.end.timings
    assert answer.completion_tokens == stream.end.usage.completion_tokens
    assert not answer.partial


def test_an_answer_cut_by_its_length_is_written_on_as_if_it_had_not_been(client: Client) -> None:
    whole, cut = greedy(client), greedy(client)
    question = "Hello, my name is Ada."
    expected = client.sessions.send(whole, question).result().text
    client.sessions.send(cut, question, temperature=0, max_tokens=3).result()
    assert client.sessions.get(cut).messages[-1].finish_reason == "length"
    client.sessions.go_on(cut).result()
    assert path(client, cut) == [question, expected]
    with pytest.raises(InvalidRequestError, match="ended by itself"):
        client.sessions.go_on(cut).result()


def test_a_story_goes_on_from_all_its_pieces(client: Client) -> None:
    options = {"temperature": 0.0, "max_tokens": 8}
    session = client.sessions.create("story", **options).session.id  # type: ignore[arg-type]
    one = client.sessions.send(session, "Hello, my").result().text
    two = client.sessions.send(session).result().text
    three = client.sessions.send(session, " And then").result().text
    assert path(client, session) == ["Hello, my", one, two, " And then", three]
    plain = client.story("Hello, my" + one + two + " And then", **options).result()  # type: ignore[arg-type]
    assert plain.text == three


def test_a_storys_text_can_be_written_anew(client: Client) -> None:
    options = {"temperature": 0.0, "max_tokens": 8}
    session = client.sessions.create("story", **options).session.id  # type: ignore[arg-type]
    one = client.sessions.send(session, "Hello, my").result().text
    client.sessions.write(session, f"Hello, my{one[:3]} dog")
    assert path(client, session) == ["Hello, my", f"{one[:3]} dog"]
    two = client.sessions.send(session).result().text
    plain = client.story(f"Hello, my{one[:3]} dog", **options).result()  # type: ignore[arg-type]
    assert two == plain.text
    client.sessions.undo(session)
    assert [m.content for m in client.sessions.undo(session).messages] == ["Hello, my", one]
    with pytest.raises(InvalidRequestError, match="write is for stories"):
        client.sessions.write(greedy(client), "Hello")


def test_what_is_set_of_a_session_counts_from_the_next_turn_on(client: Client) -> None:
    session = greedy(client)
    say(client, session, "Hello!")
    state = client.sessions.configure(session, params=SamplingParams(temperature=0, max_tokens=2))
    assert state.session.params.max_tokens == 2
    assert len(say(client, session, "How are you?")) == 2
    client.sessions.configure(session, model="nobody")
    with pytest.raises(ModelNotFoundError):
        say(client, session, "And now?")
    state = client.sessions.configure(session, model=None, system="You are a pirate.")
    assert (state.session.model, state.session.system) == (None, "You are a pirate.")
    expected = client.chat(
        [
            {"role": "system", "content": "You are a pirate."},
            *({"role": m.role, "content": m.content} for m in state.messages),
            {"role": "user", "content": "And now?"},
        ],
        temperature=0,
        max_tokens=2,
    )
    assert say(client, session, "And now?") == expected.result().token_ids


def test_while_an_answer_is_written_the_session_is_busy(client: Client, server: Server) -> None:
    session = greedy(client)
    with Client(server.address) as other:
        stream = client.sessions.send(
            session, "Hello!", temperature=1, seed=1, max_tokens=900, ignore_eos=True
        )
        events = stream.events()
        next(event for event in events if isinstance(event, Token))
        for refused in (
            lambda: other.sessions.send(session, "me too").result(),
            lambda: other.sessions.rollback(session, None),
            lambda: other.sessions.delete(session),
            lambda: other.sessions.write(session, "me too"),
        ):
            with pytest.raises(SessionBusyError, match=f"session {session}: wait for its end"):
                refused()
        renamed = other.sessions.rename(session, "Meanwhile")
        assert renamed.session.title == "Meanwhile"
        assert [m.content for m in renamed.messages] == ["Hello!"]
        stream.cancel()
        list(events)
        with pytest.raises(JobCancelledError):
            stream.result()
        _, answer = other.sessions.get(session).messages
        assert (answer.content, answer.partial) == (stream.text, True)
        other.sessions.send(session, "me too").result()
        assert len(path(other, session)) == 4


def test_a_client_that_goes_away_leaves_its_partial_answer(client: Client, server: Server) -> None:
    session = greedy(client)
    socket = raw_socket(server.address)
    params = SamplingParams(temperature=1, seed=1, max_tokens=900, ignore_eos=True)
    turn = SendTurn(id="t", session=session, text="Hello!", params=params)
    socket.send(encode_request(turn))
    assert wait_until(lambda: client.status().running == 1, 10)
    assert socket.poll(10_000)
    assert wait_until(lambda: client.status().totals.tokens_generated > 5, 10)
    socket.close()
    assert wait_until(lambda: len(path(client, session)) == 2, 10)
    answer = client.sessions.get(session).messages[-1]
    assert answer.partial
    assert answer.content
    client.sessions.regenerate(session).result()
    assert not client.sessions.get(session).messages[-1].partial


def test_a_turn_that_is_refused_leaves_nothing(client: Client) -> None:
    session = greedy(client)
    say(client, session, "Hello!")
    before = client.sessions.export(session)
    with pytest.raises(ContextLengthError):
        client.sessions.send(session, "many words " * 2000).result()
    after = client.sessions.export(session)
    assert after.messages == before.messages
    assert (after.leaf, after.root) == (before.leaf, before.root)
    with pytest.raises(SessionNotFoundError, match="no session 987654"):
        client.sessions.send(987654, "x").result()


def test_sessions_are_listed_found_renamed_copied_and_deleted(client: Client) -> None:
    session = greedy(client)
    say(client, session, "The word of the day is xylophone.")
    newest = client.sessions.page(limit=1)
    assert [s.id for s in newest.sessions] == [session]
    assert newest.sessions[0].title == "The word of the day is xylophone."
    assert newest.cursor is not None
    assert client.sessions.page(limit=1, cursor=newest.cursor).sessions[0].id != session
    assert session in {hit.session for hit in client.sessions.search("xylophone")}
    assert client.sessions.rename(session, "Music").session.title == "Music"
    exported = client.sessions.export(session)
    copy = client.sessions.import_(exported).session.id
    assert client.sessions.export(copy) == exported
    for number in (session, copy):
        client.sessions.delete(number)
        with pytest.raises(SessionNotFoundError):
            client.sessions.get(number)
    assert client.sessions.search("xylophone") == []


def test_an_event_loop_has_the_same_sessions(server: Server) -> None:
    async def converse() -> tuple[SessionState, str]:
        async with AsyncClient(server.address) as client:
            session = (await client.sessions.create(temperature=0, max_tokens=20)).session.id
            stream = client.sessions.send(session, "Hello!")
            text = "".join([piece async for piece in stream])
            await client.sessions.configure(session, title="In a loop")
            story = (await client.sessions.create("story")).session.id
            written = await client.sessions.write(story, "Once")
            assert [message.content for message in written.messages] == ["Once"]
            return await client.sessions.get(session), text

    state, text = asyncio.run(converse())
    assert [message.content for message in state.messages] == ["Hello!", text]
    assert state.session.title == "In a loop"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_locked_database_refuses_and_generation_goes_on(
    client: Client, server: Server, file: Path
) -> None:
    session = greedy(client)
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with Client(server.address) as waiting:
        stream = waiting.sessions.send(session, "Hello!")
        done = client.chat([{"role": "user", "content": "Hello!"}], temperature=0, max_tokens=20)
        assert done.result().text
        with pytest.raises(DatabaseError, match="locked"):
            stream.result()
    other.execute("ROLLBACK")
    other.close()
    say(client, session, "Hello!")
    assert len(path(client, session)) == 2


@pytest.mark.slow
def test_a_database_server_that_goes_away_is_used_again_when_it_is_back(
    own_postgres: Postgres,
) -> None:
    with start(own_postgres.url) as server, Client(server.address) as client:
        session, other = greedy(client), greedy(client)
        answer = client.sessions.send(session, "Hello, my name is Ada.").result().text
        long = client.sessions.send(other, "Hello!", max_tokens=900, ignore_eos=True).events()
        next(event for event in long if isinstance(event, Token))

        own_postgres.stop()
        for refused in (
            lambda: client.sessions.get(session),
            lambda: client.sessions.create(),
            lambda: client.sessions.send(session, "What is my name?").result(),
        ):
            with pytest.raises(DatabaseError, match="is the database server running"):
                refused()
        done = client.chat([{"role": "user", "content": "Hello!"}], temperature=0, max_tokens=20)
        assert done.result().text
        with pytest.raises(DatabaseError, match="the answer was not stored"):
            list(long)

        own_postgres.start()
        assert path(client, session) == ["Hello, my name is Ada.", answer]
        assert "Ada" in client.sessions.send(session, "What is my name?").result().text
        assert path(client, other) == ["Hello!"]
        client.sessions.regenerate(other).result()
        assert len(path(client, other)) == 2

        own_postgres.stop()
        own_postgres.start()
        assert len(path(client, session)) == 4, "unnoticed, as nothing was asked meanwhile"
        assert server.stop() == 0


def test_everything_is_there_after_a_kill_and_a_restart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tpserve.db'}"
    with start(url) as server, Client(server.address) as client:
        session = greedy(client)
        say(client, session, "Hello, my name is Ada.")
        say(client, session, "My favourite colour is green.")
        client.sessions.regenerate(session, temperature=1, seed=2).result()
        before = client.sessions.get(session)
        exported = client.sessions.export(session)
        server.process.kill()
        server.process.wait(20)
    with start(url) as server, Client(server.address) as client:
        after = client.sessions.get(session)
        assert msgspec.structs.replace(after, id=before.id) == before
        assert client.sessions.export(session) == exported
        first = before.messages[-1].siblings[0]
        client.sessions.branch(session, first)
        both = client.sessions.send(session, "What is my name and my favourite colour?").result()
        assert "Ada" in both.text
        assert "green" in both.text


def kill(server: Server) -> None:
    """The whole server at once, with kill -9."""
    workers = server.workers()
    server.process.kill()
    server.process.wait(20)
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.kill()


def check_against_a_fresh_session(client: Client, session: int) -> None:
    """All answers on the path are greedy, and those that the same words get in a new session."""
    expected = path(client, session)
    fresh = greedy(client)
    for said in expected[::2]:
        say(client, fresh, said)
    assert path(client, fresh) == expected
    client.sessions.delete(fresh)


def test_a_tree_is_walked_the_same_way_over_kills(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tpserve.db'}"
    question = "What is my name and my favourite colour?"
    with start(url) as server, Client(server.address) as client:
        session = greedy(client)
        say(client, session, "Hello, my name is Ada.")
        say(client, session, "My favourite colour is green.")
        both = client.sessions.send(session, question).result()
        assert "Ada" in both.text
        assert "green" in both.text
        check_against_a_fresh_session(client, session)
        with_colour = client.sessions.get(session).messages
        kill(server)
    with start(url) as server, Client(server.address) as client:
        assert client.sessions.get(session).messages == with_colour
        client.sessions.rollback(session, with_colour[1].id)
        without = client.sessions.send(session, question).result()
        assert "green" not in without.text
        knows = client.sessions.send(session, "What is my name?").result()
        assert "Ada" in knows.text
        check_against_a_fresh_session(client, session)
        without_colour = client.sessions.get(session).messages
        kill(server)
    with start(url) as server, Client(server.address) as client:
        other = client.sessions.regenerate(session, temperature=5, seed=5).result()
        assert other.text != knows.text
        back = client.sessions.branch(session, without_colour[-1].id).messages
        assert [m.content for m in back] == [m.content for m in without_colour]
        assert [len(m.siblings) for m in back] == [1, 1, 2, 1, 1, 2]
        assert client.sessions.regenerate(session).result().token_ids == knows.token_ids
        check_against_a_fresh_session(client, session)
        kill(server)
    with start(url) as server, Client(server.address) as client:
        client.sessions.undo(session)
        again = client.sessions.undo(session).messages[-1]
        assert (again.content, again.position) == (other.text, 2)
        coloured = client.sessions.branch(session, with_colour[2].id).messages
        assert [m.content for m in coloured] == [m.content for m in with_colour]
        assert client.sessions.regenerate(session).result().token_ids == both.token_ids
        check_against_a_fresh_session(client, session)


def test_stopping_the_server_keeps_what_was_written(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tpserve.db'}"
    with start(url) as server, Client(server.address) as client:
        session = greedy(client)
        stream = client.sessions.send(
            session, "Hello!", temperature=1, seed=1, max_tokens=900, ignore_eos=True
        )
        next(event for event in stream.events() if isinstance(event, Token))
        waiting = client.sessions.send(session, "me too", wait=True)
        assert client.health().ready
        assert server.stop() == 0
        with pytest.raises(NotReadyError):
            waiting.result()
    with start(url) as server, Client(server.address) as client:
        messages = client.sessions.get(session).messages
        assert [m.role for m in messages] == ["user", "assistant"]
        assert messages[-1].partial
        assert messages[-1].content.startswith(stream.text[:1])


def test_over_the_loss_of_a_worker_turns_go_on_and_those_that_wait_follow(tmp_path: Path) -> None:
    with start(f"sqlite:///{tmp_path / 'tpserve.db'}") as server, Client(server.address) as client:
        wish: dict[str, Any] = {"temperature": 1, "seed": 1, "max_tokens": 400, "ignore_eos": True}
        undisturbed, session = greedy(client), greedy(client)
        client.sessions.send(undisturbed, "Hello!", **wish).result()
        client.sessions.send(undisturbed, "me too").result()
        stream = client.sessions.send(session, "Hello!", **wish)
        events = stream.events()
        next(event for event in events if isinstance(event, Token))
        waiting = client.sessions.send(session, "me too", wait=True)
        assert client.health().ready
        server.workers()[0].kill()
        assert isinstance(list(events)[-1], Done)
        waiting.result()
        assert path(client, session) == path(client, undisturbed)
        assert stream.text == path(client, session)[1]
        assert client.status().totals.restarts == 1


def test_without_a_database_sessions_are_refused() -> None:
    with Server("--model", CHAT, "--database", "none") as server, Client(server.wait_ready()) as c:
        with pytest.raises(SessionsOffError, match="started with --database none"):
            c.sessions.create()
        assert c.chat([{"role": "user", "content": "Hi"}], max_tokens=3).result().text


def test_a_turn_that_is_cancelled_at_once_keeps_what_was_said(
    server: Server, client: Client
) -> None:
    session = greedy(client)
    socket = raw_socket(server.address)
    socket.send(encode_request(SendTurn(id="t", session=session, text="Hello!")))
    socket.send(encode_request(Cancel(id="c", job="t")))
    events: list[Event] = []
    while len(events) < 3:
        assert socket.poll(10_000), events
        events += decode_events(socket.recv())
    user = client.sessions.get(session).messages[0].id
    assert events == [
        Cancelled(id="c"),
        TurnStored(id="t", session=session, user_message=user, answers=[]),
        Cancelled(id="t"),
    ]
    assert path(client, session) == ["Hello!"]
    client.sessions.regenerate(session).result()
    assert len(path(client, session)) == 2
    socket.close()


def test_an_id_that_is_in_use_is_refused(server: Server, client: Client) -> None:
    session, other = greedy(client), greedy(client)
    socket = raw_socket(server.address)
    for chosen in (session, other):
        socket.send(encode_request(SendTurn(id="same", session=chosen, text="Hello!")))
    assert wait_until(lambda: len(path(client, session)) == 2, 10)
    assert path(client, other) == []
    socket.close()


def test_a_data_folder_that_cannot_be_used_costs_the_sessions_only(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with Server(
        *("--model", CHAT, "--database", "auto"), env={"XDG_DATA_HOME": str(blocked)}
    ) as server:
        with Client(server.wait_ready()) as client:
            assert client.story("Hello", max_tokens=2).result().token_ids
            with pytest.raises(SessionsOffError, match="could not be opened"):
                client.sessions.create("chat")
        assert wait_until(
            lambda: any("no sessions and no jobs are kept" in line for line in server.log), 5
        )
