"""`tpserve compare`: the accuracy of one precision against another on a model folder.

Loads the model once for each precision, one after the other, and gives each the same text.
"""

import argparse
import gc
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import msgspec
import torch

from shared.errors import ConfigError, TpserveError
from shared.hub import resolve_model
from shared.messages import KVPrecision, Precision
from shared.model_config import read_model_config
from shared.precision import kv_precision
from worker.comm.device import Accelerator, Alone
from worker.compare.measures import Comparison, Reference, comparison, difference, perplexity
from worker.compare.observe import Observed, observe
from worker.compare.report import report
from worker.compare.text import Text, read_text
from worker.device import describe as describe_device
from worker.device import device_of
from worker.native.api import Pool, native_library
from worker.ops.choose import describe, device_kernels
from worker.ops.native import why_not_native

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
MAX_THREADS = 1024


def main() -> int:
    """Entry of the command; the exit code. Usage errors exit with 2."""
    args = argument_parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        # What would be known too late: after minutes of computing.
        if args.plot is not None and not args.plot.absolute().parent.is_dir():
            raise ConfigError(f"--plot {args.plot}: there is no folder {args.plot.parent}")
        result = compare(
            resolve_model(args.model, offline=False),
            [*dict.fromkeys(args.dtype)],
            args.against,
            args.kv_dtype,
            args.threads,
            args.text,
            args.max_tokens,
            args.device,
        )
        print(msgspec.json.encode(result).decode() if args.json else report(result), flush=True)
        if args.plot is not None:
            # It takes a second to import, for the few who want a picture.
            from worker.compare.plot import plot

            plot(result, args.plot)
    except TpserveError as error:
        print(f"tpserve compare: error: {error.message}", file=sys.stderr)
        return EXIT_FAILED
    except MemoryError as error:
        print(f"tpserve compare: error: out of memory: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout again at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return 0


def compare(
    folder: Path,
    dtypes: Sequence[Precision],
    against: Precision,
    kv_dtype: KVPrecision | Literal["auto"],
    threads: int,
    text_file: Path | None = None,
    max_tokens: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Comparison:
    """Each of `dtypes` with `kv_dtype` against `against`, whose keys and values are as `auto` says.

    All on the CPU, or all on the first GPU.

    Raises ModelError, ConfigError, MemoryError.
    """
    config = read_model_config(folder)
    text = read_text(folder, config, text_file, max_tokens)
    torch.set_num_threads(threads)
    pool, accelerator = None, None
    library = native_library()
    if device == "cuda":
        accelerator = Accelerator(device_of(0, 1), Alone())
        name = device_kernels(accelerator.device, deterministic=False).name
        kernels = f"{name} on {describe_device(accelerator.device)}"
    else:
        kernels = describe(None if why_not_native(config) else library)
        pool = None if library is None else Pool(library, threads, crowded=False)
    reference = Reference(
        dtype=against, kv_dtype=kv_precision("auto", against), perplexity=float("nan")
    )
    theirs = _observed(folder, against, reference.kv_dtype, text, pool, accelerator)
    precisions = []
    for dtype in dtypes:
        kv = kv_precision(kv_dtype, dtype)
        ours = _observed(folder, dtype, kv, text, pool, accelerator)
        precisions.append(difference(ours, theirs, dtype, kv))
    return comparison(
        str(folder),
        kernels,
        text,
        msgspec.structs.replace(reference, perplexity=perplexity(theirs)),
        theirs.layers.shape[1],
        precisions,
    )


def argument_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = argparse.ArgumentParser(
        prog="tpserve compare",
        description="How far a precision is from another, on a text: relative L2 error after each "
        "layer, greedy tokens, perplexity. Needs no server.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of the model")
    parser.add_argument(
        "--dtype",
        choices=get_args(Precision),
        action="append",
        required=True,
        help="precision of the weights; repeatable",
    )
    parser.add_argument(
        "--against",
        choices=get_args(Precision),
        default="fp32",
        help="the reference (default: %(default)s), with keys and values as for --kv-dtype auto",
    )
    parser.add_argument(
        "--kv-dtype",
        choices=("auto", *get_args(KVPrecision)),
        default="auto",
        help="precision of keys and values of each --dtype; auto (default): the weights', "
        "bf16 if those are int8 or int4",
    )
    parser.add_argument(
        "--text", metavar="FILE", type=Path, help="text in UTF-8 (default: bundled stories)"
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, help="its first N tokens (default: all)"
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=_threads,
        default=len(os.sched_getaffinity(0)),
        help="compute threads (default: one for each core)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="what computes all of them; cuda: the first GPU (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="write a PNG of the error after each layer"
    )
    return parser


def _observed(
    folder: Path,
    dtype: Precision,
    kv_dtype: KVPrecision,
    text: Text,
    pool: Pool | None,
    accelerator: Accelerator | None,
) -> Observed:
    if sys.stderr.isatty():
        print(f"{dtype}: {text.positions} positions ...", file=sys.stderr)
    observed = observe(folder, dtype, kv_dtype, text, pool, accelerator)
    gc.collect()  # the model holds itself; the next one needs its memory
    return observed


def _threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_THREADS:
        raise argparse.ArgumentTypeError(f"{text} is not a number between 1 and {MAX_THREADS}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
