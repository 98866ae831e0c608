"""`tpserve bench`: one worker against many, measured through running servers as a client sees them."""

import argparse
import datetime
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from benchmarks.scaling.grid import Comm, Request
from benchmarks.scaling.random_model import SHAPES, random_checkpoint
from benchmarks.scaling.record import FILE_NAME, Record, load
from benchmarks.scaling.run import begin, carry_on, check_can_go_on, with_rounds, write_reports
from coordinator.machine import cache_folder
from shared.config import PROJECT_ROOT
from shared.errors import ConfigError, TpserveError
from shared.hub import resolve_model
from shared.messages import Precision
from shared.model_config import read_model_config

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
MOST = 1 << 16
DEMO = PROJECT_ROOT / "models" / "demo-story"
AUTO = 0

SIZES: dict[str, dict[str, Any]] = {
    "quick": {
        "threads": [1],
        "dtype": ["auto"],
        "batch": [1],
        "prompt": [128],
        "rounds": 2,
    },
    "usual": {
        "threads": [1, AUTO],
        "dtype": ["auto", "int8"],
        "batch": [1, 8],
        "prompt": [128],
        "rounds": 3,
    },
    "full": {
        "threads": [1, AUTO],
        "dtype": ["fp32", "bf16", "int8", "int4"],
        "batch": [1, 8, 32],
        "prompt": [128, 512, 1500],
        "rounds": 5,
    },
}


def main() -> int:
    """Entry of the command; the exit code. Usage errors exit with 2."""
    parser = argument_parser()
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers are to end with it
    folder = (
        args.resume or args.out or Path(f"tpserve-bench-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    )
    try:
        if args.resume:
            record = _resumed(args)
        else:
            record = begin(make_request(args), measure=args.size != "quick")
            _make_folder(folder)
            record.save(folder)
        carry_on(record, folder)
        print(write_reports(record, folder))
    except TpserveError as error:
        print(f"tpserve bench: error: {error.message}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        if (folder / FILE_NAME).exists():
            print(f"\nto go on: tpserve bench --resume {folder}", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"written: {folder}/bench.md, bench.csv, {FILE_NAME}, 4 pictures", file=sys.stderr)
    return 0


def argument_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = argparse.ArgumentParser(
        prog="tpserve bench",
        description="Measure a model with one worker and with many, in turns, through running servers:"
        " reading and writing speed, latency, where the time goes, memory. Writes Markdown, CSV,"
        " JSON and pictures.",
        epilog="Numbers by comma: --workers 1,2,4.",
        allow_abbrev=False,
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder, or ORG/NAME of the hub (default: the bundled demo model)",
    )
    model.add_argument(
        "--random", choices=SHAPES, help="random weights in this model's shape; no download"
    )
    model.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on with the run whose results are there"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick",
        dest="size",
        action="store_const",
        const="quick",
        help="less than a minute; with earlier measurements of the machine",
    )
    size.add_argument(
        "--full", dest="size", action="store_const", const="full", help="all precisions and lengths"
    )
    parser.set_defaults(size="usual")
    numbers = _listed(_number)
    parser.add_argument(
        "--workers", type=numbers, help="(1, 2, 4 ... up to the cores, and 2 at least)"
    )
    parser.add_argument(
        "--threads", type=_listed(_threads), help="of a worker; auto: cores / workers"
    )
    parser.add_argument("--dtype", type=_listed(_one_of("auto", *get_args(Precision))))
    parser.add_argument("--comm", type=_listed(_one_of(*get_args(Comm))), default=["shm"])
    parser.add_argument("--batch", type=numbers, help="streams at once")
    parser.add_argument("--prompt", type=numbers, help="tokens of prompts")
    parser.add_argument("--tokens", type=_number, default=64, help="each stream writes (64)")
    parser.add_argument("--rounds", type=_number, help="turns of each configuration")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and random weights")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(tpserve-bench-DATE)")
    return parser


def make_request(args: argparse.Namespace) -> Request:
    """What the flags ask for. Raises TpserveError."""
    if args.random:
        folder = random_checkpoint(
            args.random, cache_folder() / "random" / f"{args.random}-{args.seed}", args.seed
        )
    else:
        folder = resolve_model(args.model, offline=False) if args.model else DEMO
    size = SIZES[args.size]
    config = read_model_config(folder)
    dtypes: list[Any] = args.dtype or size["dtype"]
    return Request(
        model=str(folder.resolve()),
        workers=args.workers or usual_workers(len(os.sched_getaffinity(0))),
        threads=args.threads or size["threads"],
        dtypes=[*dict.fromkeys(config.dtype if d == "auto" else d for d in dtypes)],
        comms=args.comm,
        streams=args.batch or size["batch"],
        prompts=args.prompt or size["prompt"],
        tokens=args.tokens,
        rounds=args.rounds or size["rounds"],
        seed=args.seed,
    )


def usual_workers(cores: int) -> list[int]:
    """Powers of two up to the cores, and 2 at least; a model has 8 virtual shards."""
    return [count for count in (1, 2, 4, 8) if count <= max(2, cores)]


def _resumed(args: argparse.Namespace) -> Record:
    record = load(args.resume)
    check_can_go_on(record)
    return with_rounds(record, args.rounds) if args.rounds else record


def _make_folder(folder: Path) -> None:
    if (folder / FILE_NAME).exists():
        raise ConfigError(
            f"--out {folder} has the results of a run: go on with --resume {folder}, or name another"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be made: {error.strerror}") from None


def _listed(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def read(text: str) -> list[Any]:
        return [*dict.fromkeys(one(part.strip()) for part in text.split(","))]

    return read


def _number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 1 and {MOST}")
    return int(text)


def _threads(text: str) -> int:
    return AUTO if text == "auto" else _number(text)


def _one_of(*names: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return read


if __name__ == "__main__":
    sys.exit(main())
