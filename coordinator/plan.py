"""`tpserve plan MODEL`: the memory that a model takes on each worker, without reading its weights."""

import os
import sys

import msgspec

from coordinator.planner import PROCESS_BYTES, MemoryPlan, check_fits, plan_memory
from coordinator.served_model import open_model
from shared.config import argument_parser, load_settings
from shared.errors import MemoryPlanError, TpserveError
from shared.memory import free_bytes

EXIT_DOES_NOT_FIT = 1
EXIT_USAGE = 2


def main() -> int:
    """Print the plan; 0 if it fits."""
    parser = argument_parser("tpserve plan", "Print the memory that MODEL takes on each worker.")
    parser.add_argument("plan_model", metavar="MODEL", help="the model's folder")
    flags = parser.parse_args()
    try:
        path = flags.plan_model
        settings = load_settings(flags, os.environ).settings
        settings = msgspec.structs.replace(settings, model={"model": path})
        model = open_model("model", path, settings)
        plan = plan_memory(model.config, model.on_workers, settings)
        print(describe(plan))
        try:
            check_fits([plan], starting=True)
        except MemoryPlanError as error:
            print(f"does not fit. {error.message}")
            return EXIT_DOES_NOT_FIT
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


if __name__ == "__main__":
    sys.exit(main())
