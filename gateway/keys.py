"""API keys: where they come from, and the comparison with what a client sends.

Only digests are kept, and every comparison takes the same time.
"""

import hashlib
import hmac
import re
from collections.abc import Sequence
from pathlib import Path

from shared.errors import ConfigError

_MIN_LENGTH = 8


class Keys:
    """The keys by name; empty: everybody may come in."""

    def __init__(self, digests: dict[str, bytes]) -> None:
        self._digests = digests

    def __bool__(self) -> bool:
        return bool(self._digests)

    def name_of(self, key: str) -> str | None:
        """Whose key it is; None when it is nobody's."""
        seen = _digest(key)
        found = None
        for name, digest in self._digests.items():
            if hmac.compare_digest(seen, digest):
                found = name  # no return: how long this takes must not tell which one it was
        return found


def read_keys(keys: Sequence[str], file: str) -> Keys:
    """Keys of flags and of a file. Raises ConfigError; no message has a key in it."""
    digests: dict[str, bytes] = {}
    for number, key in enumerate(keys, start=1):
        digests[f"key-{number}"] = _digest(_checked(key, f"api_key number {number}"))
    if not file:
        return Keys(digests)
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"api_key_file {file}: {reason}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, key = (part.strip() for part in line.partition(":"))
        if not (colon and re.fullmatch(r"[\w.@-]{1,64}", name)):
            raise ConfigError(f"api_key_file {file}, line {number}: write name:KEY or name:SHA256")
        if name in digests:
            raise ConfigError(f"api_key_file {file}, line {number}: {name!r} is there twice")
        if re.fullmatch(r"[0-9a-f]{64}", key):
            digests[name] = bytes.fromhex(key)
        else:
            digests[name] = _digest(_checked(key, f"the key of {name!r} in {file}"))
    if not digests:
        raise ConfigError(f"api_key_file {file} has no keys: write lines name:KEY")
    return Keys(digests)


def _checked(key: str, what: str) -> str:
    if len(key) < _MIN_LENGTH or not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(
            f"{what} is not a key: at least {_MIN_LENGTH} visible ASCII characters, no spaces"
        )
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
