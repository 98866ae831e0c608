"""The build of the native library, each test on a few lines of C++ of its own; and its loader."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.errors import ConfigError
from worker.native.build import (
    LIBRARY,
    SOURCES,
    BuildError,
    Options,
    build,
    is_current,
    parse_options,
)
from worker.native.library import ABI_VERSION, load_library
from worker.native.toolchain import LEVELS, find_compiler

ROOT = Path(__file__).resolve().parents[2]
PYTHON_FILES = ("build.py", "library.py", "toolchain.py")
MACHINE = os.uname().machine
DEADLINE_S = 120

needs_compiler = pytest.mark.skipif(
    find_compiler(MACHINE) is None, reason="there is no C++ compiler (apt install g++)"
)
needs_objdump = pytest.mark.skipif(
    shutil.which("objdump") is None, reason="there is no objdump (apt install binutils)"
)
only_x86 = pytest.mark.skipif(MACHINE != "x86_64", reason="looks for instructions of x86-64")

EXPORTED = 'extern "C" __attribute__((visibility("default"))) int '
ANSWER = f'#include "answer.h"\n{EXPORTED}answer() {{ return ANSWER; }}\n'
BROKEN = "int answer( { no C++\n"
CALL = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1])[sys.argv[2]]())"
NO_COMPILER = {"PATH": "/nonexistent"}


def tiny(folder: Path, answer: int = 1, **sources: str) -> Options:
    """Sources of a library with one function that returns `answer`; and further ones, NAME.cpp."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answer.h").write_text(f"#define ANSWER {answer}\n")
    (folder / "answer.cpp").write_text(ANSWER)
    for name, text in sources.items():
        (folder / f"{name}.cpp").write_text(text)
    return Options(folder, folder / "libtpserve.so")


