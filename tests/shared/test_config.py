"""Settings: which source wins, and what is refused."""

from pathlib import Path

import pytest

from shared.config import Settings, Sourced, argument_parser, load_settings, parse_bytes
from shared.errors import ConfigError


def load(argv: list[str], environ: dict[str, str] | None = None) -> Sourced:
    return load_settings(argument_parser().parse_args(argv), environ or {})


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("workers = 2\nqueue_limit = 7\ncomm = 'zmq'\n")
    environ = {"TPSERVE_WORKERS": "3", "TPSERVE_QUEUE_LIMIT": "9"}
    loaded = load(["--config", str(file), "--workers", "4"], environ)
    assert loaded.settings.workers == 4
    assert loaded.settings.queue_limit == 9
    assert loaded.settings.comm == "zmq"
    assert loaded.settings.listen == Settings().listen
    assert loaded.sources["workers"] == "flag --workers"
    assert loaded.sources["queue_limit"] == "environment TPSERVE_QUEUE_LIMIT"
    assert loaded.sources["comm"] == f"file {file}"
    assert loaded.sources["listen"] == "default"


def test_print_config_shows_each_value_and_its_source() -> None:
    shown = load(["--workers", "4"]).describe().splitlines()
    assert len(shown) == len(Settings.__struct_fields__)
    assert next(line for line in shown if line.startswith("workers")).split() == [
        *("workers", "4", "flag", "--workers")
    ]


def test_models_are_named_paths_and_the_flag_repeats() -> None:
    models = load(["--model", "story=a", "--model", "chat=b/c=d"]).settings.model
    assert models == {"story": "a", "chat": "b/c=d"}


def test_models_come_from_the_environment_too() -> None:
    assert load([], {"TPSERVE_MODEL": "a=x,b=y"}).settings.model == {"a": "x", "b": "y"}


def test_every_option_has_a_flag_with_help() -> None:
    text = argument_parser().format_help()
    for name in Settings.__struct_fields__:
        assert "--" + name.replace("_", "-") in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--workers", "99"], ["workers is 99", "8 virtual shards", "--virtual-shards"]),
        (["--workers", "0"], ["workers", "'0'", ">= 1"]),
        (["--workers", "many"], ["workers", "'many'", "int"]),
        (["--virtual-shards", "6"], ["6", "power of two"]),
        (["--dtype", "fp7"], ["dtype", "fp7"]),
        (["--comm", "smoke-signals"], ["comm", "smoke-signals"]),
        (["--comm", "nccl"], ["nccl", "--device cuda"]),
        (["--deterministic"], ["deterministic", "device is 'cpu'", "--device cuda"]),
        (["--device", "cuda", "--workers", "auto"], ["workers", "auto", "number of GPUs"]),
        (["--model", "justaname"], ["justaname", "NAME=MODEL"]),
        (["--model", "a=x", "--model", "a=y"], ["'a'", "twice"]),
        (["--kv-memory", "lots"], ["lots", "512M"]),
        (["--step-timeout", "nan"], ["step_timeout", "nan"]),
        (["--listen", "tcp://0.0.0.0:5555"], ["0.0.0.0", "loopback"]),
        (["--listen", "tcp://127.0.0.1:99999"], ["99999", "tcp://127.0.0.1:5555"]),
        (["--listen", "5555"], ["'5555'", "tcp://"]),
        (["--config", "/does/not/exist.toml"], ["/does/not/exist.toml", "No such file"]),
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_what_is_allowed(
    argv: list[str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(argv)
    for word in words:
        assert word in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "word"), [("wrokers = 2", "wrokers"), ("workers = [", "x.toml"), ("workers = '2'", "")]
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "x.toml"
    file.write_text(text)
    if not word:
        assert load(["--config", str(file)]).settings.workers == 2
        return
    with pytest.raises(ConfigError, match=word):
        load(["--config", str(file)])


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("512M", 512 << 20), ("1.5GB", 3 << 29), ("2 GiB", 2 << 30)]
)
def test_sizes_have_units_of_1024(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_threads_default_to_a_fair_share_of_the_cores() -> None:
    assert load(["--workers", "8"]).settings.threads >= 1
    assert load(["--threads-per-worker", "3"]).settings.threads == 3


def test_bundled_configurations_are_valid() -> None:
    folder = Path(__file__).resolve().parents[2] / "configs"
    files = sorted(folder.glob("*.toml"))
    assert files
    for file in files:
        load(["--config", str(file)])
