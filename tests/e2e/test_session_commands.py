"""Sessions as people use them: `tpserve sessions` and `tpserve chat`."""

from pathlib import Path

from client.zmq_client import Client
from shared.messages import SamplingParams
from tests.client.terminal import at_terminal
from tests.e2e.server import Server, run_tpserve
from tests.e2e.sessions import greedy, path


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


def chat(server: Server, session: int, *lines: str) -> str:
    arguments = ["chat", "--session", str(session), "--server", server.address]
    done = run_tpserve(arguments, "".join(f"{line}\n" for line in lines))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_chat_can_be_taken_another_way(server: Server, client: Client) -> None:
    session = greedy(client)
    first, second = "Hello, my name is Ada.", "What is my name?"
    said = chat(server, session, first, second, "/branch").splitlines()
    assert len(said) == 3
    assert said[2] == "‹1/1›"
    assert chat(server, session, "/regen").splitlines() == [said[1]]
    both = [first, said[0], second, said[1]]
    assert path(client, session) == both
    edited = chat(
        server, session, "/edit What is my name, please?", "/undo", "/branch", "/branch 1"
    )
    assert edited.splitlines()[1:] == ["‹2/2›", f"‹1/2› {said[1]}"]
    assert path(client, session) == both
    chat(server, session, "/edit 1 Hello, my name is Bob.", "/edit 1 2 cats")
    assert path(client, session)[0] == "2 cats"
    assert chat(server, session, "/undo", second).splitlines() == [path(client, session)[-1]]
    assert "Bob" in path(client, session)[-1]
    whole = path(client, session)
    chat(server, session, "/rollback")
    assert path(client, session) == whole[:2]
    chat(server, session, "/undo", "/rollback 1")
    assert path(client, session) == []
    chat(server, session, "/undo", "/reset", "/undo", "/undo", "/redo")
    assert path(client, session) == whole


def test_a_chat_can_be_named_instructed_and_left_for_another(
    server: Server, client: Client
) -> None:
    other, session = greedy(client), greedy(client)
    story = client.sessions.create("story", title="A story").session.id
    client.sessions.rename(other, "The other one")
    commands = ("/rename  My  chat ", "/system You are a  pirate.", "/sessions", f"/open {other}")
    said = chat(server, session, *commands, "Hello!", "/system", "/stats").splitlines()
    info = client.sessions.get(session).session
    assert (info.title, info.system) == ("My  chat", "You are a  pirate.")
    assert [line.split()[0] for line in said[2:4]] == [str(session), str(other)]
    assert "A story" not in "".join(said)
    assert path(client, other)[0] == "Hello!"
    assert path(client, session) == []
    assert "model chat, 1 turns" in said
    for line, problem in (
        ("/branch", "there is no answer yet"),
        ("/rollback 3", "you have said nothing yet"),
        ("/undo", "has nothing to undo"),
        ("/open x", "'x' is not the id of a session"),
        (f"/open {story}", "is a story, not a chat"),
        ("/rename", "'/rename' is no command"),
    ):
        arguments = ["chat", "--session", str(session), "--server", server.address]
        done = run_tpserve(arguments, f"{line}\n")
        assert (done.returncode, done.stdout) == (1, "")
        assert problem in done.stderr


def test_an_answer_of_a_chat_that_was_cut_is_continued(server: Server, client: Client) -> None:
    session = greedy(client)
    question = "Hello, my name is Ada."
    expected = client.sessions.send(session, question).result().text
    client.sessions.rollback(session, None)
    client.sessions.configure(session, params=SamplingParams(temperature=0, max_tokens=3, n=2))
    start_of_it = chat(server, session, question).rstrip("\n")
    assert expected.startswith(start_of_it)
    chat(server, session, *["/continue"] * 3)
    continued = path(client, session)[-1]
    assert expected.startswith(continued)
    assert len(continued) > len(start_of_it)


def test_a_chat_at_a_terminal_is_kept_from_its_first_message_on(
    server: Server, client: Client, tmp_path: Path
) -> None:
    before = client.sessions.page(1).sessions
    env = {"XDG_STATE_HOME": str(tmp_path)}
    flags = ("chat", "--greedy", "--system", "Be brief.", "--server", server.address)
    with at_terminal(*flags, env=env) as terminal:
        terminal.wait_for(">")
        assert client.sessions.page(1).sessions == before
        terminal.type("Hello!\r")
        terminal.wait_for("goes on with it]")
        terminal.wait_for(">")
        terminal.type("/ren\t")
        terminal.wait_for("ame")
        terminal.type(" Told once\r")
        terminal.wait_for(">")
        terminal.type("/exit\r")
        assert terminal.wait_for_exit() == 0
    (kept,) = client.sessions.page(1).sessions
    assert (kept.title, kept.system, kept.params.temperature) == ("Told once", "Be brief.", 0)
    with at_terminal(*flags, "--no-session", env=env) as terminal:
        terminal.wait_for(">")
        terminal.type("Hello!\r")
        terminal.wait_for(">")
        terminal.type("/regen\r")
        terminal.wait_for("does not keep this conversation")
        terminal.type("/exit\r")
        assert terminal.wait_for_exit() == 0
    assert client.sessions.page(1).sessions == [kept]
