"""`tpserve bench`: what it asks for, what it makes of samples, how it goes on, and a small real run."""

import csv
import io
import statistics
import subprocess
from pathlib import Path

import msgspec
import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from benchmarks.machine import commit, cpu_name
from benchmarks.prompts import Prompts
from benchmarks.scaling import run
from benchmarks.scaling.__main__ import argument_parser, make_request, usual_workers
from benchmarks.scaling.grid import Configuration, Request, Test, configurations, wanted_tests
from benchmarks.scaling.plots import plot
from benchmarks.scaling.random_model import SHAPES, random_checkpoint
from benchmarks.scaling.record import FILE_NAME, Record, load
from benchmarks.scaling.summary import Row, baseline, split, summarise
from benchmarks.scaling.tables import PLOTS, as_csv, markdown
from coordinator import machine
from coordinator.measured import recall
from coordinator.text import TextModel
from shared.config import PROJECT_ROOT
from shared.errors import ConfigError
from shared.model_config import read_model_config
from tests.benchmarks.records import (
    ONE,
    READ,
    TWO,
    WRITE,
    made_up_machine,
    made_up_record,
    sample,
)
from tests.e2e.server import TPSERVE, run_tpserve, wait_until

DEMO = PROJECT_ROOT / "models" / "demo-story"


def request_of(*flags: str) -> Request:
    return make_request(argument_parser().parse_args(flags))


# --- what is asked for ----------------------------------------------------------------------------


def test_every_combination_is_a_server_once() -> None:
    request = request_of("--workers", "1,2", "--threads", "1,auto", "--dtype", "bf16,int8")
    request = msgspec.structs.replace(request, comms=["shm", "zmq"])
    names = [configuration.name for configuration in configurations(request, cores=2)]
    assert names == [
        *("1 x 1, bf16", "1 x 2, bf16", "2 x 1, bf16", "2 x 1, bf16, zmq"),
        *("1 x 1, int8", "1 x 2, int8", "2 x 1, int8", "2 x 1, int8, zmq"),
    ]


def test_auto_is_the_precision_of_the_checkpoint_and_counts_once() -> None:
    assert request_of("--dtype", "auto,bf16,int8").dtypes == ["bf16", "int8"]


