"""The folder that holds the server's sockets: private, locked while in use, removed at the end."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from shared.errors import ConfigError

_PREFIX = "tpserve-"
_LOCK = "lock"
_LONGEST = 80
"""A Unix socket's path may have 107 bytes; our socket names take up to 25."""


class RunDir:
    """A locked run directory."""

    def __init__(self, chosen: str) -> None:
        """Take `chosen`, or make a temporary folder. Raises ConfigError if a live server has it.

        What a dead server left in `chosen`, or in temporary folders of ours, is removed.
        """
        if chosen:
            self.path = Path(chosen).expanduser().resolve()
            self._make()
        else:
            base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
            if not os.access(base, os.W_OK):
                base = Path(tempfile.gettempdir())
            _remove_dead(base)
            _check_length(base / (_PREFIX + "12345678"))
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        lock = _lock(self.path)
        if lock is None:
            raise ConfigError(f"run_dir {self.path} is in use by another tpserve")
        self._lock = lock
        self._remove_sockets()

    def _make(self) -> None:
        _check_length(self.path)
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.path.stat()
        except OSError as error:
            raise ConfigError(f"run_dir {self.path}: {error.strerror}") from None
        if owner.st_uid != os.getuid() or owner.st_mode & 0o077:
            raise ConfigError(f"run_dir {self.path} must belong to you alone: chmod 700 it")

    def close(self) -> None:
        """Remove what we put there, and the folder if nothing else is in it."""
        self._remove_sockets()
        (self.path / _LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()
        os.close(self._lock)

    def _remove_sockets(self) -> None:
        for pattern in ("workers", "mesh-*", "gloo-*"):
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)


def _check_length(path: Path) -> None:
    if len(os.fsencode(path)) > _LONGEST:
        raise ConfigError(f"run_dir {path} is too long for Unix sockets: at most {_LONGEST} bytes")


def _lock(folder: Path) -> int | None:
    """An exclusive lock on `folder`, as a descriptor; None if somebody has it."""
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _remove_dead(base: Path) -> None:
    """Remove temporary run directories whose server is gone."""
    for folder in base.glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):
            # A folder without a lock file is being made by another server right now.
            if folder.stat().st_uid != os.getuid() or not (folder / _LOCK).exists():
                continue
            lock = _lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
