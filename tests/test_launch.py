"""launch.sh and the set-up code behind it (scripts/), each test in a copy of the project.

A real .venv takes a minute to make, so most tests give the scripts an interpreter that notes what pip
is asked for and installs nothing. The native library is a few lines in the copies, and mostly built.
That the real things work is seen each time tests/run.sh starts.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from worker.native.build import Options, describe_inputs

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    *("launch.sh", "scripts/venv.sh", "scripts/native.sh", "worker/native/build.py"),
    "worker/native/toolchain.py",
    *("pyproject.toml", "requirements.lock"),
)
TOOLS = (
    *("bash", "cat", "cp", "dirname", "env", "flock", "grep", "mkdir", "mv", "readlink", "rm"),
    *("sh", "sha256sum", "sleep", "tail", "timeout", "touch", "uname"),
)
COMPILER_TOOLS = ("c++", "as", "ld")
DEADLINE_S = 60

NOTING_PYTHON = """\
#!/bin/sh
case "$*" in
    *"-m venv "*)
        for folder in "$@"; do :; done
        mkdir -p "$folder/bin"
        cp "$0" "$folder/bin/python"
        cp "{server}" "$folder/bin/tpserve"
        echo "venv" >>"{calls}"
        ;;
    *"-m pip "*)
        echo "$*" >>"{calls}"
        sleep "${{INSTALL_TAKES:-0}}"
        ;;
    *worker.native.build*)
        echo "build" >>"{calls}"
        exec "{python}" "$@"
        ;;
    *) exec "{python}" "$@" ;;
