"""The native library under sanitizers, which watch every memory access it makes.

The library is built for them in build/ (again only when its sources change) and loaded by a Python
that has their runtime. Run as a program, this file is what such a Python does:

    test_native_sanitized.py overflow|leaks|threads|race FOLDER
"""

import ctypes
import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from shared.worker_messages import SequenceStep
from tests.worker.native_ranks import (
    BLOCKS_PER_TEXT,
    GREEDY,
    Model,
    Piece,
    Setting,
    Shape,
    Texts,
    chunks,
    logits_of,
    write_checkpoint,
)
from tests.worker.rank_threads import run_ranks
from tests.worker.test_head import COUNT, ROWS, Head, request, weights
from worker.comm.base import Communicator
from worker.native.api import isa_of, native_library
from worker.native.build import build, parse_options
from worker.native.sampling import Wanted
from worker.native.toolchain import Compiler, find_compiler

PROJECT = Path(__file__).resolve().parents[2]
DEADLINE_S = 280
TSAN_FOUND_A_RACE = 66
COMPILER = find_compiler(os.uname().machine)


@dataclass(frozen=True)
class Sanitized:
    """A library, and what starts a Python that can load it."""

    library: Path
    command: tuple[str, ...]
    environment: dict[str, str]

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *arguments],
            cwd=PROJECT,
            env=os.environ | self.environment | {"TPSERVE_NATIVE_LIBRARY": str(self.library)},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )

    def run_this(self, work: str, folder: Path) -> subprocess.CompletedProcess[str]:
        return self.run(__file__, work, folder)


def make_sanitized(
    compiler: Compiler, sanitizers: str, levels: Sequence[str], runtimes: Sequence[str]
) -> Path:
    """The library for these sanitizers. Skips the test where the compiler has no such runtimes."""
    for name in runtimes:
        if not runtime(compiler, name).is_file():
            pytest.skip(f"{compiler.version} has no {name}")
    options, _ = parse_options(["--sanitize", sanitizers, "--level", *levels])
    build(options)
    return options.library


def runtime(compiler: Compiler, name: str) -> Path:
    """A library of the compiler; its bare name where there is none."""
    command = [*compiler.command, f"-print-file-name={name}"]
    return Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())


@pytest.fixture(scope="module")
def with_asan() -> Sanitized:
    """Address and undefined behaviour, on the best level and on that of plain arrays."""
    library = native_library()
    if COMPILER is None or library is None:
        pytest.skip("there is no C++ compiler (apt install g++)")
    runtimes = ["libasan.so", "libubsan.so"]
    levels = sorted({"scalar", isa_of(library)})
    # libstdc++ as well: the sanitizer looks for its functions before anything else has loaded it.
    preload = [str(runtime(COMPILER, name)) for name in (*runtimes, "libstdc++.so.6")]
    return Sanitized(
        make_sanitized(COMPILER, "address,undefined", levels, runtimes),
        (sys.executable,),
        {
            "LD_PRELOAD": " ".join(preload),
            # Python never gives back all it has; leaks are looked for in another way.
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": str(PROJECT),
        },
    )


