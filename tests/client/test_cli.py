"""What people and scripts rely on that use the `tpserve` command."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from shared.messages import Cancel, Generate, SamplingParams
from tests.client.conftest import MakePeer
from tests.client.peer import Peer, endless, refusal, tell
from tests.client.terminal import COMMAND, ROOT, at_terminal, environment, tpserve

STORY = " and so it went"


def stop_when_it_runs(process: "subprocess.Popen[bytes]", peer: Peer) -> None:
    """Ctrl-C once the answer has begun."""
    assert process.stdout is not None
    while b" 1" not in os.read(process.stdout.fileno(), 4096):
        pass
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    peer.wait_for(Cancel)


# --- usage ----------------------------------------------------------------------------------------


def test_usage_errors_exit_with_2() -> None:
    for arguments in (
        [],
        ["sing"],
        ["story", "x", "--temperature", "hot"],
        ["story", "x", "--greedy", "--temperature", "1"],
        ["story", "x", "--timeout", "nan"],
        ["status", "--max-tokens", "3"],
        ["story", "x", "--temp", "1"],
    ):
        done = tpserve(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert "usage: tpserve" in done.stderr


def test_help_names_every_command() -> None:
    done = tpserve("--help")
    assert done.returncode == 0
    for command in ("serve", "compare", "story", "chat", "status", "models", "health"):
        assert command in done.stdout


def test_the_version_is_the_package_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert tpserve("--version").stdout == f"tpserve {project['version']}\n"


def test_serve_becomes_the_coordinator_with_all_its_arguments(tmp_path: Path) -> None:
    package = tmp_path / "coordinator"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import os, sys; print(os.getpid(), sys.argv[1:])")
    process = subprocess.Popen(
        [*COMMAND, "serve", "--help", "--workers", "2", "--version"],
        stdout=subprocess.PIPE,
        env=environment({"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}),
        cwd=ROOT,
    )
    output = process.communicate()[0].decode()
    assert output == f"{process.pid} ['--help', '--workers', '2', '--version']\n"


def test_serve_loads_no_library_on_its_way() -> None:
    script = (
        "import os, sys\n"
        "os.execv = lambda *_: print(sorted({m.partition('.')[0] for m in sys.modules}))\n"
        "sys.argv = ['tpserve', 'serve']\n"
        "import client.cli\n"
        "try: client.cli.main()\n"
        "except SystemExit: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    loaded = done.stdout.splitlines()[0]
    assert "'argparse'" in loaded
    for library in ("zmq", "msgspec", "rich", "prompt_toolkit", "torch"):
        assert f"'{library}'" not in loaded


# --- story ----------------------------------------------------------------------------------------


def test_story_prints_the_prompt_and_its_continuation(make_peer: MakePeer) -> None:
    done = tpserve("story", "Once", "--server", make_peer().address)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"Once{STORY}\n", "")


def test_the_server_s_address_may_stand_in_the_environment(make_peer: MakePeer) -> None:
    done = tpserve("story", "Once", env={"TPSERVE_SERVER": make_peer().address})
    assert done.stdout == f"Once{STORY}\n"


@pytest.mark.parametrize("arguments", [["story"], ["story", "-"]])
def test_story_reads_the_prompt_from_standard_input(
    make_peer: MakePeer, arguments: list[str]
) -> None:
    peer = make_peer()
    done = tpserve(*arguments, "--server", peer.address, stdin="Zwölf\n\nBoxkämpfer\n")
    assert done.stdout == f"Zwölf\n\nBoxkämpfer{STORY}\n"
    assert peer.wait_for(Generate)[0].prompt == "Zwölf\n\nBoxkämpfer"


def test_the_flags_of_story_reach_the_server(make_peer: MakePeer) -> None:
    peer = make_peer()
    flags = "--model demo --max-tokens 5 --temperature 0.7 --top-k 4 --top-p 0.5 --seed 9"
    assert tpserve("story", "Once", "--server", peer.address, *flags.split()).returncode == 0
    tpserve("story", "Once", "--server", peer.address, "--greedy")
    first, second = peer.wait_for(Generate, 2)
    assert first.model == "demo"
    assert first.params == SamplingParams(max_tokens=5, temperature=0.7, top_k=4, top_p=0.5, seed=9)
    assert (second.model, second.params) == (None, SamplingParams(temperature=0.0))


def test_story_as_json_is_one_object(make_peer: MakePeer) -> None:
    done = tpserve("story", "Once", "--json", "--server", make_peer().address)
    assert done.stdout.count("\n") == 1
    answer = json.loads(done.stdout)
    assert answer.keys() == {"text", "token_ids", "finish_reason", "usage", "timings"}
    assert answer["text"] == f"Once{STORY}"
    assert answer["token_ids"] == [0, 1, 2, 3]
    assert answer["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["timings"]["decode_tokens_per_s"] == 20.0


def test_the_text_of_a_story_is_not_held_back(make_peer: MakePeer) -> None:
    peer = make_peer(endless)
    command = [*COMMAND, "story", "Once", "--server", peer.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), cwd=ROOT) as process:
        # It never ends, so whatever can be read was put out while it ran.
        stop_when_it_runs(process, peer)


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_ctrl_c_cancels_the_story_and_exits_with_130(make_peer: MakePeer, extra: list[str]) -> None:
    peer = make_peer(endless)
    command = [*COMMAND, "story", "Once", *extra, "--server", peer.address]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), cwd=ROOT
    )
    (job,) = peer.wait_for(Generate)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 130
    assert errors == b""
    assert peer.wait_for(Cancel)[0].job == job.id
    assert not extra or output == b""


def test_a_reader_that_leaves_ends_the_story_quietly(make_peer: MakePeer) -> None:
    peer = make_peer(endless)
    process = subprocess.Popen(
        [*COMMAND, "story", "Once", "--server", peer.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert (process.wait(20), process.stderr.read()) == (141, b"")
    process.stderr.close()
    peer.wait_for(Cancel)


# --- errors ---------------------------------------------------------------------------------------


def test_an_error_is_one_line_and_exits_with_1(make_peer: MakePeer) -> None:
    peer = make_peer(refusal("queue_full", "8 jobs\nwait: try again later"))
    for arguments, stdin in (
        (["story", "Once"], ""),
        (["story", "Once", "--json"], ""),
        (["chat"], "Hi\n"),
    ):
        done = tpserve(*arguments, "--server", peer.address, stdin=stdin)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "tpserve: error: 8 jobs wait: try again later\n"


def test_without_a_server_the_error_says_how_to_start_one() -> None:
    for command in ("status", "models", "health"):
        done = tpserve(command, "--server", "ipc:///nowhere/tpserve.sock", "--timeout", "0.2")
        assert (done.returncode, done.stdout) == (1, "")
        assert "ipc:///nowhere/tpserve.sock" in done.stderr
        assert "is the server running? ./launch.sh" in done.stderr
        assert done.stderr.count("\n") == 1


def test_input_that_is_not_text_is_refused(make_peer: MakePeer) -> None:
    server = make_peer().address
    for arguments in (["story"], ["chat"]):
        done = tpserve(*arguments, "--server", server, stdin=b"\xff\xfe\n")
        assert done.returncode == 1
        assert done.stderr.startswith("tpserve: error: standard input is not UTF-8")
    done = tpserve("story", os.fsdecode(b"\xff"), "--server", server)
    assert done.stderr.startswith("tpserve: error: the text is not valid Unicode")


# --- status, models, health -----------------------------------------------------------------------


def test_status_for_people_and_for_programs(make_peer: MakePeer) -> None:
    server = make_peer().address
    text = tpserve("status", "--server", server).stdout
    assert "5 of 512 used" in text
    assert "4713  4,5,6,7" in text
    fields = json.loads(tpserve("status", "--json", "--server", server).stdout)
    assert [worker["pid"] for worker in fields["workers"]] == [4712, 4713]
    assert fields["queued"] == {"story": 2, "chat": 0}
    assert fields.keys().isdisjoint({"event", "id", "v"})


def test_models_for_people_and_for_programs(make_peer: MakePeer) -> None:
    server = make_peer().address
    assert (
        "demo  ready  llama  fp32   fp32  1,234,567" in tpserve("models", "--server", server).stdout
    )
    (model,) = json.loads(tpserve("models", "--json", "--server", server).stdout)
    assert (model["name"], model["max_model_len"]) == ("demo", 512)


def test_health_tells_by_its_exit_code(make_peer: MakePeer) -> None:
    done = tpserve("health", "--server", make_peer().address)
    assert (done.returncode, done.stdout) == (0, "ready\n")
    done = tpserve("health", "--server", make_peer(ready=False).address)
    assert (done.returncode, done.stdout) == (1, "not ready: a worker is being replaced\n")


# --- at a terminal --------------------------------------------------------------------------------


def test_a_model_cannot_control_the_terminal(make_peer: MakePeer) -> None:
    peer = make_peer(lambda request: tell(request, " a\x1b[2J b\x9b2J\rc\x07\td"))
    with at_terminal("story", "Once", "--server", peer.address) as terminal:
        assert terminal.wait_for_exit() == 0
        assert "Once a␛[2J b\ufffd2J␍c␇\td\r\n" in terminal.screen
        assert "\x1b" not in terminal.screen


def test_what_is_piped_is_what_the_model_said(make_peer: MakePeer) -> None:
    peer = make_peer(lambda request: tell(request, " a\x1b[2J\r"))
    assert tpserve("story", "Once", "--server", peer.address).stdout == "Once a\x1b[2J\r\n"


def test_speed_is_told_to_people_only(make_peer: MakePeer) -> None:
    server = make_peer().address
    with at_terminal("story", "Once", "--server", server) as terminal:
        assert terminal.wait_for_exit() == 0
        assert "4 tokens, 20.0 tokens/s" in terminal.screen


def test_tables_are_drawn_at_a_terminal(make_peer: MakePeer) -> None:
    with at_terminal("status", "--server", make_peer().address) as terminal:
        assert terminal.wait_for_exit() == 0
        assert "│ 4,5,6,7" in terminal.screen
