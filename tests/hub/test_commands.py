"""tpserve pull, list, rm and show, as processes, against a stub of the hub."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import TPSERVE, wait_until
from tests.hub.conftest import MODEL_FILES, Run
from tests.hub.stub import TOKEN, Stub

NEEDED = sorted(set(MODEL_FILES) - {"README.md"})


def pulled(result: subprocess.CompletedProcess[str]) -> Path:
    """The folder that a pull printed, and nothing besides."""
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.removesuffix("\n"))
    assert folder.is_dir(), result.stdout
    return folder


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error."""
    assert result.returncode == 1, result.stdout
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("tpserve: error:")]
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == line
    return line


def test_pull_brings_the_files_that_a_server_needs_and_no_others(hub: Stub, tpserve: Run) -> None:
    result = tpserve("pull", "org/story")
    folder = pulled(result)
    assert sorted(path.name for path in folder.iterdir()) == NEEDED
    for name in NEEDED:
        assert (folder / name).read_bytes() == MODEL_FILES[name]
    assert sorted(hub.downloads()) == NEEDED
    assert "downloading org/story: 6.1 MB" in result.stderr


def test_a_second_pull_downloads_nothing(hub: Stub, tpserve: Run) -> None:
    first = pulled(tpserve("pull", "org/story"))
    hub.requests.clear()
    result = tpserve("pull", "org/story")
    assert pulled(result) == first
    assert hub.downloads() == []
    assert result.stderr == ""


def test_a_new_commit_brings_only_what_it_changed(hub: Stub, tpserve: Run) -> None:
    old = pulled(tpserve("pull", "org/story"))
    hub.add("org/story", MODEL_FILES | {"generation_config.json": b"{}"})
    hub.requests.clear()
    result = tpserve("pull", "org/story")
    assert pulled(result) != old
    assert hub.downloads() == ["generation_config.json"]
    assert result.stderr == "downloading org/story: 2 B\n"


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: Stub, tpserve: Run) -> None:
    weights = os.urandom(1 << 20) * 25
    hub.add("org/large", {"config.json": b"{}", "model.safetensors": weights})
    hub.cut_once.add("model.safetensors")
    folder = pulled(tpserve("pull", "org/large"))
    assert (folder / "model.safetensors").read_bytes() == weights
    ranges = [r for method, path, r in hub.requests if method == "GET" and "model.safe" in path]
    # The library writes pieces of 10 MiB, and 12.5 had come.
    assert ranges == ["", f"bytes={10 << 20}-"]


def test_offline_takes_what_the_cache_has(hub: Stub, tpserve: Run) -> None:
    folder = pulled(tpserve("pull", "org/story"))
    hub.stop()
    assert pulled(tpserve("pull", "org/story", "--offline")) == folder
    assert pulled(tpserve("pull", "org/story", HF_HUB_OFFLINE="1")) == folder


def test_what_another_program_has_put_into_the_cache_is_used_too(
    hub: Stub, tpserve: Run, tmp_path: Path
) -> None:
    folder = pulled(tpserve("pull", "org/story"))
    # Single files, and older versions of the library, leave no list of what belongs to a model.
    shutil.rmtree(tmp_path / "hf" / "hub" / "models--org--story" / "trees")
    assert pulled(tpserve("pull", "org/story", "--offline")) == folder
    (folder / "model.safetensors").unlink()
    assert "no complete org/story" in refused(tpserve("pull", "org/story", "--offline"))


def test_a_hub_that_is_away_does_not_matter_when_the_cache_has_the_model(
    hub: Stub, tpserve: Run
) -> None:
    folder = pulled(tpserve("pull", "org/story"))
    hub.stop()
    assert pulled(tpserve("pull", "org/story")) == folder


def test_a_hub_that_is_away_is_named_with_the_remedy(hub: Stub, tpserve: Run) -> None:
    hub.stop()
    line = refused(tpserve("pull", "org/story"))
    assert f"{hub.address} cannot be reached" in line
    assert "tpserve pull org/story where the hub can be reached" in line


