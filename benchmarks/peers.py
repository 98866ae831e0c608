"""tpserve beside llama.cpp, OpenVINO GenAI, vLLM and transformers, in turns on the same machine.

    python benchmarks/peers.py [--only decode,batch,serving,story] [--dtypes int4,int8,bf16] [--rounds 4]
                               [--json FILE] [--report FILE.md] [--prepare | --measure]

It first makes what it needs and does not find under build/ - installs and compiles the peers, converts
models - which takes half an hour once. --prepare does only that; --measure leaves peers out that are
not there.

Every number of tpserve is one that a client of a running server sees; every number of a peer comes
from a process of its own (peer_llama_cpp.py, peer_openvino.py, peer_vllm.py, peer_transformers.py)
with as many threads as tpserve has. All that is compared takes turns. Prints Markdown; --report writes the same,
with a picture beside it. --json keeps every sample after each part; with a file that is already
there, parts that it has are not measured again.

    decode    batch 1 in each precision: against llama.cpp, one worker against two, and against
              reading as many bytes as a step has weights without computing anything
    batch     int8 and bf16: 8 and 32 streams, prompts of 128 and 512 tokens
    serving   servers over HTTP: 1, 8 and 32 users, who send prompts of their own at once
    story     a model so small that fixed costs decide: one stream and 32

What llama.cpp does in a plain loop over its C interface is what its bindings and its server can do
at best, so decode and batch compare with that; story has its Python binding too, serving its server.
"""

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from benchmarks import peer_files  # noqa: E402 - runnable without being installed
from benchmarks.interleaved import Part  # noqa: E402
from benchmarks.machine import Fact, commit, describe_machine  # noqa: E402
from benchmarks.peer_files import CACHE, Peers, PrepareError  # noqa: E402
from benchmarks.peer_parts import PRECISIONS, Bench, batch, decode, story  # noqa: E402
from benchmarks.peer_report import read_report  # noqa: E402
from benchmarks.peer_serving import serving  # noqa: E402
from worker.native.toolchain import find_compiler  # noqa: E402

SHAPE = "tinyllama-1.1b"
STORY_SHAPE = "tinystories-656k"
PARTS: Mapping[str, Callable[[Bench], Iterator[Part]]] = {
    "decode": decode,
    "batch": batch,
    "serving": serving,
    "story": story,
}


def describe_peers(peers: Peers) -> list[Fact]:
    """Which versions, and who is missing."""
    return [
        Fact(name, peer.version if peer else "not installed: left out")
        for name, peer in peers.by_name().items()
    ]


def describe_model(folder: Path) -> str:
    """Its name, and whether its weights are random."""
    return f"{folder.name}, random weights" if CACHE in folder.parents else folder.name


def compile_memory_speed(folder: Path) -> Path | None:
    """The program that reads memory, for this machine."""
    compiler = find_compiler(os.uname().machine)
    if compiler is None:
        print("no C++ compiler: nothing is compared with reading memory", file=sys.stderr)
        return None
    program = folder / "memory_speed"
    source = Path(__file__).with_name("memory_speed.cpp")
    flags = ["-std=c++17", "-O3", "-march=native"]
    subprocess.run([*compiler.command, *flags, source, "-o", program], check=True)
    return program


def prepare(model: Path, story: Path, dtypes: tuple[str, ...]) -> None:
    """Make everything that `measure` needs, as far as it is missing."""
    peer_files.prepare_environments()
    peers = peer_files.find_peers()
    if peers.llama_cpp:
        peer_files.gguf(peers.llama_cpp, story, "f32")
        for dtype in dtypes:
            peer_files.gguf(peers.llama_cpp, model, PRECISIONS[dtype].gguf)
    if peers.openvino:
        peer_files.openvino_model(peers.openvino, model)


def measure(options: argparse.Namespace) -> None:
    """All parts that are wanted and not there yet; each is kept as soon as it is there."""
    began = time.monotonic()
    peers = peer_files.find_peers()
    facts = [*describe_machine(), *describe_peers(peers)]
    facts += [
        Fact("model", describe_model(options.model)),
        Fact("story model", describe_model(options.story)),
    ]
    facts += [
        Fact("tpserve", f"{version('tpserve')}, commit {commit() or 'unknown'}"),
        Fact("date", f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d} UTC"),
        Fact("rounds", str(options.rounds)),
    ]
    report = read_report(options.json, dict(facts))
    print("\n".join(f"- {name}: {value}" for name, value in report.facts.items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            peers=peers,
            model=options.model,
            story=options.story,
            memory_speed=compile_memory_speed(Path(folder)),
            rounds=options.rounds,
            dtypes=options.dtypes,
        )
        for name in options.only:
            for part in report.parts_of(name, partial(PARTS[name], bench)):
                print(f"\n{part.markdown}", flush=True)
            if options.json:
                report.save(options.json)
    print(f"\n{options.rounds} rounds, {(time.monotonic() - began) / 60:.1f} minutes.")
    if options.report:
        report.write(options.report)


def _names(text: str, known: Collection[str]) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return names


def _parts(text: str) -> tuple[str, ...]:
    return _names(text, PARTS)


def _dtypes(text: str) -> tuple[str, ...]:
    return _names(text, PRECISIONS)


def main() -> None:
    """Prepare or measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--prepare", action="store_true", help="install and convert, then exit")
    steps.add_argument("--measure", action="store_true", help="only with what is there")
    parser.add_argument(
        "--only", type=_parts, default=tuple(PARTS), help=f"of {','.join(PARTS)}, by comma"
    )
    parser.add_argument(
        "--dtypes", type=_dtypes, default=tuple(PRECISIONS), help="of decode, by comma"
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--model", type=Path, help=f"a checkpoint ({SHAPE}'s shape, random)")
    parser.add_argument("--story", type=Path, help=f"a small one ({STORY_SHAPE}'s shape, random)")
    parser.add_argument("--json", type=Path, help="a file for all samples")
    parser.add_argument(
        "--report", type=Path, help="a file for the tables; a picture goes beside it"
    )
    options = parser.parse_args()
    options.model = options.model or peer_files.random_weights(SHAPE)
    options.story = options.story or peer_files.random_weights(STORY_SHAPE)
    try:
        if options.prepare:
            os.nice(19)  # compiling takes many minutes, and somebody else may be using the machine
            prepare(options.model, options.story, options.dtypes)
        else:
            if not options.measure:
                # In a process of its own: what is measured afterwards must not be as nice.
                subprocess.run([sys.executable, __file__, *sys.argv[1:], "--prepare"], check=True)
            measure(options)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # it has said why
    except PrepareError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