esac
"""

PRINTING_SERVER = """\
#!/bin/sh
echo "in $PWD:" "$@"
for descriptor in /proc/$$/fd/*; do readlink "$descriptor"; done
exit 0
"""


class Project:
    """A copy of the project's scripts, with a PATH that holds essential tools and no Python."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "the project"  # with a space, as a user's folder may have one
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        self.server = folder / "server"
        for name in FILES:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        self.add_built_library()
        self.bin.mkdir()
        self.add_tools(*TOOLS)
        self.add_executable(self.server, PRINTING_SERVER)
        self.env = {"PATH": str(self.bin), "HOME": str(folder), "TORCH_CPU_INDEX_URL": ""}

    def add_tools(self, *names: str) -> None:
        for name in names:
            path = shutil.which(name)
            assert path is not None, f"{name} is needed for this test"
            (self.bin / name).symlink_to(path)

    def add_built_library(self) -> None:
        """A source of the native library, and what a build of it leaves but for the machine code."""
        native = self.root / "worker/native"
        (native / "library.cpp").write_text("int library() { return 1; }\n")
        self.native = Options(native, native / "libtpserve.so")
        self.native.library.touch()
        self.native.stamp.write_text(f"compiler of another machine\n{describe_inputs(self.native)}")

    def add_executable(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def add_noting_python(self, name: str = "python3") -> None:
        text = NOTING_PYTHON.format(
            server=self.server, calls=self.calls_file, python=sys.executable
        )
        self.add_executable(self.bin / name, text)

    def start(
        self, *arguments: str, script: Path | None = None, cwd: Path | None = None, **env: str
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(script or self.root / "launch.sh"), *arguments],
            cwd=cwd or self.root,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def launch(
        self, *arguments: str, script: Path | None = None, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, script=script, cwd=cwd, **env)
        out, err = process.communicate(timeout=DEADLINE_S)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self) -> list[str]:
        """What was asked of Python since the last look: `-m venv`, `-m pip`, the build."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.write_text("")
        return lines


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


# --- which Python ---------------------------------------------------------------------------------


def test_a_machine_without_python_gets_one_line_that_says_so(project: Project) -> None:
    result = project.launch("--workers", "4")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "Python 3.11 or newer is needed" in result.stderr
    assert not (project.root / ".venv").exists()


def test_an_old_python_is_named_with_its_version(project: Project) -> None:
    project.add_executable(project.bin / "python3", "#!/bin/sh\necho 3.9.2\n")
    result = project.launch()
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "python3 is Python 3.9.2" in result.stderr


def test_a_python_without_the_venv_module_is_told_which_package_it_lacks(project: Project) -> None:
    python = '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1 ;; esac\necho 3.12.4\n'
    project.add_executable(project.bin / "python3", python)
    result = project.launch()
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "apt install python3.12-venv" in result.stderr


def test_the_newest_python_is_taken_unless_the_user_names_one(project: Project) -> None:
    project.add_executable(project.bin / "python3", "#!/bin/sh\necho 3.9.2\n")
    project.add_noting_python("python3.11")
    assert project.launch().returncode == 0
    assert project.launch(PYTHON="python3").returncode == 0  # .venv is there: nothing to choose
    shutil.rmtree(project.root / ".venv")
    assert "python3 is Python 3.9.2" in project.launch(PYTHON="python3").stderr


# --- starting the server --------------------------------------------------------------------------


def test_arguments_and_folder_reach_the_server_as_the_user_gave_them(
    project: Project, tmp_path: Path
) -> None:
    project.add_noting_python()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = project.launch("--model", "my model=./a b", "--help", cwd=elsewhere)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"in {elsewhere}: serve --model my model=./a b --help\n")


def test_launch_works_through_a_symbolic_link(project: Project, tmp_path: Path) -> None:
    project.add_noting_python()
    link = tmp_path / "start-tpserve"
    link.symlink_to(project.root / "launch.sh")
    result = project.launch("--workers", "2", script=link, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "serve --workers 2" in result.stdout


def test_the_server_does_not_hold_the_lock_of_the_set_up(project: Project) -> None:
    project.add_noting_python()
    assert ".venv.lock" not in project.launch().stdout


# --- when packages are installed ------------------------------------------------------------------


def installs(calls: list[str]) -> list[str]:
    return [call for call in calls if "--requirement" in call]


def test_a_second_start_installs_nothing_and_says_nothing(project: Project) -> None:
    project.add_noting_python()
    project.launch()
    assert project.calls()[0] == "venv"
    result = project.launch()
    assert project.calls() == []
    assert result.stderr == ""


def test_changed_pins_are_installed_into_the_venv_that_is_there(project: Project) -> None:
    project.add_noting_python()
    project.launch()
    project.calls()
    with (project.root / "requirements.lock").open("a") as lock:
        lock.write("another-package==1.0\n")
    project.launch()
    calls = project.calls()
    assert len(installs(calls)) == 1
    assert "venv" not in calls


def test_a_copied_project_does_not_run_the_original(project: Project, tmp_path: Path) -> None:
    project.add_noting_python()
    project.launch()
    project.calls()
    copy = tmp_path / "copy"
    shutil.copytree(project.root, copy)
    project.launch(script=copy / "launch.sh")
    assert any(f"--editable {copy}" in call for call in project.calls())


def test_a_set_up_that_was_cut_short_starts_from_scratch(project: Project) -> None:
    project.add_noting_python()
    process = project.start(INSTALL_TAKES="30")
    give_up = time.monotonic() + DEADLINE_S
    # Only read here: emptying the file could lose a line that is being written.
    while not (project.calls_file.exists() and " -m pip " in project.calls_file.read_text()):
        assert time.monotonic() < give_up, "pip was not started"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=DEADLINE_S)
    project.calls()

    again = project.launch()
    assert again.returncode == 0, again.stderr
    calls = project.calls()
    assert calls, again.stderr
    assert calls[0] == "venv"
    assert len(installs(calls)) == 1


def test_two_starts_at_once_set_up_once(project: Project) -> None:
    project.add_noting_python()
    both = [project.start(INSTALL_TAKES="0.5") for _ in range(2)]
    outputs = [process.communicate(timeout=DEADLINE_S) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert all("serve" in out for out, _ in outputs)
    assert len(installs(project.calls())) == 1


def test_when_pip_fails_its_last_words_are_shown(project: Project) -> None:
    # The real pip, asked for what cannot be: it fails before it installs anything.
    python = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
    project.add_executable(project.root / ".venv/bin/python", python)
    (project.root / "requirements.lock").write_text("no-such-package==1.0\n")
    result = project.launch(PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    assert result.returncode == 1
    assert "No matching distribution found for no-such-package==1.0" in result.stderr
    assert str(project.root / ".venv/setup.log") in result.stderr.splitlines()[-1]


def test_a_pip_set_up_for_other_things_does_not_get_in_the_way(project: Project) -> None:
    project.add_noting_python()
    noting = project.bin / "python3"
    noting.write_text(noting.read_text().replace('echo "$*"', 'echo "user=$PIP_USER" "$*"'))
    project.launch(PIP_USER="1", PIP_TARGET="/nowhere")
    assert installs(project.calls())[0].startswith("user= ")


# --- the native library ---------------------------------------------------------------------------


def test_without_a_compiler_one_line_says_so_and_the_server_starts(project: Project) -> None:
    project.add_noting_python()
    assert "compiler" not in project.launch().stderr  # the library is older than this machine
    (project.native.sources / "library.cpp").write_text("int library() { return 2; }\n")
    result = project.launch("--workers", "2")
    assert result.returncode == 0
    assert "serve --workers 2" in result.stdout
    assert result.stderr.count("\n") == 1
    assert "no C++ compiler" in result.stderr
    assert not project.native.library.exists()


@pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in COMPILER_TOOLS), reason="there is no C++ compiler"
)
def test_only_the_library_is_made_again_when_only_its_sources_changed(project: Project) -> None:
    project.add_noting_python()
    project.add_tools(*COMPILER_TOOLS)
    project.launch()
    assert project.calls()[-1] == "build"  # another compiler than the stamp's
    project.launch()
    assert project.calls() == []

    (project.native.sources / "library.h").write_text("// a new header\n")
    result = project.launch()
    assert project.calls() == ["build"]
    assert result.stderr.count("\n") == 1
    assert "compiling the native kernels" in result.stderr
    assert project.native.library.stat().st_size > 0
    assert project.launch().stderr == ""
    assert project.calls() == []


def test_an_interrupted_build_does_not_start_the_server(project: Project) -> None:
    project.add_noting_python()
    started = project.root / "started"
    endless = f'[ "$1" = --version ] && echo endless && exit; touch "{started}"; sleep 1000'
    project.add_executable(project.bin / "c++", f"#!/bin/sh\n{endless}\n")
    process = project.start()
    give_up = time.monotonic() + DEADLINE_S
    while not started.exists():
        assert process.poll() is None, "it did not wait for the build"
        assert time.monotonic() < give_up, "the build was not started"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode != 0
    assert "serve" not in out
    assert "Traceback" not in err


# --- which torch ----------------------------------------------------------------------------------

without_driver = pytest.mark.skipif(
    Path("/proc/driver/nvidia/version").exists(), reason="with an NVIDIA driver torch needs CUDA"
)


class Index(BaseHTTPRequestHandler):
    """Answers every request with an empty page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Not on the terminal."""


@pytest.fixture
def cpu_index() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Index) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/cpu"
        server.shutdown()
        thread.join()


@without_driver
def test_without_a_gpu_torch_comes_from_the_cpu_index(project: Project, cpu_index: str) -> None:
    project.add_noting_python()
    project.launch(TORCH_CPU_INDEX_URL=cpu_index)
    calls = project.calls()
    assert f"--no-deps --index-url {cpu_index} torch==2.13.0+cpu" in calls[1]
    assert "--requirement" in calls[2]


@without_driver
def test_when_the_cpu_index_is_out_of_reach_torch_comes_from_the_registry(
    project: Project,
) -> None:
    project.add_noting_python()
    nowhere = "http://127.0.0.1:1/cpu"
    result = project.launch(TORCH_CPU_INDEX_URL=nowhere)
    assert result.returncode == 0
    assert f"{nowhere} does not answer" in result.stderr
    assert not any("--index-url" in call for call in project.calls())
    assert "Traceback" not in result.stderr