def call(library: Path, function: str = "answer") -> int:
    """In a process of its own: one that has a library loaded would not look at the new file."""
    command = [sys.executable, "-c", CALL, str(library), function]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def start_build(
    options: Options, env: dict[str, str] | None = None, project: Path = ROOT
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-ESs", "-m", "worker.native.build", "--sources", str(options.sources)],
        cwd=project,
        env=os.environ | (env or {}),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_build(
    options: Options, env: dict[str, str] | None = None, project: Path = ROOT
) -> tuple[int, str]:
    """Exit status and what it says."""
    process = start_build(options, env, project)
    _, said = process.communicate(timeout=DEADLINE_S)
    return process.returncode, said


# --- when it builds -------------------------------------------------------------------------------


@needs_compiler
def test_the_library_is_built_once_and_loads(tmp_path: Path) -> None:
    options = tiny(tmp_path, answer=42)
    assert build(options)
    assert call(options.library) == 42
    made = options.library.stat().st_mtime_ns
    assert not build(options)
    assert options.library.stat().st_mtime_ns == made
    assert build(options, force=True)


@needs_compiler
@pytest.mark.parametrize(
    ("file", "text"),
    [("answer.h", "#define ANSWER 2\n"), ("answer.cpp", ANSWER.replace("ANSWER;", "2;"))],
)
def test_a_changed_source_or_header_is_compiled_again(tmp_path: Path, file: str, text: str) -> None:
    options = tiny(tmp_path)
    build(options)
    (tmp_path / file).write_text(text)
    assert build(options)
    assert call(options.library) == 2


@needs_compiler
def test_a_source_that_comes_or_goes_is_noticed(tmp_path: Path) -> None:
    options = tiny(tmp_path)
    build(options)
    tiny(tmp_path, more=f"{EXPORTED}more() {{ return 3; }}\n")
    assert build(options)
    assert call(options.library, "more") == 3
    (tmp_path / "more.cpp").unlink()
    assert build(options)


@needs_compiler
def test_another_compiler_builds_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = tiny(tmp_path / "sources")
    build(options)
    newer = tmp_path / "newer-c++"
    newer.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "newer 99" || exec c++ "$@"\n')
    newer.chmod(0o755)
    monkeypatch.setenv("CXX", str(newer))
    assert build(options)
    assert options.stamp.read_text().startswith("compiler newer 99\n")


# --- what it builds -------------------------------------------------------------------------------


@needs_compiler
def test_kernels_are_compiled_for_each_level_and_the_other_sources_know_which(
    tmp_path: Path,
) -> None:
    kernels = """\
#define JOIN(a, b) a##b
#define NAME(prefix, level) JOIN(prefix, level)
int NAME(kernel_, TPS_LEVEL)() { return 1; }
"""
    levels = list(LEVELS.get(MACHINE, {"scalar": ()}))
    dispatch = "".join(
        f"#ifdef TPS_HAVE_{level.upper()}\nint kernel_{level}();\n"
        f"{EXPORTED}call_{level}() {{ return kernel_{level}(); }}\n#endif\n"
        for level in levels
    )
    options = tiny(tmp_path, kernels=kernels, dispatch=dispatch)
    build(options)
    assert call(options.library, "call_scalar") == 1
    for level in levels:
        compiled = f"kernels-{level}.o" in options.log.read_text()
        exported = f"call_{level}\0".encode() in options.library.read_bytes()
        assert compiled == exported, level


@needs_compiler
@needs_objdump
@only_x86
def test_old_machines_never_meet_code_that_was_compiled_for_newer_ones(tmp_path: Path) -> None:
    # An inline function that several objects have is in the library once: whose is it?
    shared = """\
#include <cstddef>
__attribute__((noinline)) inline void double_all(float* x, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) x[i] *= 2;
}
"""
    kernels = """\
#include "shared.h"
#define JOIN(a, b) a##b
#define NAME(prefix, level) JOIN(prefix, level)
void NAME(kernel_, TPS_LEVEL)(float* x, std::size_t n) { double_all(x, n); }
"""
    # Named to be compiled after kernels.cpp, were it by name.
    other = f'#include "shared.h"\n{EXPORTED}other(float* x) {{ double_all(x, 99); return 0; }}\n'
    options = tiny(tmp_path, kernels=kernels, other=other)
    (tmp_path / "shared.h").write_text(shared)
    build(options)
    code = disassemble(options.library, "--disassemble=_Z10double_allPfm")
    assert "mulps" in code or "addps" in code, "the function was not found"
    assert "ymm" not in code
    assert "zmm" not in code


@needs_compiler
def test_a_missing_function_fails_the_build_and_not_the_server(tmp_path: Path) -> None:
    options = tiny(tmp_path, more=f"int nowhere();\n{EXPORTED}more() {{ return nowhere(); }}\n")
    with pytest.raises(BuildError, match="cannot be linked"):
        build(options)
    assert "nowhere" in options.log.read_text()


@needs_compiler
def test_a_sanitized_build_has_its_own_place(tmp_path: Path) -> None:
    arguments = ["--sanitize", "address,undefined", "--sources", str(tmp_path)]
    options, _ = parse_options(arguments)
    assert options.library == ROOT / "build/native-address-undefined/libtpserve.so"
    tiny(tmp_path)
    options, _ = parse_options([*arguments, "--out", str(tmp_path / "sanitized.so")])
    build(options)
    assert b"__asan_init" in options.library.read_bytes()
    assert not is_current(Options(tmp_path, options.library))


@pytest.mark.skipif(
    find_compiler("aarch64") is None,
    reason="there is no compiler for aarch64 (apt install g++-aarch64-linux-gnu)",
)
def test_the_library_can_be_compiled_for_aarch64(tmp_path: Path) -> None:
    arguments = ["--target", "aarch64", "--out", str(tmp_path / "arm.so")]
    tiny(tmp_path, kernels="")
    options, _ = parse_options([*arguments, "--sources", str(tmp_path)])
    build(options)
    assert options.library.read_bytes()[18:20] == b"\xb7\0"  # e_machine: EM_AARCH64
    assert "kernels-neon.o" in options.log.read_text()


# --- when it cannot be built ----------------------------------------------------------------------


def test_without_a_compiler_one_line_says_what_is_lost_and_what_to_install(tmp_path: Path) -> None:
    options = tiny(tmp_path)
    options.library.write_text("made from older sources")
    options.stamp.write_text("compiler older\n")
    status, said = run_build(options, NO_COMPILER | {"CXX": ""})
    assert status == 3
    assert said.count("\n") == 1
    assert "no C++ compiler: none of c++, g++, clang++ is there (apt install g++)" in said
    assert "torch's kernels: slower, without int8 and int4 weights" in said
    assert not options.library.exists()


def test_a_compiler_that_was_named_and_is_not_there_is_not_replaced_by_another(
    tmp_path: Path,
) -> None:
    status, said = run_build(tiny(tmp_path), {"CXX": "no-such-compiler"})
    assert status == 3
    assert "no-such-compiler does not run" in said


@needs_compiler
def test_a_library_outlives_its_compiler_but_not_its_sources(tmp_path: Path) -> None:
    options = tiny(tmp_path)
    build(options)
    assert run_build(options, NO_COMPILER) == (0, "")
    tiny(tmp_path, answer=2)
    assert run_build(options, NO_COMPILER)[0] == 3
    assert not options.library.exists()


@needs_compiler
def test_sources_that_do_not_compile_leave_the_reason_in_the_log_and_no_library(
    tmp_path: Path,
) -> None:
    options = tiny(tmp_path)
    build(options)
    (tmp_path / "answer.cpp").write_text(BROKEN)
    status, said = run_build(options)
    assert status == 1
    assert str(options.log) in said.splitlines()[-1]
    assert "answer.cpp:1:" in options.log.read_text()
    assert not options.library.exists()
    (tmp_path / "answer.cpp").write_text(ANSWER)
    assert build(options)


def test_a_folder_without_sources_is_an_error(tmp_path: Path) -> None:
    options = Options(tmp_path, tmp_path / "libtpserve.so")
    with pytest.raises(BuildError):
        build(options)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    options = tiny(tmp_path)
    (tmp_path / "libtpserve.lock").mkdir()
    status, said = run_build(options)
    assert status == 1
    assert "libtpserve.lock" in said
    assert "Traceback" not in said


# --- several builds, and interrupted ones ---------------------------------------------------------


@needs_compiler
def test_two_builds_at_once_compile_once(tmp_path: Path) -> None:
    options = tiny(tmp_path, answer=5)
    both = [start_build(options) for _ in range(2)]
    said = "".join(process.communicate(timeout=DEADLINE_S)[1] for process in both)
    assert [process.returncode for process in both] == [0, 0], said
    assert said.count("compiling") == 1
    assert call(options.library) == 5


@needs_compiler
def test_after_an_interrupted_build_the_next_one_makes_the_library(tmp_path: Path) -> None:
    options = tiny(tmp_path / "sources")
    build(options)
    tiny(options.sources, answer=2)
    started = tmp_path / "started"
    endless = tmp_path / "endless-c++"
    endless.write_text(
        f'#!/bin/sh\ncase " $* " in *" -c "*) touch "{started}"; sleep 1000 ;; esac\nexec c++ "$@"\n'
    )
    endless.chmod(0o755)
    process = start_build(options, {"CXX": str(endless)})
    give_up = time.monotonic() + DEADLINE_S
    while not started.exists():
        assert time.monotonic() < give_up, "nothing was compiled"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=DEADLINE_S)
    assert not is_current(options)

    assert build(options)
    assert call(options.library) == 2
    assert sorted(path.name for path in options.sources.iterdir()) == [
        "answer.cpp",
        "answer.h",
        "libtpserve.lock",
        "libtpserve.log",
        "libtpserve.so",
        "libtpserve.stamp",
    ]