def test_offline_without_the_model_says_how_to_get_it(hub: Stub, tpserve: Run) -> None:
    line = refused(tpserve("pull", "org/story", "--offline"))
    assert "no complete org/story" in line
    assert "tpserve pull org/story" in line
    assert hub.requests == []
    assert "HF_HUB_OFFLINE is set" in refused(tpserve("pull", "org/story", HF_HUB_OFFLINE="1"))


def test_an_incomplete_download_is_not_taken_for_a_model(hub: Stub, tpserve: Run) -> None:
    folder = pulled(tpserve("pull", "org/story"))
    (folder / "model.safetensors").unlink()
    assert "no complete org/story" in refused(tpserve("pull", "org/story", "--offline"))
    hub.requests.clear()
    assert pulled(tpserve("pull", "org/story")) == folder
    assert (folder / "model.safetensors").exists()


def test_a_plan_needs_no_weights(hub: Stub, tpserve: Run) -> None:
    ran = tpserve("plan", "org/story", "--workers", "2", "--no-speed")
    assert ran.stdout.endswith("fits\n"), ran.stderr
    assert not any(path.endswith(".safetensors") for path in hub.downloads())
    assert tpserve("pull", "org/story").returncode == 0
    assert any(path.endswith(".safetensors") for path in hub.downloads())
    hub.stop()
    assert tpserve("plan", "org/story", "--offline", "--no-speed").stdout.endswith("fits\n")


def test_a_revision_is_a_branch_or_a_commit(hub: Stub, tpserve: Run) -> None:
    old = hub.add("org/story", MODEL_FILES | {"generation_config.json": b"{}"}, branch="v1")
    by_branch = pulled(tpserve("pull", "org/story@v1"))
    assert (by_branch / "generation_config.json").read_bytes() == b"{}"
    assert by_branch.name == old
    assert pulled(tpserve("pull", f"org/story@{old}")) == by_branch
    assert pulled(tpserve("pull", "org/story")) != by_branch
    assert pulled(tpserve("pull", "org/story@v1", "--offline")) == by_branch
    assert "org/story has no revision v2" in refused(tpserve("pull", "org/story@v2"))


def test_a_wrong_name_is_refused(tpserve: Run) -> None:
    line = refused(tpserve("pull", "org/stori"))
    assert "no model org/stori" in line
    assert "check the spelling" in line
    for spec in ("story", "a/b/c", "org/story@", "./org/story", "a/b@../c", ""):
        assert "is neither a folder nor a model of the" in refused(tpserve("pull", spec))


def test_a_gated_model_needs_the_token_of_somebody_who_may(hub: Stub, tpserve: Run) -> None:
    hub.repositories["org/story"].gated = True
    line = refused(tpserve("pull", "org/story"))
    assert "org/story is gated, and no token is set" in line
    assert "HF_TOKEN" in line
    line = refused(tpserve("pull", "org/story", HF_TOKEN="hf_of_another"))
    assert "gated, and the token (HF_TOKEN) has no access" in line
    assert "hf_of_another" not in line
    pulled(tpserve("pull", "org/story", HF_TOKEN=TOKEN))


def test_a_private_model_needs_a_token(hub: Stub, tpserve: Run) -> None:
    hub.repositories["org/story"].private = True
    assert "a private model needs HF_TOKEN" in refused(tpserve("pull", "org/story"))
    pulled(tpserve("pull", "org/story", HF_TOKEN=TOKEN))


def test_a_repository_without_safetensors_is_refused_before_anything_comes(
    hub: Stub, tpserve: Run
) -> None:
    hub.add("org/old", {"config.json": b"{}", "pytorch_model.bin": b"x", "a.gguf": b"x"})
    line = refused(tpserve("pull", "org/old"))
    assert "has no model.safetensors and no model.safetensors.index.json (only .bin, .gguf)" in line
    assert hub.downloads() == []


