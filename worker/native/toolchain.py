"""The C++ compiler: which one, with which flags, and how it is run. Knows nothing of the sources.

Like build.py it imports only the standard library.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

COMPILERS = ("c++", "g++", "clang++")
"""Tried in this order, unless the environment's CXX names one."""
COMPILE = ["-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-math-errno"]
COMPILE += ["-Wall", "-Wextra", "-Werror=return-type"]
# The same bits on every machine: no fused multiply-add but where the source asks for one.
COMPILE += ["-ffp-contract=off"]
RELEASE = ["-O3"]
SANITIZED = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
LINK = ["-shared", "-fPIC", "-pthread"]
# A symbol nobody defines is to fail here and not at the start of the server, and one that is defined
# here is not to be mistaken for another library's of the same name.
LINK_RELEASE = ["-Wl,-z,defs", "-Wl,-Bsymbolic"]
# Runs where libstdc++ is older or missing, and keeps its copy apart from the one torch has loaded.
LINK_STATIC = ["-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"]

_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *_AVX2]
_AVX512_BF16 = [*_AVX512, "-mavx512vnni", "-mavx512bf16"]
Levels = Mapping[str, Sequence[str]]
"""Compiler flags by level of vector instructions, the level that needs least first."""
LEVELS: Mapping[str, Levels] = {
    "x86_64": {
        "scalar": [],
        "avx2": _AVX2,
        "avxvnni": [*_AVX2, "-mavxvnni"],
        "avx512": _AVX512,
        "avx512vnni": [*_AVX512, "-mavx512vnni"],
        "avx512bf16": _AVX512_BF16,
        "amx": [*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
    },
    "aarch64": {"scalar": [], "neon": ["-march=armv8.2-a+dotprod+fp16"]},
}
SCALAR_ONLY: Levels = {"scalar": []}
"""What other architectures get."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command's words, and the first line of what --version prints."""

    command: tuple[str, ...]
    version: str


def find_compiler(machine: str) -> Compiler | None:
    """The C++ compiler to use, or None where there is none that runs."""
    for name in _compiler_names(machine):
        command = tuple(name.split())
        if shutil.which(command[0]) is not None:
            shown = subprocess.run([*command, "--version"], capture_output=True, text=True)
            if shown.returncode == 0 and shown.stdout:
                return Compiler(command, shown.stdout.splitlines()[0])
    return None


def _compiler_names(machine: str) -> Sequence[str]:
    if _is_cross(machine):
        return [f"{machine}-linux-gnu-g++"]
    chosen = os.environ.get("CXX", "").strip()
    return [chosen] if chosen else COMPILERS


def describe_missing_compiler(machine: str) -> str:
    """What find_compiler looked for in vain, and what to install."""
    names = _compiler_names(machine)
    package = f"g++-{machine}-linux-gnu" if _is_cross(machine) else "g++"
    what = f"none of {', '.join(names)} is there" if len(names) > 1 else f"{names[0]} does not run"
    return f"no C++ compiler: {what} (apt install {package})"


def _is_cross(machine: str) -> bool:
    return machine != os.uname().machine


def optimisation(sanitizers: Sequence[str]) -> list[str]:
    """The flags to compile and to link with that decide how fast and how well watched the code is."""
    if not sanitizers:
        return RELEASE
    return [*SANITIZED, "-fsanitize=" + ",".join(sanitizers)]


class CommandLog:
    """Runs commands and writes down each with what it said."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def run(self, command: Sequence[str]) -> bool:
        """Did it succeed?"""
        return self.run_all([command])

    def run_all(self, commands: Sequence[Sequence[str]]) -> bool:
        """As many at once as there are cores. Did all succeed?"""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            runs = [pool.submit(_run, command) for command in commands]
            try:
                finished = [run.result() for run in runs]
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for command, done in zip(commands, finished, strict=True):
            self._file.write(f"$ {shlex.join(command)}\n{done.stdout}")
            if done.returncode:
                self._file.write(f"exit status {done.returncode}\n")
        self._file.flush()
        return not any(done.returncode for done in finished)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ | {"LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
