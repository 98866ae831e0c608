"""Predictions and choices, on machines with made-up speeds."""

import msgspec
import pytest

from coordinator import choose, machine
from coordinator.choose import Prediction, best, candidates, predict, settle
from coordinator.machine import Machine
from coordinator.measured import Measured, recall, remember
from coordinator.plan import speed_table
from coordinator.served_model import open_model
from coordinator.step_model import Choice, StepModel, precisions_of
from shared.config import AUTO_WORKERS, PROJECT_ROOT, Settings, Sourced
from shared.errors import ConfigError, MemoryPlanError
from shared.messages import Precision
from shared.model_config import ModelConfig, read_model_config
from tests.benchmarks.records import made_up_machine

DEMO = PROJECT_ROOT / "models" / "demo-story"


@pytest.fixture(scope="module")
def large() -> ModelConfig:
    """TinyLlama-1.1B's shape."""
    return msgspec.structs.replace(
        read_model_config(DEMO),
        hidden_size=2048,
        intermediate_size=5632,
        num_layers=22,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        vocab_size=32_000,
        max_positions=2048,
        tie_word_embeddings=False,
    )


def choice(
    workers: int, threads: int = 1, dtype: Precision = "int8", comm: machine.Comm = "shm"
) -> Choice:
    return Choice(workers, threads, dtype, "bf16", comm if workers > 1 else "local")


def rate(measured: Machine, config: ModelConfig, chosen: Choice, streams: int = 1) -> float:
    return StepModel(measured, config, 8).decode_tokens_per_s(chosen, streams, depth=1)


# --- prediction -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "weight_bytes"), [("fp32", 4), ("bf16", 2), ("int8", 1.0625), ("int4", 0.5977)]
)
def test_one_worker_writes_as_fast_as_it_reads_its_weights(
    large: ModelConfig, dtype: Precision, weight_bytes: float
) -> None:
    # int4 keeps the 65.5 million weights of the logits in int8.
    weights = 1_100_048_384 - 32_000 * 2048
    expected = 10e9 / (weights * weight_bytes)
    assert rate(made_up_machine(), large, choice(1, dtype=dtype)) == pytest.approx(
        expected, rel=0.01
    )


def test_two_workers_are_twice_as_fast_where_memory_and_latency_allow(large: ModelConfig) -> None:
    one = rate(made_up_machine(), large, choice(1))
    assert rate(made_up_machine(), large, choice(2)) == pytest.approx(2 * one, rel=0.02)
    shared = made_up_machine(scaling=0.6)
    assert rate(shared, large, choice(2)) == pytest.approx(1.2 * one, rel=0.02)


def test_every_synchronisation_costs_its_latency(large: ModelConfig) -> None:
    measured = made_up_machine()
    fast, slow = (rate(measured, large, choice(2, comm=comm)) for comm in ("shm", "gloo"))
    # Two in each of 22 layers, 1 ms instead of 5 us.
    assert 1 / slow - 1 / fast == pytest.approx(2 * 22 * 995e-6, rel=0.01)


def test_streams_share_the_weights_until_computing_takes_longer(large: ModelConfig) -> None:
    one, eight, all_ = (rate(made_up_machine(), large, choice(1), n) for n in (1, 8, 64))
    assert eight == pytest.approx(8 * one, rel=0.02)
    assert all_ == pytest.approx(8 * one, rel=0.05)


def test_threads_pay_for_their_barriers_and_more_than_cores_take_turns(large: ModelConfig) -> None:
    measured = made_up_machine()
    one, threaded, two = (rate(measured, large, choice(*c)) for c in ((1, 1), (1, 2), (2, 1)))
    assert one < threaded < two
    assert threaded == pytest.approx(2 * one / 1.1, rel=0.02)
    assert rate(measured, large, choice(4)) == pytest.approx(two, rel=0.05)


def test_what_stands_before_a_token_is_read_too(large: ModelConfig) -> None:
    measured = made_up_machine()
    model = StepModel(measured, large, 8)
    short, long = (model.step(choice(1), rows=1, logits=1, depth=d) for d in (0, 2000))
    assert short.attention_s == 0
    # 32 heads of 64 in 22 layers: a product with the keys, one with the values.
    operations = 2000 * 22 * 2 * 2 * 32 * 64
    assert long.attention_s == pytest.approx(operations / measured.operations("fp32", 1))
    # Reading is what takes the time where there are few queries: as many heads of keys as of these.
    plain = msgspec.structs.replace(large, num_kv_heads=32)
    read = 2000 * 22 * 2 * 32 * 64 * 2
    alone = StepModel(measured, plain, 8).step(choice(1), rows=1, logits=1, depth=2000)
    assert alone.attention_s == pytest.approx(read / 10e9)
    assert long.seconds - short.seconds == pytest.approx(long.attention_s)


def test_reading_a_prompt_is_limited_by_computing(large: ModelConfig) -> None:
    measured = made_up_machine()
    # 128 rows take 16 times as long as one.
    weights = (1_100_048_384 - 2 * 32_000 * 2048) * 1.0625
    expected = 128 / (16 * weights / 10e9)
    found = StepModel(measured, large, 8).prefill_tokens_per_s(choice(1), 128, chunk=256)
    assert found == pytest.approx(expected, rel=0.05)


def test_a_machine_says_how_fast_cores_read_together() -> None:
    measured = made_up_machine(cores=4, scaling=0.5)
    assert [measured.bandwidth(n) for n in (1, 2, 4, 9)] == pytest.approx([10e9, 20e9, 20e9, 20e9])
    assert measured.operations("int8", 4) == pytest.approx(2 * 128 / 1.0625 * 4 * 0.5 * 10e9 / 16)