# --- wheels ---------------------------------------------------------------------------------------


def make_wheel(folder: Path, env: dict[str, str]) -> Path:
    """The wheel of a copy of the project that has only the native library."""
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    native = folder / "worker/native"
    tiny(native)
    for name in PYTHON_FILES:
        shutil.copy(SOURCES / name, native / name)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel"],
        cwd=folder,
        env=os.environ | env,
        check=True,
        capture_output=True,
    )
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if name.startswith("worker/")}


@needs_compiler
def test_a_wheel_has_the_library_in_place_of_its_sources(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, {})
    assert wheel.name.endswith(f"-py3-none-linux_{MACHINE}.whl")
    assert contents(wheel) == {f"worker/native/{name}" for name in (*PYTHON_FILES, "libtpserve.so")}


def test_a_wheel_made_without_a_compiler_is_for_every_machine(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, NO_COMPILER | {"CXX": ""})
    assert wheel.name.endswith("-py3-none-any.whl")
    assert contents(wheel) == {f"worker/native/{name}" for name in PYTHON_FILES}


# --- loading --------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Without the variables that load_library reads, and nothing remembered from before."""
    monkeypatch.delenv("TPSERVE_KERNELS", raising=False)
    monkeypatch.delenv("TPSERVE_NATIVE_LIBRARY", raising=False)
    load_library.cache_clear()
    yield monkeypatch
    load_library.cache_clear()


@pytest.fixture
def abi_library(tmp_path: Path) -> Callable[[int], Path]:
    """Makes a library that says it is of this version."""

    def make(version: int) -> Path:
        options = tiny(tmp_path / f"v{version}")
        (options.sources / "answer.cpp").write_text(
            f"{EXPORTED}tps_abi_version() {{ return {version}; }}\n"
        )
        build(options)
        return options.library

    return make


