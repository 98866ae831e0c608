"""What people and scripts rely on that hold conversations with `tpserve chat`."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.messages import Cancel, Generate, Message
from shared.protocol import Event
from tests.client.conftest import MakePeer
from tests.client.peer import answer, endless, tell
from tests.client.terminal import Terminal, at_terminal, tpserve


def lengthy(request: Generate) -> Iterator[Event]:
    """Endless for a turn that asks for it, else what `answer` says."""
    assert request.messages is not None
    wanted = request.messages[-1].content == "count"
    return endless(request) if wanted else answer(request)


def turns(request: Generate) -> list[tuple[str, str]]:
    assert request.messages is not None
    return [(message.role, message.content) for message in request.messages]


def test_each_piped_line_is_a_turn_and_the_history_goes_along(make_peer: MakePeer) -> None:
    peer = make_peer(lambda request: tell(request, f"answer {len(request.messages or [])}"))
    done = tpserve("chat", "--system", "Be brief.", "--server", peer.address, stdin="a\n\nb\r\nc")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "answer 2\nanswer 4\nanswer 6\n"
    assert turns(peer.wait_for(Generate, 3)[2]) == [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "answer 2"),
        ("user", "b"),
        ("assistant", "answer 4"),
        ("user", "c"),
    ]


def test_commands_change_the_history(make_peer: MakePeer) -> None:
    peer = make_peer(lambda request: tell(request, "yes"))
    lines = "a\nb\n/undo\nc\n/reset\nd\n /undo\n/exit\ne\n"
    done = tpserve("chat", "--greedy", "--model", "demo", "--server", peer.address, stdin=lines)
    assert done.stdout == "yes\n" * 5
    requests = peer.wait_for(Generate, 5)
    assert [[content for _, content in turns(request)] for request in requests] == [
        ["a"],
        ["a", "yes", "b"],
        ["a", "yes", "c"],
        ["d"],
        ["d", "yes", "/undo"],
    ]
    assert {(request.model, request.params.temperature) for request in requests} == {("demo", 0.0)}


def test_instructions_can_be_changed(make_peer: MakePeer) -> None:
    peer = make_peer(lambda request: tell(request, "yes"))
    lines = "a\n/system Be  brief.\nb\n/system\nc\n"
    done = tpserve("chat", "--system", "Sing.", "--server", peer.address, stdin=lines)
    assert done.stdout == "yes\n" * 3
    first = [turns(request)[0] for request in peer.wait_for(Generate, 3)]
    assert first == [("system", "Sing."), ("system", "Be  brief."), ("user", "a")]


@pytest.mark.parametrize("command", ["/regen", "/edit 1 b", "/branch", "/redo", "/sessions"])
def test_what_needs_a_session_says_so_without_one(make_peer: MakePeer, command: str) -> None:
    done = tpserve("chat", "--server", make_peer().address, stdin=f"a\n{command}\nb\n")
    assert (done.returncode, done.stdout) == (1, "user: a\n")
    assert f"{command.split()[0]}: the server does not keep this conversation" in done.stderr


def test_a_server_without_sessions_is_no_obstacle_at_a_terminal(
    make_peer: MakePeer, state: dict[str, str]
) -> None:
    with at_terminal("chat", "--server", make_peer().address, env=state) as terminal:
        terminal.wait_for("this conversation is not kept: this server keeps no sessions")
        ask(terminal, "Hi")
        terminal.wait_for("user: Hi")
        ask(terminal, "/exit")
        assert terminal.wait_for_exit() == 0


def test_help_and_stats_are_printed(make_peer: MakePeer) -> None:
    server = make_peer().address
    done = tpserve("chat", "--server", server, stdin="/stats\nHi\n/stats\n/help\n")
    first, *rest = done.stdout.splitlines()
    assert first == "no answer has been finished yet"
    assert "answer 2 tokens, 20.0 tokens/s, 0.00 s in the queue" in rest
    assert any(line.startswith("/undo") for line in rest)


def test_an_unknown_command_ends_a_script_with_1(make_peer: MakePeer) -> None:
    done = tpserve("chat", "--server", make_peer().address, stdin="/sing\nHi\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert "'/sing' is no command" in done.stderr


@pytest.fixture
def state(tmp_path: Path) -> dict[str, str]:
    return {"XDG_STATE_HOME": str(tmp_path)}


def ask(terminal: Terminal, line: str) -> None:
    terminal.wait_for(">")
    terminal.type(f"{line}\r")


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    make_peer: MakePeer, state: dict[str, str]
) -> None:
    peer = make_peer(lengthy)
    with at_terminal("chat", "--server", peer.address, env=state) as terminal:
        ask(terminal, "count")
        terminal.wait_for(" 0 1 2")
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("[stopped]")
        ask(terminal, "go on")
        terminal.wait_for("user: go on")
        ask(terminal, "/exit")
        assert terminal.wait_for_exit() == 0
    first, second = peer.wait_for(Generate, 2)
    assert [cancel.job for cancel in peer.wait_for(Cancel)] == [first.id]
    said = turns(second)
    assert [role for role, _ in said] == ["user", "assistant", "user"]
    assert said[1][1].startswith(" 0 1 2")


def test_ctrl_c_at_the_prompt_tells_how_to_leave_and_ctrl_d_leaves(
    make_peer: MakePeer, state: dict[str, str]
) -> None:
    with at_terminal("chat", "--server", make_peer().address, env=state) as terminal:
        terminal.wait_for(">")
        terminal.type("\x03")
        terminal.wait_for("/exit or Ctrl-D leaves")
        terminal.wait_for(">")
        terminal.type("\x04")
        assert terminal.wait_for_exit() == 0


def test_an_error_does_not_end_a_conversation(make_peer: MakePeer, state: dict[str, str]) -> None:
    peer = make_peer()
    flags = ["--server", peer.address, "--timeout", "3"]
    with at_terminal("chat", *flags, env=state) as terminal:
        ask(terminal, "first")
        terminal.wait_for("user: first")
        terminal.wait_for(">")  # the end of the answer has arrived
        peer.close()
        terminal.type("lost\r")
        terminal.wait_for("tpserve: error: ")
        again = make_peer(address=peer.address)
        ask(terminal, "second")
        terminal.wait_for("user: second")
        assert turns(again.wait_for(Generate)[0])[0] == ("user", "first")
        assert Message("user", "lost") not in (again.wait_for(Generate)[0].messages or [])


def test_lines_are_remembered_for_the_next_conversation(
    make_peer: MakePeer, state: dict[str, str], tmp_path: Path
) -> None:
    server = make_peer().address
    with at_terminal("chat", "--server", server, env=state) as terminal:
        ask(terminal, "remember me")
        terminal.wait_for("user: remember me")
        ask(terminal, "/exit")
        assert terminal.wait_for_exit() == 0
    assert (tmp_path / "tpserve").stat().st_mode & 0o777 == 0o700
    with at_terminal("chat", "--server", server, env=state) as terminal:
        terminal.wait_for(">")
        terminal.type("\x1b[A\x1b[A\r")
        terminal.wait_for("user: remember me")