def test_measurements_of_a_machine_become_their_mean_in_the_precisions_of_all() -> None:
    slow, fast = made_up_machine(bandwidth=10e9), made_up_machine(bandwidth=30e9)
    del fast.multiplying["bf16"]
    both = machine.mean_of([slow, fast])
    assert both.multiplying.keys() == slow.multiplying.keys() - {"bf16"}
    seconds = (1 / 10e9 + 1 / 30e9) / 2
    assert both.multiplying["int8"].alone[0] == pytest.approx(seconds)
    assert both.multiplying["fp32"].threaded[0] == pytest.approx(1.1 * seconds)
    assert both.exchanging == slow.exchanging


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
def test_a_step_needs_no_more_measurements_than_are_said(
    dtype: Precision, large: ModelConfig
) -> None:
    measured = made_up_machine()
    whole = StepModel(measured, large, 8).step(choice(2, dtype=dtype), rows=8, logits=8, depth=100)
    for other in measured.multiplying.keys() - precisions_of([dtype]):
        del measured.multiplying[other]
    again = StepModel(measured, large, 8).step(choice(2, dtype=dtype), rows=8, logits=8, depth=100)
    assert again == whole


# --- choice ---------------------------------------------------------------------------------------


def predictions(measured: Machine, config: ModelConfig, **wishes: object) -> list[Prediction]:
    settings = Settings(workers=AUTO_WORKERS, model={"m": str(DEMO)}, **wishes)  # type: ignore[arg-type]
    model = open_model("m", str(DEMO), settings)
    return predict(measured, config, settings, candidates(settings, model, ("shm", "zmq", "gloo")))


def chosen(measured: Machine, config: ModelConfig, **wishes: object) -> Choice:
    return best(predictions(measured, config, **wishes), free=1 << 40).choice


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "cores", 4)


def test_a_large_model_gets_a_worker_for_each_core(large: ModelConfig) -> None:
    slow_barriers = made_up_machine(cores=4, threads_cost=1.5)
    assert chosen(slow_barriers, large) == Choice(4, 1, "bf16", "bf16", "shm")


def test_of_choices_that_are_as_good_the_one_with_fewer_workers_is_taken(
    large: ModelConfig,
) -> None:
    measured = made_up_machine(cores=4, threads_cost=1.01)
    assert chosen(measured, large) == Choice(1, 4, "bf16", "bf16", "local")


def test_a_small_one_is_not_worth_its_synchronisations() -> None:
    latencies = {"shm-2": 1e-3, "zmq-2": 1e-3, "gloo-2": 1e-3}
    small = read_model_config(DEMO)
    assert chosen(made_up_machine(cores=4, latency_s=latencies), small).workers == 1


def test_the_fastest_collective_is_chosen(large: ModelConfig) -> None:
    latencies = {"shm-2": 1e-3, "zmq-2": 1e-4, "gloo-2": 1e-3}
    assert chosen(made_up_machine(cores=4, latency_s=latencies), large).comm == "zmq"


def test_precision_is_chosen_only_among_those_allowed(large: ModelConfig) -> None:
    measured = made_up_machine(cores=4)
    assert chosen(measured, large).dtype == "bf16"
    assert chosen(measured, large, auto_dtypes="int8").dtype == "int8"
    assert chosen(measured, large, auto_dtypes="fp32").dtype == "bf16"
    with pytest.raises(ConfigError, match=r"auto_dtypes is 'int3'.*fp32"):
        chosen(measured, large, auto_dtypes="int3")


def test_what_does_not_fit_is_not_chosen(large: ModelConfig) -> None:
    found = predictions(made_up_machine(cores=4), large, auto_dtypes="int8")
    smallest = min(p.needed_bytes for p in found)
    assert best(found, smallest).needed_bytes == smallest
    with pytest.raises(MemoryPlanError, match="no number of workers fits"):
        best(found, smallest - 1)


def test_settling_changes_only_what_was_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    latencies = {"shm-2": 1e-9, "zmq-2": 1e-9, "gloo-2": 1e-9}
    measured = made_up_machine(cores=4, bandwidth=1e6, latency_s=latencies)
    monkeypatch.setattr(choose, "machine", lambda: measured)
    asked = Settings(workers=AUTO_WORKERS, model={"m": str(DEMO)}, comm="zmq", dtype="int8")
    settled = settle(Sourced(asked, {"comm": "flag --comm"}))
    assert settled == msgspec.structs.replace(asked, workers=4, threads_per_worker=1)
    given = Settings(workers=3)
    assert settle(Sourced(given, {})) is given


# --- what plan prints -----------------------------------------------------------------------------


def test_measured_stands_beside_predicted(
    large: ModelConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert recall(large) == ("", [])
    common = {"workers": 4, "threads": 1, "dtype": "bf16", "comm": "shm"}
    results = [
        Measured(**common, prefill=False, streams=1, prompt=prompt, tokens_per_s=speed)  # type: ignore[arg-type]
        for prompt, speed in ((128, 12.25), (1500, 9.5))
    ]
    remember(large, "2026-01-02", results)
    when, found = recall(large)
    table = speed_table(predictions(made_up_machine(cores=4), large), when, found).splitlines()
    assert "measured 2026-01-02" in table[0]
    assert table[1].split("  ")[-1].strip() == "measured"
    line = next(line for line in table if line.startswith("4 x 1 bf16 "))
    assert line.split()[5] == "12.2"
    assert "measured" not in speed_table(predictions(made_up_machine(4), large), "", [])
