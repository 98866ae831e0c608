"""Builds the native library libtpserve.so from the C++ sources beside this file.

    python -m worker.native.build                       # beside the sources; launch.sh does this
    python -m worker.native.build --sanitize thread     # build/native-thread/libtpserve.so
    python -m worker.native.build --target aarch64      # build/native-aarch64/libtpserve.so

kernels.cpp is compiled once for each level of vector instructions, every other source once for the
oldest machine of the architecture; which level runs is decided at run time. Beside the library stand
its stamp, which says what it was made from (equal stamp: nothing to do; scripts/native.sh compares it
without starting Python), and a log with what the compiler said.

Imports nothing but toolchain.py and the standard library: the making of a wheel comes here before
anything is installed.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from worker.native.toolchain import (
    COMPILE,
    LEVELS,
    LINK,
    LINK_RELEASE,
    LINK_STATIC,
    SCALAR_ONLY,
    CommandLog,
    Compiler,
    Levels,
    describe_missing_compiler,
    find_compiler,
    optimisation,
)

SOURCES = Path(__file__).resolve().parent
LIBRARY = SOURCES / "libtpserve.so"
OTHER_BUILDS = SOURCES.parent.parent / "build"
"""Where builds go that are not the one the server loads."""

KERNELS = "kernels.cpp"

WITHOUT_LIBRARY = (
    "until then the server runs on torch's kernels: slower, without int8 and int4 weights, and "
    "results are not the same to the bit"
)


class BuildError(Exception):
    """There is no library; the text is one line that says why and what to do."""

    exit_status = 1


class NoCompilerError(BuildError):
    """The machine has no C++ compiler."""

    exit_status = 3


@dataclass(frozen=True)
class Options:
    """What to build from which folder; `levels` None: all that the compiler can do."""

    sources: Path = SOURCES
    library: Path = LIBRARY
    machine: str = os.uname().machine
    levels: tuple[str, ...] | None = None
    sanitizers: tuple[str, ...] = ()

    @property
    def stamp(self) -> Path:
        """The file that says what the library was made from."""
        return self.library.with_suffix(".stamp")

    @property
    def log(self) -> Path:
        """The file with the compiler's commands and what it said."""
        return self.library.with_suffix(".log")

    @property
    def is_cross(self) -> bool:
        """Is the library for another kind of machine than this one?"""
        return self.machine != os.uname().machine


@dataclass(frozen=True)
class _Unit:
    """One run of the compiler: a source, the name of its object, and the flags that are its own."""

    source: Path
    name: str
    flags: Sequence[str]


# --- what a library is made from ------------------------------------------------------------------


def describe_inputs(options: Options) -> str:
    """All that the library depends on but the compiler: lines of text, the last ones `sha256  file`.

    scripts/native.sh writes the same lines for a build without options.
    """
    kind = ["release" if not options.sanitizers else "+".join(options.sanitizers), options.machine]
    if options.levels is not None:
        kind += options.levels
    lines = ["build " + " ".join(kind)]
    build_code = [SOURCES / "build.py", SOURCES / "toolchain.py"]
    for path in build_code + _files(options.sources, ".cpp") + _files(options.sources, ".h"):
        lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}")
    return "\n".join(lines) + "\n"


def is_current(options: Options, compiler: Compiler | None = None) -> bool:
    """Was the library that is there made from these inputs, and by `compiler` if one is given?"""
    if not options.library.is_file() or not options.stamp.is_file():
        return False
    made_by, _, made_from = options.stamp.read_text(errors="replace").partition("\n")
    if compiler is not None and made_by != f"compiler {compiler.version}":
        return False
    return made_from == describe_inputs(options)


def _files(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.glob(f"*{suffix}"))


# --- building -------------------------------------------------------------------------------------


def build(options: Options, force: bool = False) -> bool:
    """Make the library unless it is current; True if it was made.

    The new library takes the place of the old one whole or not at all. When it cannot be made the
    old one is removed as well, as it is not what the sources say. Raises BuildError.
    """
    compiler = find_compiler(options.machine)
    if not force and is_current(options, compiler):
        return False
    with _lock(options):
        # Another build may have made it while this one waited.
        if not force and is_current(options, compiler):
            return False
        try:
            if compiler is None:
                raise NoCompilerError(describe_missing_compiler(options.machine))
            _build_anew(options, compiler)
        except BuildError:
            options.library.unlink(missing_ok=True)
            options.stamp.unlink(missing_ok=True)
            raise
    return True


def _build_anew(options: Options, compiler: Compiler) -> None:
    _say(f"compiling the native kernels ({compiler.version}) ...")
    # Taken before the sources are read: one that changes meanwhile makes the next build start.
    stamp = f"compiler {compiler.version}\n{describe_inputs(options)}"
    with (
        tempfile.TemporaryDirectory(prefix=_scratch_prefix(options), dir=_folder(options)) as name,
        CommandLog(options.log) as log,
    ):
        scratch = Path(name)
        made = scratch / options.library.name
        units = _units(options, _usable_levels(options, compiler, log))
        objects = _compile(options, compiler, units, scratch, log)
        _link(options, compiler, objects, made, log)
        new_stamp = scratch / options.stamp.name
        new_stamp.write_text(stamp)
        # Without a stamp in between: an interruption here must not pass for a finished build.
        options.stamp.unlink(missing_ok=True)
        made.replace(options.library)
        new_stamp.replace(options.stamp)


