"""`tpserve plan MODEL`: memory on each worker and predicted speed, without reading any weights."""

import os
import sys
from collections.abc import Sequence

import msgspec

from coordinator.choose import DEPTH, STREAMS, Prediction, candidates, predict, settle
from coordinator.machine import machine
from coordinator.measured import Measured, recall
from coordinator.planner import PROCESS_BYTES, MemoryPlan, check_fits, plan_memory
from coordinator.served_model import ServedModel, open_model
from shared.config import AUTO_WORKERS, Settings, argument_parser, load_settings
from shared.errors import MemoryPlanError, TpserveError
from shared.memory import free_bytes

EXIT_DOES_NOT_FIT = 1
EXIT_USAGE = 2


def main() -> int:
    """Print the plan; 0 if it fits."""
    parser = argument_parser(
        "tpserve plan", "Print the memory that MODEL takes on each worker, and predicted speeds."
    )
    parser.add_argument("plan_model", metavar="MODEL", help="the model's folder")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--no-speed", action="store_true", help="memory only")
    speed.add_argument(
        "--measure", action="store_true", help="measure this machine again, not only the first time"
    )
    flags = parser.parse_args()
    try:
        path = flags.plan_model
        sourced = load_settings(flags, os.environ)
        asked = msgspec.structs.replace(sourced.settings, model={"model": path})
        settings = settle(msgspec.structs.replace(sourced, settings=asked))
        model = open_model("model", path, settings)
        plan = plan_memory(model.config, model.on_workers, settings)
        print(describe(plan))
        try:
            check_fits([plan], starting=True)
        except MemoryPlanError as error:
            print(f"does not fit. {error.message}")
            return EXIT_DOES_NOT_FIT
        if "no_speed" not in flags:
            print(describe_speed(model, settings, again="measure" in flags))
    except TpserveError as error:
        print(f"tpserve: error: {error.message}", file=sys.stderr)
        return EXIT_USAGE
    print("fits")
    return 0


def describe(plan: MemoryPlan) -> str:
    """A table in MB, by worker."""
    config, on_workers = plan.config, plan.on_workers
    lines = [
        f"{config.model_type}, {config.parameters:,} parameters, weights as {on_workers.dtype},"
        f" KV as {on_workers.kv_dtype}, context {on_workers.max_model_len}",
        f"{'MB':10}{'weights':>10}{'KV':>10}{'work':>10}{'process':>10}{'all':>10}",
    ]
    parts = zip(plan.weight_bytes, plan.kv_bytes, plan.work_bytes, strict=True)
    for rank, of_rank in enumerate(parts):
        numbers = [*of_rank, PROCESS_BYTES, sum(of_rank) + PROCESS_BYTES]
        lines.append(f"worker {rank:<3}" + "".join(f"{n / 1e6:10,.1f}" for n in numbers))
    lines.append(f"KV for {plan.kv_tokens} tokens at least; free: {free_bytes() / 1e6:,.1f} MB")
    return "\n".join(lines)


def describe_speed(model: ServedModel, settings: Settings, *, again: bool) -> str:
    """Tokens per second, predicted and, where `tpserve bench` has been, measured.

    again: measure the machine. Raises TpserveError when that fails.
    """
    measured = machine(again=again, say=lambda text: print(text, file=sys.stderr))
    choices = [*candidates(settings, model, (settings.comm,))]
    every = msgspec.structs.replace(
        settings,
        workers=AUTO_WORKERS,
        threads_per_worker=0,
        auto_dtypes="bf16,int8,int4" if settings.dtype == "auto" else "",
    )
    choices += candidates(every, model, (settings.comm,))
    predictions = predict(measured, model.config, settings, iter(dict.fromkeys(choices)))
    when, results = recall(model.config)
    return speed_table(predictions, when, results)


def speed_table(predictions: Sequence[Prediction], when: str, results: Sequence[Measured]) -> str:
    """Lines; the columns of what was measured are there if anything was.

    when, results: of the last run of `tpserve bench` with a model of this shape.
    """
    names = [*(f"{streams} stream{'s' * (streams > 1)}" for streams in STREAMS), "reading"]
    columns = [column for name in names for column in ([name, "measured"] if results else [name])]
    lines = [
        f"predicted tokens per second with {DEPTH} tokens of prompt"
        + (f"; measured {when}, nearest prompt" if results else ""),
        f"{'workers x threads':24}" + "".join(f"{column:>12}" for column in columns),
    ]
    for prediction in predictions:
        choice = prediction.choice
        comm = "" if choice.comm in ("local", "shm") else f" {choice.comm}"
        cells = []
        for streams, rate in zip(
            (*STREAMS, 0), (*prediction.decode, prediction.prefill), strict=True
        ):
            cells.append(_number(rate))
            if results:
                cells.append(_number(_nearest(prediction, streams, results)))
        name = f"{choice.workers} x {choice.threads} {choice.dtype}{comm}"
        lines.append(f"{name:24}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def _nearest(prediction: Prediction, streams: int, results: Sequence[Measured]) -> float | None:
    """What was measured of a choice, with the prompt nearest to the predicted one; streams 0: reading."""
    choice = prediction.choice
    found = [
        result
        for result in results
        if (result.workers, result.threads, result.dtype)
        == (choice.workers, choice.threads, choice.dtype)
        and result.comm in (choice.comm, "local")
        and (result.prefill if streams == 0 else not result.prefill and result.streams == streams)
    ]
    nearest = min(found, key=lambda result: abs(result.prompt - DEPTH), default=None)
    return None if nearest is None else nearest.tokens_per_s


def _number(rate: float | None) -> str:
    if rate is None:
        return ""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


if __name__ == "__main__":
    sys.exit(main())