def test_sizes_can_be_changed_one_by_one() -> None:
    quick = request_of("--quick", "--batch", "4")
    assert (quick.streams, quick.prompts, quick.rounds) == ([4], [128], 2)
    assert request_of("--full").prompts == [128, 512, 1500]
    assert usual_workers(1) == [1, 2]
    assert usual_workers(6) == [1, 2, 4]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--workers", "0"], "'0' is not a number between 1"),
        (["--dtype", "int3"], "'int3' is none of auto, fp32"),
        (["--comm", "mpi"], "'mpi' is none of shm"),
        (["--threads", "1,many"], "'many' is not a number"),
        (["--quick", "--full"], "not allowed with"),
    ],
)
def test_wrong_flags_are_refused(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        argument_parser().parse_args(flags)
    assert said in capsys.readouterr().err


def test_tests_that_do_not_fit_are_left_out_and_said() -> None:
    request = request_of("--prompt", "128,1500", "--batch", "1", "--tokens", "64")
    fitting, left_out = wanted_tests(request, longest=1024)
    assert [test.name for test in fitting] == ["pp128", "tg64 @ d128"]
    assert [test.name for test in left_out] == ["pp1500", "tg64 @ d1500"]
    with pytest.raises(ConfigError, match="the shortest test needs 129"):
        wanted_tests(request, longest=100)


def test_a_decode_test_leaves_one_token_behind_whole_blocks() -> None:
    assert Test("decode", 1500, 1, 64).depth == 1489
    assert Test("decode", 4, 1, 64).depth == 17


# --- arithmetic -----------------------------------------------------------------------------------


def row_of(rows: list[Row], configuration: Configuration) -> Row:
    return next(row for row in rows if row.configuration == configuration)


def test_speed_up_is_the_median_of_ratios_within_rounds() -> None:
    # The machine slows down from round to round: the ratios do not.
    samples = [sample(r, ONE, seconds=float(r)) for r in (1, 2, 3)]
    samples += [sample(r, TWO, seconds=r / 1.5) for r in (1, 2, 3)]
    row = row_of(summarise(made_up_record(*samples)), TWO)
    assert row.speed_up is not None
    assert (row.speed_up.low, row.speed_up.high) == pytest.approx((1.5, 1.5))
    assert row.efficiency == pytest.approx(0.75)
    spread = row.tokens_per_s
    assert (spread.median, spread.low, spread.high) == pytest.approx((75, 50, 150))


def test_efficiency_counts_cores_not_threads_that_take_turns() -> None:
    four = Configuration(4, 1, "int8")
    record = made_up_record(sample(1, ONE), sample(1, four, seconds=0.5))
    assert row_of(summarise(record), four).efficiency == pytest.approx(1.0)


def test_the_baseline_is_the_smallest_server_of_the_same_precision() -> None:
    other = Configuration(1, 1, "bf16")
    assert baseline(TWO, [Configuration(1, 2, "int8"), other, TWO, ONE]) == ONE


def test_the_limit_is_what_a_step_reads() -> None:
    row = row_of(summarise(made_up_record(sample(1, TWO))), TWO)
    read = 1_000_000_000 + 8 * (129 + 32) * 1000
    assert row.limit == pytest.approx(8 * 20e9 / read)
    assert row.share_of_limit == pytest.approx(100 / (8 * 20e9 / read))
    assert row_of(summarise(made_up_record(sample(1, ONE, READ))), ONE).limit is None


def test_a_step_is_split_into_kernels_collectives_and_neither() -> None:
    parts = split([sample(1, TWO, seconds=2.0), sample(2, TWO, seconds=4.0)])
    assert parts.step_s == pytest.approx(0.06)
    assert parts.compute_s == pytest.approx(0.03)
    assert parts.comm_s == pytest.approx(0.015)
    assert parts.other_s == pytest.approx(0.015)
    assert parts.coordinator_s == pytest.approx(0.006)


def test_exchanged_bytes_follow_from_the_tree() -> None:
    config = read_model_config(DEMO)  # 4 layers, 256 wide
    assert run.exchanged_bytes(config, 1) == 0
    assert run.exchanged_bytes(config, 2) == 2 * 4 * 2 * 4 * 256
    # 3 + 3 + 2 of 8 shards: 2 + 1, 1 + 2 and 2 aligned subtrees.
    assert run.exchanged_bytes(config, 3) == 2 * 4 * 5 * 4 * 256


# --- reports --------------------------------------------------------------------------------------


def full_record() -> Record:
    samples = [
        sample(r, c, t, ttft_s=[0.1, 0.2] if t == READ else [], gaps_s=[0.01] * 9)
        for r in (1, 2, 3)
        for c in (ONE, TWO)
        for t in (READ, WRITE)
    ]
    return made_up_record(*samples)


def test_the_report_has_a_line_for_every_server_and_test() -> None:
    text = markdown(full_record())
    for line in (
        "- CPU: made up",
        "- load during (1 minute): 0.5 to 0.5",
        "- other programs kept 0.25 cores busy on average",
        "| 1 x 1, int8 | pp128 | 100 | 100 to 100 | 1.00 | 1 to 1 | 100 % |  |",
        "| 2 x 1, int8 | tg64 @ d128, 8 streams | 100 | 100 to 100 | 1.00 | 1 to 1 | 50 % | 63 % |",
        "| 2 x 1, int8 | 100 MB |",
    ):
        assert any(found.startswith(line) for found in text.splitlines()), line
    assert "10 ms / 10 ms" in text
    assert "150 ms / 200 ms" in text
    assert "4 KiB" in text


def test_what_the_planner_expects_stands_beside_what_was_measured() -> None:
    record = made_up_record(sample(1, TWO))
    row = row_of(summarise(record), TWO)
    assert row.predicted is not None
    # 8 tokens for each time that two cores read all weights and, for each of 8 streams, the keys and
    # values of 161 tokens (4 layers, 4 heads of 32, bf16); and the latency of 8 all-reduces.
    read = record.config.parameters * 1.0625 + 8 * 161 * 4 * 2 * 4 * 32 * 2
    assert row.predicted == pytest.approx(8 / (read / 20e9 + 8 * 5e-6), rel=0.03)
    assert f"| {row.predicted:,.0f} | {row.predicted / 100:.2f} |" in markdown(record)


def test_csv_has_the_same_rows() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(full_record()))))
    assert [(row["workers"], row["test"]) for row in rows] == [
        *(("1", "pp128"), ("2", "pp128")),
        *(("1", "tg64 @ d128, 8 streams"), ("2", "tg64 @ d128, 8 streams")),
    ]
    assert rows[3]["time_per_token_p50_s"] == "0.01"
    assert rows[0]["ttft_p50_s"] == "0.15000000000000002"


def test_pictures_are_drawn(tmp_path: Path) -> None:
    plot(full_record(), tmp_path)
    for name in PLOTS:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot be written"):
        plot(full_record(), tmp_path / "nowhere")


# --- going on -------------------------------------------------------------------------------------


def test_rounds_begin_with_another_server_each_and_a_warm_up() -> None:
    turns = run.missing_turns(made_up_record(rounds=2), [ONE, TWO])
    assert turns == [(0, TWO), (0, ONE), (1, TWO), (1, ONE), (2, ONE), (2, TWO)]


def test_a_run_goes_on_where_it_was_left() -> None:
    record = made_up_record(sample(1, ONE), sample(1, TWO), sample(2, ONE), rounds=2)
    assert run.missing_turns(record, [ONE, TWO]) == [(0, TWO), (2, TWO)]
    assert run.missing_turns(made_up_record(rounds=0), [ONE, TWO]) == []


