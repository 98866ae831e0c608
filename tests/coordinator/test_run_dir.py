"""The run directory is private, exclusive, and leaves nothing behind."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.run_dir import RunDir
from shared.errors import ConfigError


@pytest.fixture(autouse=True)
def own_runtime_folder(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path))


def test_it_is_private_and_removed_at_the_end(short_path: Path) -> None:
    run_dir = RunDir("")
    assert run_dir.path.parent == short_path
    assert stat.S_IMODE(run_dir.path.stat().st_mode) == 0o700
    (run_dir.path / "workers").touch()
    run_dir.close()
    assert list(short_path.iterdir()) == []


def test_a_live_servers_folder_is_refused(short_path: Path) -> None:
    chosen = short_path / "mine"
    first = RunDir(str(chosen))
    with pytest.raises(ConfigError, match="in use"):
        RunDir(str(chosen))
    first.close()
    RunDir(str(chosen)).close()


def test_what_a_killed_server_left_is_removed(short_path: Path) -> None:
    code = (
        "import os; from coordinator.run_dir import RunDir; d = RunDir('');"
        "(d.path / 'workers').touch(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    left = list(short_path.iterdir())
    assert len(left) == 1
    run_dir = RunDir("")
    assert not left[0].exists()
    run_dir.close()


def test_live_temporary_folders_are_left_alone() -> None:
    first, second = RunDir(""), RunDir("")
    assert first.path.exists()
    assert first.path != second.path
    first.close()
    second.close()


def test_a_folder_that_others_can_enter_is_refused(short_path: Path) -> None:
    chosen = short_path / "open"
    chosen.mkdir()
    os.chmod(chosen, 0o755)  # noqa: PTH101
    with pytest.raises(ConfigError, match="chmod 700"):
        RunDir(str(chosen))


def test_a_path_too_long_for_sockets_is_refused(short_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long"):
        RunDir(str(short_path / ("x" * 100)))