@pytest.fixture(scope="module")
def with_tsan() -> Sanitized:
    """Data races; plain arrays, which race like all others and compile fast."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler (apt install g++)")
    library = make_sanitized(COMPILER, "thread", ["scalar"], ["libtsan.so"])
    environment = {
        "LD_PRELOAD": str(runtime(COMPILER, "libtsan.so")),
        # What Python and its modules do among themselves is not looked at.
        "TSAN_OPTIONS": f"ignore_noninstrumented_modules=1 exitcode={TSAN_FOUND_A_RACE}",
        "PYTHONPATH": str(PROJECT),
    }
    # Its memory map has no room for the most random addresses of new kernels.
    fixed_addresses = shutil.which("setarch")
    for prefix in ([fixed_addresses, "-R"] if fixed_addresses else [], []):
        sanitized = Sanitized(library, (*prefix, sys.executable), environment)
        tried = sanitized.run("-c", "")
        if tried.returncode == 0:
            return sanitized
    pytest.skip(f"Python does not run under the thread sanitizer here: {tried.stderr[-200:]}")


pytestmark = pytest.mark.slow


def test_no_kernel_touches_what_is_not_its_own(with_asan: Sanitized) -> None:
    tests = [
        f"tests/worker/{name}.py" for name in ("test_kernels", "test_one_arithmetic", "test_head")
    ]
    chosen = "accuracy or empty or gone or window and int8 or tells or sampler_chooses"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    run = with_asan.run("-m", "pytest", *options, *tests)
    assert run.returncode == 0, (run.stdout + run.stderr)[-5000:]


def test_an_access_beyond_the_end_would_be_seen(with_asan: Sanitized, tmp_path: Path) -> None:
    run = with_asan.run_this("overflow", tmp_path)
    assert run.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in run.stderr


def test_a_model_gives_all_its_memory_back(with_asan: Sanitized, tmp_path: Path) -> None:
    run = with_asan.run_this("leaks", tmp_path)
    assert run.returncode == 0, run.stderr[-5000:]
    one_model, left_by_five = (int(number) for number in run.stdout.split())
    assert one_model > 1 << 20, "not seen by the sanitizer"
    assert left_by_five < one_model / 20


def test_threads_and_ranks_never_race(with_tsan: Sanitized, tmp_path: Path) -> None:
    run = with_tsan.run_this("threads", tmp_path)
    assert run.returncode == 0, (run.stdout + run.stderr)[-5000:]


def test_a_race_would_be_seen(with_tsan: Sanitized, tmp_path: Path) -> None:
    run = with_tsan.run_this("race", tmp_path)
    assert run.returncode == TSAN_FOUND_A_RACE
    assert "data race" in run.stderr


# --- as a program ---------------------------------------------------------------------------------

TINY = Shape(64, 96, 3, 1, 16)
TEXTS = Texts(100, spoiler=99)


def overflow(folder: Path) -> None:
    """Copies a KV block that is not there."""
    model = Model(write_checkpoint(folder, TINY))

    def job(comm: Communicator, owned: list[range]) -> None:
        model.load(comm, owned, threads=1, blocks=4).copy_block(1, 4)

    run_ranks(1, job)


def leaks(folder: Path) -> None:
    """Prints bytes: what one model takes, and what is left after five more have come and gone."""
    allocated = ctypes.CDLL(None).__sanitizer_get_current_allocated_bytes
    allocated.restype = ctypes.c_size_t
    model = Model(write_checkpoint(folder, Shape(256, 512, 8, 8, 32)), "int8", "int8")
    sizes: list[int] = []
    step = SequenceStep(0, 0, TEXTS[0][:60], bytes(4 * BLOCKS_PER_TEXT), GREEDY)

    def job(comm: Communicator, owned: list[range]) -> None:
        ops = model.load(comm, owned, threads=2, blocks=BLOCKS_PER_TEXT)
        ops.run([step], np.zeros(1, np.int64))
        sizes.append(allocated())

    def come_and_go() -> int:
        run_ranks(1, job)
        gc.collect()
        return int(allocated())

    come_and_go()  # what is imported and remembered with the first
    before = come_and_go()
    one_model = sizes[-1] - before
    for _ in range(5):
        after = come_and_go()
    print(one_model, max(0, after - before))


def threads(folder: Path) -> None:
    """All that threads and ranks do together, with prompts, batches and copied blocks."""
    steps = [*chunks(0, 7, 20, 21), [Piece(1, 0, 3), Piece(0, 21, 22), Piece(2, 0, 1)]]
    checkpoint = write_checkpoint(folder / "model", TINY)
    for model in (Model(checkpoint, "fp32"), Model(checkpoint, "int8", "int8")):
        for setting in (Setting(1, 2), Setting(2, 2, "shm"), Setting(3, 1, "shm")):
            for _ in range(3):
                logits_of(model, TEXTS, [steps], setting, folder)
    for world in (1, 2):
        run_ranks(world, ask_the_head)


def ask_the_head(comm: Communicator, owned: list[range]) -> None:
    """Every kind of answer, put together from what two threads find."""
    head = Head(comm, owned, weights(5003), threads=2)
    wanted = Wanted.of([request(row) for row in range(ROWS)], COUNT)
    for _ in range(3):
        head.run(range(ROWS), wanted).made_whole(range(ROWS))


def race(folder: Path) -> None:
    """Two threads run one model's steps at once, which they must not."""
    model = Model(write_checkpoint(folder, TINY))

    def job(comm: Communicator, owned: list[range]) -> None:
        ops = model.load(comm, owned, threads=1, blocks=BLOCKS_PER_TEXT)
        table = np.arange(BLOCKS_PER_TEXT, dtype="<i4").tobytes()
        step = SequenceStep(0, 0, TEXTS[0][:60], table, None)

        def run() -> None:
            for _ in range(2):
                ops.run([step], np.zeros(1, np.int64))

        both = [threading.Thread(target=run) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()

    run_ranks(1, job)


if __name__ == "__main__":
    work = {"overflow": overflow, "leaks": leaks, "threads": threads, "race": race}
    work[sys.argv[1]](Path(sys.argv[2]))