def _usable_levels(options: Options, compiler: Compiler, log: CommandLog) -> Levels:
    """The levels that are asked for; of all levels those whose flags the compiler knows."""
    known = LEVELS.get(options.machine, SCALAR_ONLY)
    asked = known if options.levels is None else options.levels
    if unknown := set(asked) - set(known):
        raise BuildError(
            f"no level {', '.join(sorted(unknown))} on {options.machine}; "
            f"there are {', '.join(known)}"
        )
    wanted = {level: flags for level, flags in known.items() if level in asked}
    probe = [*compiler.command, "-x", "c++", "-fsyntax-only", os.devnull]
    refused = [level for level, flags in wanted.items() if not log.run([*probe, *flags])]
    if refused and options.levels is not None:
        raise BuildError(f"{compiler.version} cannot compile for {', '.join(refused)}")
    return {level: flags for level, flags in wanted.items() if level not in refused}


def _units(options: Options, levels: Levels) -> list[_Unit]:
    """In the order in which the objects are to be linked.

    What several of them have in common (inline functions, templates) the linker takes from the first:
    it must be one that every machine can run.
    """
    sources = _files(options.sources, ".cpp")
    if not sources:
        raise BuildError(f"no C++ sources in {options.sources}")
    have = [f"-DTPS_HAVE_{level.upper()}=1" for level in levels]
    units = [_Unit(path, path.stem, have) for path in sources if path.name != KERNELS]
    kernels = options.sources / KERNELS
    if kernels in sources:
        units += [
            _Unit(kernels, f"kernels-{level}", [*flags, f"-DTPS_LEVEL={level}"])
            for level, flags in levels.items()
        ]
    return units


def _compile(
    options: Options, compiler: Compiler, units: Sequence[_Unit], scratch: Path, log: CommandLog
) -> list[Path]:
    """The objects, in the order of their units."""
    base = [*compiler.command, *COMPILE, *optimisation(options.sanitizers)]
    objects = [scratch / f"{unit.name}.o" for unit in units]
    commands = [
        [*base, *unit.flags, "-c", str(unit.source), "-o", str(made)]
        for unit, made in zip(units, objects, strict=True)
    ]
    if not log.run_all(commands):
        raise BuildError(f"they do not compile (the reason is in {options.log})")
    return objects


def _link(
    options: Options, compiler: Compiler, objects: Sequence[Path], made: Path, log: CommandLog
) -> None:
    command = [*compiler.command, *LINK, *optimisation(options.sanitizers), *map(str, objects)]
    command += ["-o", str(made)]
    if options.sanitizers:
        # A sanitizer's runtime stays outside: it must be the process's only one.
        linked = log.run(command)
    else:
        command += LINK_RELEASE
        linked = log.run([*command, *LINK_STATIC]) or log.run(command)
    if not linked:
        raise BuildError(f"they cannot be linked (the reason is in {options.log})")


# --- files --------------------------------------------------------------------------


@contextlib.contextmanager
def _lock(options: Options) -> Iterator[None]:
    """One build of a library at a time; a process that ends in whatever way gives the lock back."""
    with (_folder(options) / f"{options.library.stem}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another build of the native kernels is running; waiting for it ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        for abandoned in options.library.parent.glob(_scratch_prefix(options) + "*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        yield


def _folder(options: Options) -> Path:
    options.library.parent.mkdir(parents=True, exist_ok=True)
    return options.library.parent


def _scratch_prefix(options: Options) -> str:
    """Beside the library and not in /tmp, as a file can replace another only on its own disk."""
    return f"{options.library.stem}.build-"


def _say(text: str) -> None:
    print(f"tpserve: {text}", file=sys.stderr, flush=True)


# --- the command ----------------------------------------------------------------------------------


def parse_options(arguments: Sequence[str] | None = None) -> tuple[Options, bool]:
    """The command line as (what to build, build it even if it is current)."""
    parser = argparse.ArgumentParser(
        prog="python -m worker.native.build",
        description="Build the native kernel library unless it is already made from these sources.",
        epilog="Exit status: 0 the library is there, 1 it could not be made, 3 no C++ compiler.",
    )
    parser.add_argument("--force", action="store_true", help="build even if nothing has changed")
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="the library's file (default: beside the sources)"
    )
    parser.add_argument(
        "--sources", type=Path, default=SOURCES, metavar="FOLDER", help="the C++ sources"
    )
    parser.add_argument(
        "--level", nargs="+", metavar="NAME", help="only these levels of vector instructions"
    )
    parser.add_argument(
        "--sanitize", default="", metavar="NAME[,NAME]", help="address,undefined or thread"
    )
    parser.add_argument(
        "--target", choices=sorted(LEVELS), default=os.uname().machine, help="for another machine"
    )
    given = parser.parse_args(arguments)
    options = Options(
        sources=given.sources.resolve(),
        library=given.sources.resolve() / LIBRARY.name,
        machine=given.target,
        levels=tuple(given.level) if given.level else None,
        sanitizers=tuple(name for name in given.sanitize.split(",") if name),
    )
    if given.out is not None:
        options = replace(options, library=given.out.resolve())
    elif variant := _variant(options):
        options = replace(options, library=OTHER_BUILDS / f"native-{variant}" / LIBRARY.name)
    return options, given.force


def _variant(options: Options) -> str:
    """A name for a build that differs from the server's; "" for that one itself."""
    target = [options.machine] if options.is_cross else []
    return "-".join([*target, *options.sanitizers, *(options.levels or ())])


def main() -> int:
    """Build as the command line says; the exit status."""
    options, force = parse_options()
    try:
        build(options, force)
    except (BuildError, OSError) as error:
        consequence = "" if _variant(options) else f"; {WITHOUT_LIBRARY}"
        _say(f"native kernels: {error}{consequence}")
        return error.exit_status if isinstance(error, BuildError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