@needs_compiler
def test_the_environment_can_name_another_library(
    environment: pytest.MonkeyPatch, abi_library: Callable[[int], Path]
) -> None:
    path = abi_library(ABI_VERSION)
    environment.setenv("TPSERVE_NATIVE_LIBRARY", str(path))
    library = load_library()
    assert library is not None
    assert library._name == str(path)
    assert load_library() is library


@needs_compiler
def test_a_library_of_another_version_is_refused(
    environment: pytest.MonkeyPatch, abi_library: Callable[[int], Path]
) -> None:
    environment.setenv("TPSERVE_NATIVE_LIBRARY", str(abi_library(ABI_VERSION + 1)))
    with pytest.raises(
        ConfigError, match=f"has version {ABI_VERSION + 1}, needed is {ABI_VERSION}"
    ):
        load_library()


@needs_compiler
def test_a_library_of_something_else_is_refused(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = tiny(tmp_path)
    build(options)
    environment.setenv("TPSERVE_NATIVE_LIBRARY", str(options.library))
    with pytest.raises(ConfigError, match="tps_abi_version"):
        load_library()


def test_a_named_library_that_is_missing_or_none_is_refused(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "some.so"
    environment.setenv("TPSERVE_NATIVE_LIBRARY", str(path))
    with pytest.raises(ConfigError, match=r"is missing: .*some\.so"):
        load_library()
    path.write_text("no library")
    with pytest.raises(ConfigError, match="cannot be used"):
        load_library()


def test_torch_kernels_can_be_asked_for(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("TPSERVE_KERNELS", "torch")
    environment.setenv("TPSERVE_NATIVE_LIBRARY", "/nonexistent")
    assert load_library() is None


def test_an_unknown_choice_of_kernels_is_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("TPSERVE_KERNELS", "fast")
    with pytest.raises(ConfigError, match="TPSERVE_KERNELS is 'fast'; it can be native or torch"):
        load_library()


@pytest.fixture
def working_tree(tmp_path: Path) -> Path:
    """A copy of the loader, the build and the errors, with a source and no library yet."""
    (tmp_path / "shared").mkdir()
    shutil.copy(ROOT / "shared/errors.py", tmp_path / "shared/errors.py")
    tiny(tmp_path / "worker/native")
    (tmp_path / "worker/native/answer.cpp").write_text(
        f"{EXPORTED}tps_abi_version() {{ return {ABI_VERSION}; }}\n"
    )
    for name in PYTHON_FILES:
        shutil.copy(SOURCES / name, tmp_path / "worker/native" / name)
    return tmp_path


def load_in(working_tree: Path, **env: str) -> str:
    """What load_library returns there, or the error it raises."""
    code = "from worker.native.library import load_library; print(load_library())"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TPSERVE_")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=working_tree, env=inherited | env, capture_output=True, text=True
    )
    return done.stdout.strip() or done.stderr.splitlines()[-1]


def test_no_library_means_torch_kernels_unless_native_ones_are_asked_for(
    working_tree: Path,
) -> None:
    assert load_in(working_tree) == "None"
    error = load_in(working_tree, TPSERVE_KERNELS="native")
    assert error.startswith("shared.errors.ConfigError: TPSERVE_KERNELS is native, but there is no")


@needs_compiler
def test_a_library_made_from_other_sources_is_not_loaded(working_tree: Path) -> None:
    native = working_tree / "worker/native"
    options = Options(native, native / "libtpserve.so")
    assert run_build(options, project=working_tree)[0] == 0
    assert load_in(working_tree).startswith("<CDLL")
    (native / "answer.h").write_text("#define ANSWER 3\n")
    assert "was made from other sources than those beside it" in load_in(working_tree)
    assert run_build(options, project=working_tree)[0] == 0
    assert load_in(working_tree).startswith("<CDLL")


# --- the real one ---------------------------------------------------------------------------------


def disassemble(library: Path, *options: str) -> str:
    command = ["objdump", "--disassemble", "--no-show-raw-insn", *options, str(library)]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


@needs_objdump
@only_x86
@pytest.mark.skipif(not LIBRARY.exists(), reason="the native library is not built")
@pytest.mark.parametrize("instruction", ["vpdpbusd", "vdpbf16ps", "tdpbf16ps"])
def test_kernels_use_the_dot_product_instructions(instruction: str) -> None:
    assert instruction in disassemble(LIBRARY)
