"""For servers of the tests that have this folder on PYTHONPATH: workers that a certain job ends.

TPSERVE_TEST_POISON is SEED,POSITION,RANK,HOW: the worker of that rank is lost in each step that computes
a token at that position or later for a sequence with that seed. HOW: kill, raise or hang. Python runs this at
its start; the fork server, and nobody else, then has `worker.runner` changed as it is imported.
"""

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from types import ModuleType
from typing import Any


class _Poisoned(importlib.abc.Loader):
    def __init__(self, spec: importlib.machinery.ModuleSpec) -> None:
        assert spec.loader is not None
        self._loader = spec.loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        seed, position, rank, how = os.environ["TPSERVE_TEST_POISON"].split(",")
        begin = module.Runner.begin

        def poisoned(self: Any, plan: Any, before: Any = None) -> Any:
            for s in plan.sequences:
                reached = s.start + max(1, len(s.tokens)) + plan.passes - 1
                if (
                    s.sampling is not None
                    and s.sampling.seed == int(seed)
                    and reached > int(position)
                    and self._comm.rank == int(rank)
                ):
                    _end(how)
            return begin(self, plan, before)

        module.Runner.begin = poisoned


def _end(how: str) -> None:
    if how == "raise":
        raise RuntimeError("poisoned")
    if how == "hang":
        time.sleep(3600)
    os.kill(os.getpid(), signal.SIGKILL)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "worker.runner":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        spec.loader = _Poisoned(spec)
        return spec


if "TPSERVE_TEST_POISON" in os.environ and "worker.fork_server" in sys.orig_argv:
    sys.meta_path.insert(0, _Finder())
