"""Hatchling's build hook: the native library goes into wheels and beside the sources of the editable.

Without a C++ compiler the wheel has none, and runs on torch's kernels.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.builders.wheel import WheelBuilderConfig

LIBRARY = "worker/native/libtpserve.so"


class NativeLibraryHook(BuildHookInterface[WheelBuilderConfig]):
    """Builds the library before hatchling collects the wheel's files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """`version` is the kind of wheel, "standard" or "editable"."""
        root = Path(self.root)
        # This folder's build, not that of a tpserve that is installed already (-ESs).
        build = subprocess.run([sys.executable, "-ESs", "-m", "worker.native.build"], cwd=root)
        if build.returncode == 0 and version != "editable":
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            # Loaded with ctypes: any Python will do, but not any machine.
            build_data["tag"] = f"py3-none-{platform}"
            build_data["force_include"][str(root / LIBRARY)] = LIBRARY
