"""Reads a rank's own slices from a safetensors checkpoint, single or indexed over several files.

Every tensor's shape is checked against the configuration before its bytes are used; every problem
is a ModelError naming file and tensor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta, Struct
from safetensors import SafetensorError, safe_open

from shared.errors import ModelError
from shared.model_config import INDEX_FILE, SINGLE_FILE

_FLOAT_DTYPES = ("F32", "BF16", "F16")


class _Index(Struct):
    weight_map: dict[Annotated[str, Meta(max_length=1024)], str]


class Checkpoint:
    """The tensors of a model folder, read slice by slice."""

    def __init__(self, folder: Path) -> None:
        """Open every file and check that it is whole. Raises ModelError."""
        self._folder = folder
        self._files: dict[str, Path] = {}  # tensor name -> file
        self._handles: dict[Path, Any] = {}
        index = folder / INDEX_FILE
        if index.exists():
            self._files = self._read_index(index)
        elif (folder / SINGLE_FILE).exists():
            path = folder / SINGLE_FILE
            self._files = dict.fromkeys(self._open(path).keys(), path)
        else:
            raise ModelError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")
        for name, path in self._files.items():
            if name not in self._keys(path):
                raise ModelError(
                    f"{path}: tensor {name!r} is missing, though {INDEX_FILE} names it"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: range | None = None,
        columns: range | None = None,
    ) -> torch.Tensor:
        """A contiguous copy of `rows` and `columns` (None: all) of tensor `name`, in the file's dtype.

        `shape` is what the whole tensor must have. Raises ModelError.
        """
        with self._naming(name) as path:
            piece = self._slice(path, name, shape)
            index = tuple(
                slice(r.start, r.stop) if r is not None else slice(None)
                for r in (rows, columns)[: len(shape)]
            )
            # copy=True: the slice is a view of the file's mapping, which must not be kept alive.
            own: torch.Tensor = piece[index]
            return own.clone(memory_format=torch.contiguous_format)

    def map(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The whole tensor as a view of the file, in the file's dtype.

        Its pages are shared with every other process that maps the file. It gets a mapping of its
        own, so that pages touched while other tensors were read do not count as this process's.
        """
        with self._naming(name) as path:
            self._slice(path, name, shape)
            return _open(path).get_tensor(name)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Drop the mappings that `read` used."""
        self._handles.clear()

    def _slice(self, path: Path, name: str, shape: tuple[int, ...]) -> Any:
        piece = self._open(path).get_slice(name)
        found, dtype = tuple(piece.get_shape()), piece.get_dtype()
        if found != shape:
            raise ModelError(
                f"{path}: tensor {name!r} has shape {list(found)}, config.json asks for {list(shape)}"
            )
        if dtype not in _FLOAT_DTYPES:
            raise ModelError(
                f"{path}: tensor {name!r} has dtype {dtype}, not one of {', '.join(_FLOAT_DTYPES)}"
            )
        return piece

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            self._handles[path] = _open(path)
        return self._handles[path]

    def _keys(self, path: Path) -> set[str]:
        return set(self._open(path).keys())

    @contextmanager
    def _naming(self, name: str) -> Iterator[Path]:
        if name not in self._files:
            raise ModelError(f"{self._folder}: tensor {name!r} is missing")
        try:
            yield self._files[name]
        except (SafetensorError, RuntimeError) as error:
            raise ModelError(f"{self._files[name]}: tensor {name!r}: {error}") from None

    def _read_index(self, index: Path) -> dict[str, Path]:
        try:
            weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ModelError(f"{index}: {error}") from None
        files = {}
        for name, file in weight_map.items():
            path = (self._folder / file).resolve()
            if path.parent != self._folder.resolve():
                # The hub's cache links files elsewhere; what counts is the name, not its target.
                if "/" in file or "\\" in file or file in ("", ".", ".."):
                    raise ModelError(f"{index}: {file!r} of tensor {name!r} is outside the folder")
                path = self._folder / file
            files[name] = path
        return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from None
