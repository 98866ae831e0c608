"""Made-up machines and runs of `tpserve bench`."""

from collections.abc import Mapping

from benchmarks.scaling.grid import Configuration, Request, Test
from benchmarks.scaling.record import Record, Sample
from coordinator.machine import Exchanging, Machine, Multiplying
from shared.config import PROJECT_ROOT
from shared.messages import Precision
from shared.model_config import read_model_config

ONE = Configuration(1, 1, "int8")
TWO = Configuration(2, 1, "int8")
READ = Test("prefill", 128)
WRITE = Test("decode", 128, 8, 64)
DTYPES: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8", "int4")


def made_up_machine(
    cores: int = 2,
    bandwidth: float = 10e9,
    scaling: float = 1.0,
    latency_s: Mapping[str, float] | None = None,
    threads_cost: float = 1.1,
) -> Machine:
    """Each core reads `bandwidth` bytes per second alone and `scaling` times as many beside all others.

    Weights are used as fast as they are read up to 8 rows, then in proportion. latency_s: of an
    all-reduce, by comm and world. threads_cost: times as long as processes take threads of one.
    """
    alone = [1 / bandwidth * max(1, rows / 8) for rows in (1, 8, 32, 128)]
    together = [seconds / scaling for seconds in alone]
    threaded = [seconds * threads_cost for seconds in together]
    latency_s = latency_s or {"shm-2": 5e-6, "shm-4": 10e-6, "zmq-2": 100e-6, "gloo-2": 1e-3}
    return Machine(
        cores=cores,
        kernels="native test",
        multiplying={dtype: Multiplying(alone, together, threaded) for dtype in DTYPES},
        exchanging={
            "local-1": Exchanging(pass_s=0.0, layer_s=0.0, float_s=0.0),
            **{
                name: Exchanging(pass_s=0.0, layer_s=2 * seconds, float_s=0.0)
                for name, seconds in latency_s.items()
            },
        },
        message_s=0.0,
    )


def sample(
    round_: int,
    configuration: Configuration = ONE,
    test: Test = WRITE,
    seconds: float = 1.0,
    **others: object,
) -> Sample:
    """100 tokens in so many seconds and 50 steps, half of the time in kernels."""
    values: dict[str, object] = {
        "tokens": 100,
        "busy_s": seconds,
        "steps": 50,
        "compute_s": [0.5 * seconds] * configuration.workers,
        "comm_s": [0.25 * seconds] * configuration.workers,
        "coordinator_s": 0.1 * seconds,
        "memory_bytes": [100_000_000] * configuration.workers,
        "weight_bytes": [1_000_000_000 // configuration.workers] * configuration.workers,
        "kv_token_bytes": 1000,
        "load": 0.5,
        "other_cores": 0.25,
    }
    return Sample(
        round=round_,
        configuration=configuration,
        test=test,
        seconds=seconds,
        **(values | others),  # type: ignore[arg-type]
    )


def made_up_record(*samples: Sample, rounds: int = 3, model: str = "/nowhere") -> Record:
    return Record(
        facts={"CPU": "made up", "date": "2026-01-01 00:00 UTC"},
        commit="",
        request=Request(
            model=model,
            workers=[1, 2],
            threads=[1],
            dtypes=["int8"],
            comms=["shm"],
            streams=[8],
            prompts=[128],
            tokens=64,
            rounds=rounds,
            seed=0,
        ),
        machines=[made_up_machine()],
        measures=False,
        config=read_model_config(PROJECT_ROOT / "models" / "demo-story"),
        weights=1_000_000_000,
        exchanged_bytes={1: 0, 2: 4096},
        samples=list(samples),
    )