def test_several_files_of_weights_come_with_their_index(hub: Stub, tpserve: Run) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": b"x" * 10 * i for i in (1, 2)}
    hub.add("org/large", {"config.json": b"{}", "model.safetensors.index.json": b"{}"} | shards)
    folder = pulled(tpserve("pull", "org/large"))
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors.index.json",
        *shards,
    }


def test_a_model_larger_than_the_disk_is_refused_before_anything_comes(
    hub: Stub, tpserve: Run
) -> None:
    hub.declared["model.safetensors"] = 10**17
    line = refused(tpserve("pull", "org/story"))
    assert "org/story needs 100000.0 TB" in line
    assert "HF_HOME" in line
    assert hub.downloads() == []


def test_an_address_that_is_no_hub_is_said_so(hub: Stub, tpserve: Run) -> None:
    line = refused(tpserve("pull", "org/story", HF_ENDPOINT=hub.address + "/nowhere"))
    assert "/nowhere answers 404 when asked for org/story: check HF_ENDPOINT" in line
    line = refused(tpserve("pull", "org/story", HF_ENDPOINT=hub.address + "/page"))
    assert "/page does not answer as a hub does" in line


def test_a_cache_that_cannot_be_used_is_named(tpserve: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    line = refused(tpserve("pull", "org/story", HF_HOME=str(tmp_path / "file")))
    assert f"{tmp_path}/file" in line
    assert "cannot be used (Not a directory): set HF_HOME" in line


def test_ctrl_c_ends_a_download_at_once_and_leaves_nothing_half(
    hub: Stub, hub_env: dict[str, str], tmp_path: Path
) -> None:
    hub.slow_s = 120
    process = subprocess.Popen(
        [TPSERVE, "pull", "org/story"],
        env=hub_env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    blobs = tmp_path / "hf" / "hub" / "models--org--story" / "blobs"
    assert wait_until(lambda: bool(list(blobs.glob("*.incomplete"))), 60)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert output == ""
    assert "Traceback" not in errors
    assert list(blobs.glob("*.incomplete")) == []


def test_on_a_terminal_a_line_shows_how_far_the_download_is(
    hub: Stub, hub_env: dict[str, str]
) -> None:
    hub.add("org/large", {"config.json": b"{}", "model.safetensors": b"x" * (25 << 20)})
    hub.slow_s = 2.0
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [TPSERVE, "pull", "org/large"], env=hub_env, stdout=subprocess.PIPE, stderr=theirs
    )
    output, _ = process.communicate(timeout=60)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert Path(output.decode().strip()).is_dir()
    assert re.search(r"\rorg/large: (39|40) % of 26.2 MB, \d+\.\d .B/s", shown), shown
    assert "\n" not in shown.removeprefix("downloading org/large: 26.2 MB\r\n")


def listed(tpserve: Run) -> list[dict[str, Any]]:
    result = tpserve("list", "--json")
    assert result.returncode == 0, result.stderr
    models: list[dict[str, Any]] = json.loads(result.stdout)
    return models


def test_list_shows_what_was_pulled(hub: Stub, tpserve: Run) -> None:
    assert listed(tpserve) == []
    assert tpserve("list").returncode == 0
    folder = pulled(tpserve("pull", "org/story"))
    before = time.time()
    (model,) = listed(tpserve)
    assert model["name"] == "org/story"
    assert model["revision"] == folder.name
    assert model["refs"] == ["main"]
    assert model["size_bytes"] == sum(len(MODEL_FILES[name]) for name in NEEDED)
    assert before - 60 < model["last_used"] < before + 60
    assert Path(model["path"]) == folder
    table = tpserve("list").stdout
    assert f"org/story  {folder.name[:8]} (main)  6.1 MB  just now" in table


def test_rm_deletes_a_model_and_says_what_it_freed(tpserve: Run, tmp_path: Path) -> None:
    pulled(tpserve("pull", "org/story"))
    line = refused(tpserve("rm", "org/story"))
    assert "add --yes" in line
    assert len(listed(tpserve)) == 1
    result = tpserve("rm", "org/story", "--yes")
    assert result.stdout == "org/story deleted: 6.1 MB freed\n"
    assert listed(tpserve) == []
    assert not (tmp_path / "hf" / "hub" / "models--org--story").exists()
    assert "org/story is not in the cache" in refused(tpserve("rm", "org/story", "--yes"))


def test_rm_of_a_revision_leaves_the_others(hub: Stub, tpserve: Run) -> None:
    hub.add("org/story", MODEL_FILES | {"generation_config.json": b"{}"}, branch="v1")
    pulled(tpserve("pull", "org/story@v1"))
    main = pulled(tpserve("pull", "org/story"))
    assert "has no revision v2 of org/story" in refused(tpserve("rm", "org/story@v2", "--yes"))
    assert tpserve("rm", "org/story@v1", "--yes").stdout == "org/story@v1 deleted: 2 B freed\n"
    assert [model["revision"] for model in listed(tpserve)] == [main.name]
    assert (main / "model.safetensors").read_bytes() == MODEL_FILES["model.safetensors"]


def test_rm_refuses_folders(tpserve: Run, tmp_path: Path) -> None:
    assert "is no model of the hub" in refused(tpserve("rm", str(tmp_path), "--yes"))
    assert tmp_path.exists()


def test_show_describes_a_model_of_the_cache(hub: Stub, tpserve: Run) -> None:
    assert "tpserve pull org/story" in refused(tpserve("show", "org/story"))
    assert hub.requests == []
    folder = pulled(tpserve("pull", "org/story"))
    shown = json.loads(tpserve("show", "org/story", "--json").stdout)
    assert shown["path"] == str(folder)
    assert shown["problems"] == []
    assert shown["model_type"] == "llama"
    assert shown["tokenizer"] == "tokenizer.json"
    assert [file["name"] for file in shown["files"]] == NEEDED
    table = tpserve("show", "org/story").stdout
    assert "3,016,960" in table
    assert "not supported" not in table


def test_show_says_what_is_not_supported_and_what_it_can(tpserve: Run, tmp_path: Path) -> None:
    folder = tmp_path / "here" / "strange"
    folder.mkdir()
    config = {
        "model_type": "gpt_neox",
        "vocab_size": 99,
        "num_hidden_layers": 2,
        "torch_dtype": "f8",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("x")
    (folder / "model.safetensors").write_bytes(MODEL_FILES["model.safetensors"])
    shown = json.loads(tpserve("show", "strange", "--json").stdout)
    assert shown["vocab_size"] == 99
    assert shown["num_layers"] == 2
    assert shown["parameters"] == 3_016_960, "counted in the file"
    assert shown["has_chat_template"] is True
    assert len(shown["problems"]) == 2
    table = tpserve("show", "strange").stdout
    assert "not supported" in table
    assert "model_type" in table


def test_show_refuses_what_is_no_model(tpserve: Run, tmp_path: Path) -> None:
    assert "config.json is missing" in refused(tpserve("show", str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refused(tpserve("show", str(tmp_path)))


@pytest.mark.parametrize("header", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", bytes(8)])
def test_show_survives_broken_weights(tpserve: Run, tmp_path: Path, header: bytes) -> None:
    (tmp_path / "config.json").write_text('{"model_type": 7, "rope_scaling": [], "head_dim": "x"}')
    (tmp_path / "model.safetensors").write_bytes(header)
    shown = json.loads(tpserve("show", str(tmp_path), "--json").stdout)
    assert shown["parameters"] is None
    assert shown["model_type"] == "7"
    assert shown["problems"]
