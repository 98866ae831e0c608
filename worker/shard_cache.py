"""Packed weights on disk, so that the same model loads faster next time.

Packing int8 and int4 reads and searches through all of a checkpoint; a cache file holds the result for
one rank, byte by byte as the kernels want it. Files are named by a hash of all that the result depends
on, and every weight in them is checked by its own hash: what does not match is packed again.
"""

import ctypes
import hashlib
import logging
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from worker.native.library import ABI_VERSION

log = logging.getLogger("worker.shard_cache")

SUFFIX = ".shard"
_ENTRY = struct.Struct("<Q32s")
"""Before each weight: its bytes, and their SHA-256."""


class ShardCache:
    """The cache file of one model on one rank, while it is loaded: read if it is there, else written."""

    def __init__(self, folder: Path, key: str) -> None:
        """`key` from `cache_key`. A folder that cannot be used is worth a warning, no more."""
        self._path = folder / (key + SUFFIX)
        self._reader: IO[bytes] | None = None
        self._writer: IO[bytes] | None = None
        self._hits = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self._reader = self._path.open("rb", buffering=0)
            else:
                self._writer = tempfile.NamedTemporaryFile(  # noqa: SIM115 - `close` ends it
                    dir=folder, prefix=".", suffix=".tmp", delete=False
                )
        except OSError as error:
            log.warning("the shard cache %s cannot be used: %s", folder, error)

    def read(self, address: int, size: int) -> bool:
        """Fill `size` bytes at `address` with the next weight, if the cache has it and it is whole."""
        if self._reader is None:
            return False
        try:
            entry = self._reader.read(_ENTRY.size)
            if len(entry) == _ENTRY.size and _read(self._reader, entry, address, size):
                self._hits += 1
                return True
            log.warning("%s is broken; it is made again next time", self._path)
            self._path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be read: %s", self._path, error)
        self._reader.close()
        self._reader = None
        return False

    def write(self, address: int, size: int) -> None:
        """Keep the next weight, which was packed at `address`."""
        if self._writer is None:
            return
        data = _memory(address, size)
        try:
            self._writer.write(_ENTRY.pack(size, hashlib.sha256(data).digest()))
            self._writer.write(data)
        except OSError as error:
            log.warning("the shard cache cannot be written: %s", error)
            self.close(complete=False)

    def close(self, complete: bool) -> None:
        """The model is loaded (`complete`), or will not be."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self._writer is not None:
            writer, self._writer = self._writer, None
            try:
                writer.close()
                if complete:
                    Path(writer.name).replace(self._path)
                    return
            except OSError as error:
                log.warning("the shard cache cannot be written: %s", error)
            Path(writer.name).unlink(missing_ok=True)


def cache_key(folder: Path, facts: Mapping[str, object]) -> str:
    """Of a checkpoint's files and of what else its packed form depends on.

    Files count by size, time and header, links by where they lead: the hub's cache names what they
    lead to by its content. The weights themselves are not read.
    """
    digest = hashlib.sha256(f"packing {ABI_VERSION}".encode())
    for name, fact in sorted(facts.items()):
        digest.update(f"|{name}={fact}".encode())
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors*")]):
        status = path.stat()
        digest.update(
            f"|{path.name} {path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()
        )
    return digest.hexdigest()[:40]


def _read(file: IO[bytes], entry: bytes, address: int, size: int) -> bool:
    length, expected = _ENTRY.unpack(entry)
    if length != size:
        return False
    data, at = _memory(address, size), 0
    while at < size:
        count = file.readinto(data[at:])  # type: ignore[attr-defined]
        if not count:
            return False
        at += count
    return bool(hashlib.sha256(data).digest() == expected)


def _memory(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")
