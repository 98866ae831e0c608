"""Finds and loads the native library; what its functions do is known to those who call them.

The environment may say which library to use and whether to use one at all:

    TPSERVE_NATIVE_LIBRARY   a file in place of the library beside this module (a sanitized build)
    TPSERVE_KERNELS          native: it is an error if there is no library; torch: use none
"""

import ctypes
import os
from functools import cache
from pathlib import Path

from shared.errors import ConfigError
from worker.native.build import LIBRARY, SOURCES, Options, is_current

ABI_VERSION = 8
"""What tps_abi_version() of a library must return; raised with every change to its functions."""

_REMEDY = "make it again (python -m worker.native.build) or do without (TPSERVE_KERNELS=torch)"


@cache
def load_library() -> ctypes.CDLL | None:
    """The native library, or None where none is built or none is wanted.

    Raises ConfigError if the library is missing though the environment asks for it, does not load,
    is of another version, or was made from other sources than those beside it.
    """
    kernels = os.environ.get("TPSERVE_KERNELS", "")
    if kernels not in ("", "native", "torch"):
        raise ConfigError(f"TPSERVE_KERNELS is {kernels!r}; it can be native or torch")
    if kernels == "torch":
        return None
    if chosen := os.environ.get("TPSERVE_NATIVE_LIBRARY"):
        return _load(Path(chosen).resolve(), "TPSERVE_NATIVE_LIBRARY names a library that")
    if LIBRARY.exists():
        _refuse_stale()
        return _load(LIBRARY, f"the native library {LIBRARY}")
    if kernels == "native":
        raise ConfigError(
            f"TPSERVE_KERNELS is native, but there is no {LIBRARY}: "
            "python -m worker.native.build says why"
        )
    return None


def _refuse_stale() -> None:
    """An installed library comes without its sources; in a working tree they may have changed."""
    if any(SOURCES.glob("*.cpp")) and not is_current(Options()):
        raise ConfigError(f"{LIBRARY} was made from other sources than those beside it: {_REMEDY}")


def _load(path: Path, what: str) -> ctypes.CDLL:
    if not path.is_file():
        raise ConfigError(f"{what} is missing: {path}")
    try:
        library = ctypes.CDLL(str(path))
        version = library.tps_abi_version
    except (OSError, AttributeError) as error:
        raise ConfigError(f"{what} cannot be used ({error}): {_REMEDY}") from error
    version.argtypes, version.restype = (), ctypes.c_int32
    if version() != ABI_VERSION:
        raise ConfigError(f"{what} has version {version()}, needed is {ABI_VERSION}: {_REMEDY}")
    return library
