"""Sessions of a whole server: what was said is kept, whoever asks and whatever ends."""

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from client.zmq_client import AsyncClient, Client, JobCancelledError
from shared.config import PROJECT_ROOT
from shared.errors import (
    ContextLengthError,
    DatabaseError,
    InvalidRequestError,
    SessionBusyError,
    SessionNotFoundError,
    SessionsOffError,
    WorkerLostError,
)
from shared.messages import Cancel, Cancelled, Done, Queued, SamplingParams, Started, Token
from shared.protocol import Event, decode_events, encode_request
from shared.session_messages import (
    CreateSession,
    ListSessions,
    SendTurn,
    Sessions,
    SessionState,
    TurnStored,
)
from tests.e2e.server import Server, run_tpserve, wait_until
from tests.e2e.test_server import raw_socket
from tests.postgres import Postgres, empty_schema

CHAT = f"chat={PROJECT_ROOT / 'models' / 'demo-chat'}"


def start(database_url: str) -> Server:
    server = Server("--model", CHAT, "--database", database_url)
    server.wait_ready()
    return server


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the SQLite database."""
    return tmp_path_factory.mktemp("sessions") / "tpserve.db"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, file: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{file}"
        return
    with empty_schema(request.getfixturevalue("postgres_url")) as url:
        yield url


@pytest.fixture(scope="module")
def server(database_url: str) -> Iterator[Server]:
    with start(database_url) as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected


def greedy(client: Client, **options: object) -> int:
    """A new session without randomness."""
    return client.sessions.create(temperature=0, max_tokens=60).session.id


def say(client: Client, session: int, text: str) -> list[int]:
    return client.sessions.send(session, text).result().token_ids


def path(client: Client, session: int) -> list[str]:
    return [message.content for message in client.sessions.get(session).messages]


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
    assert (user.id, answer.id) == (stream.stored.user_message, stream.stored.answer)
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
        ):
            with pytest.raises(SessionBusyError, match=f"session {session}: wait for its end"):
                refused()
        assert [m.content for m in other.sessions.get(session).messages] == ["Hello!"]
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
            return await client.sessions.get(session), text

    state, text = asyncio.run(converse())
    assert [message.content for message in state.messages] == ["Hello!", text]


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


def test_stopping_the_server_keeps_what_was_written(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tpserve.db'}"
    with start(url) as server, Client(server.address) as client:
        session = greedy(client)
        stream = client.sessions.send(
            session, "Hello!", temperature=1, seed=1, max_tokens=900, ignore_eos=True
        )
        next(event for event in stream.events() if isinstance(event, Token))
        assert server.stop() == 0
    with start(url) as server, Client(server.address) as client:
        messages = client.sessions.get(session).messages
        assert [m.role for m in messages] == ["user", "assistant"]
        assert messages[-1].partial
        assert messages[-1].content.startswith(stream.text[:1])


def test_a_lost_worker_leaves_the_partial_answer(tmp_path: Path) -> None:
    with start(f"sqlite:///{tmp_path / 'tpserve.db'}") as server, Client(server.address) as client:
        session = greedy(client)
        stream = client.sessions.send(
            session, "Hello!", temperature=1, seed=1, max_tokens=900, ignore_eos=True
        )
        events = stream.events()
        next(event for event in events if isinstance(event, Token))
        server.workers()[0].kill()
        with pytest.raises(WorkerLostError):
            list(events)
        answer = client.sessions.get(session).messages[-1]
        assert (answer.role, answer.content, answer.partial) == ("assistant", stream.text, True)


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
        TurnStored(id="t", session=session, user_message=user, answer=None),
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


def test_the_commands_list_show_search_rename_copy_and_delete(
    server: Server, client: Client, tmp_path: Path
) -> None:
    def tpserve(*arguments: str, stdin: str = "") -> str:
        done = run_tpserve([*arguments, "--server", server.address], stdin)
        assert done.returncode == 0, done.stderr
        return done.stdout

    session = str(greedy(client))
    chat = ("chat", "--session", session)
    answers = tpserve(*chat, stdin="Hello, my name is Zebedee.\nWhat is my name?\n").splitlines()
    assert "Zebedee" in answers[-1]
    assert tpserve("chat", "--last", stdin="/undo\nWhat is my name?\n").strip() == answers[-1]
    assert "Hello, my name is Zebedee." in tpserve("sessions", "list", "--limit", "1")
    shown = tpserve("sessions", "show", session)
    assert "user 2/2\nWhat is my name?" in shown
    assert session in tpserve("sessions", "search", "zebedee").split()
    tpserve("sessions", "rename", session, "Names")
    file = str(tmp_path / "session.json")
    tpserve("sessions", "export", session, file)
    copy = tpserve("sessions", "import", file).strip()
    assert client.sessions.export(int(copy)) == client.sessions.export(int(session))
    assert client.sessions.get(int(copy)).session.title == "Names"
    tpserve("sessions", "rm", session, copy)
    for arguments, said in (
        (["sessions", "show", copy], f"there is no session {copy}"),
        (["sessions", "import", "/nowhere"], "/nowhere cannot be read: No such file"),
        (["chat", "--session", copy, "--system", "x"], "leave out --model"),
    ):
        done = run_tpserve([*arguments, "--server", server.address])
        assert done.returncode == 1
        assert said in done.stderr


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
        assert wait_until(lambda: any("no sessions are kept" in line for line in server.log), 5)