def test_what_was_kept_is_read_again(tmp_path: Path) -> None:
    record = full_record()
    record.save(tmp_path)
    assert load(tmp_path) == record
    (tmp_path / FILE_NAME).write_text("{}")
    with pytest.raises(ConfigError, match="is not a result of tpserve bench"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "nowhere")


def test_a_run_of_another_commit_or_machine_does_not_go_on() -> None:
    record = made_up_record()
    record.commit = commit()
    with pytest.raises(ConfigError, match="another machine"):
        run.check_can_go_on(record)
    record.facts["CPU"] = cpu_name()
    run.check_can_go_on(record)
    record.commit = "another"
    with pytest.raises(ConfigError, match="begun with commit another"):
        run.check_can_go_on(record)


# --- models and prompts ---------------------------------------------------------------------------


def test_random_checkpoints_have_the_real_shape_and_are_made_once(tmp_path: Path) -> None:
    folder = random_checkpoint("tiny", tmp_path / "tiny")
    made = (folder / "config.json").stat().st_mtime_ns
    assert random_checkpoint("tiny", folder).joinpath("config.json").stat().st_mtime_ns == made
    config = read_model_config(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert sum(tensor.numel() for tensor in tensors.values()) == config.parameters
    assert float(tensors["model.embed_tokens.weight"].float().std()) == pytest.approx(0.02, rel=0.1)
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == config.num_layers


def test_random_tokenizers_give_any_text_back_and_words_are_one_token(tmp_path: Path) -> None:
    folder = random_checkpoint("tiny", tmp_path / "tiny")
    text = TextModel(folder, read_model_config(folder))
    begin, *ids = text.encode_story("ab an x, Zürich\n")
    assert text.decode(ids) == "ab an x, Zürich\n"
    assert begin == SHAPES["tiny"]["bos_token_id"]
    word = text.encode_story("ab")
    assert len(word) == 2
    assert text.encode_story("ab ab") == [*word, word[1]]
    ours = AutoTokenizer.from_pretrained(folder)
    assert ours("ab an x, Zürich\n").input_ids == [begin, *ids]


def test_the_shape_called_tinyllama_has_its_number_of_parameters(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(SHAPES["tinyllama-1.1b"]))
    assert read_model_config(tmp_path).parameters == 1_100_048_384


def test_prompts_have_exactly_the_length_and_no_common_beginning() -> None:
    prompts = Prompts(DEMO, seed=3)
    made = [prompts.make(length) for length in (20, 20, 513)]
    assert [len(prompt.ids) for prompt in made] == [20, 20, 513]
    assert made[0].ids[:16] != made[1].ids[:16]
    assert Prompts(DEMO, seed=3).make(20).text == made[0].text


# --- a real run -----------------------------------------------------------------------------------


def test_a_small_real_run_is_kept_and_not_repeated(
    story_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machine.keep(machine.machine_file(), made_up_machine())
    out = tmp_path / "out"
    flags = ["--quick", "--workers", "1,2", "--dtype", "fp32", "--batch", "2", "--prompt", "32"]
    flags += ["--tokens", "8", "--rounds", "1"]
    ran = run_tpserve(["bench", str(story_model), *flags, "--out", str(out)], timeout_s=280)
    assert ran.returncode == 0, ran.stderr
    record = load(out)
    assert {s.configuration.workers for s in record.samples} == {1, 2}
    assert {s.test.name for s in record.samples} == {"pp32", "tg8 @ d32, 2 streams"}
    for one in record.samples:
        assert one.tokens_per_s > 0
        assert one.steps > 0
        assert sum(one.compute_s) > 0
        assert (sum(one.comm_s) > 0) == (one.configuration.workers > 1)
        assert statistics.mean(one.compute_s) <= one.busy_s
        assert min(one.memory_bytes) > 10_000_000
    assert (out / "bench.md").read_text() in ran.stdout
    assert {path.name for path in out.glob("*.png")} == set(PLOTS)
    assert len(recall(read_model_config(story_model))[1]) == 4
    again = run_tpserve(["bench", "--resume", str(out)])
    assert again.returncode == 0, again.stderr
    assert load(out).samples == record.samples
    refused = run_tpserve(["bench", str(story_model), *flags, "--out", str(out)])
    assert refused.returncode == 1
    assert "--resume" in refused.stderr


def test_a_run_that_is_ended_ends_its_servers_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machine.keep(machine.machine_file(), made_up_machine())
    out = tmp_path / "out"
    flags = ["--quick", "--workers", "1", "--prompt", "32", "--rounds", "1000"]
    command = [TPSERVE, "bench", str(DEMO), *flags, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert wait_until(lambda: (out / FILE_NAME).exists() and bool(load(out).samples), 120)
        servers = children(process.pid)
        assert servers
        process.terminate()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"--resume {out}" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in servers)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]
