"""The project's own rules about imports, read from the source: who may know whom, and no pickle."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "shared": set[str](),
    "coordinator": {"shared"},
    "worker": {"shared"},
    "client": {"shared"},
    "gateway": {"client", "shared"},
}
"""Which other packages of the project each package may import."""

WITHOUT_TORCH = ("shared", "coordinator", "client", "gateway")
SUPPORT = ("benchmarks", "models", "scripts", "tests")
"""Folders of code that is not served; nothing in the packages may import it."""

IMPORTS_INSIDE_FUNCTIONS = {
    (
        "coordinator/__main__.py",
        "coordinator.choose",
    ): "half a second to import, for who has not chosen the number of workers",
    (
        "coordinator/__main__.py",
        "coordinator.server",
    ): "it takes a second to import, and the fork server is to begin before that",
    (
        "shared/hub.py",
        "shared.hub_download",
    ): "huggingface_hub takes a quarter of a second to import",
    (
        "worker/comm/device.py",
        "worker.comm.torch_dist",
    ): "torch.distributed takes a second to import",
    ("worker/comm/open.py", "worker.comm.torch_dist"): "torch.distributed takes a second to import",
    ("worker/comm/torch_dist.py", "torch.distributed"): "a torch without NCCL has no such name",
    ("worker/compare/__main__.py", "worker.compare.plot"): "matplotlib takes a second to import",
    ("worker/ops/choose.py", "worker.ops.triton.elementwise"): "torch for the CPU has no Triton",
    ("worker/ops/choose.py", "worker.ops.triton.kernels"): "torch for the CPU has no Triton",
}
"""(file, module) -> why it cannot stand at the top of the file."""

PICKLERS = {"pickle", "cPickle", "_pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib"}
PICKLING_TORCH_CALLS = {"torch.load", "torch.save"}
PICKLING_METHODS = {
    "send_pyobj",
    "recv_pyobj",
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}
"""Of pyzmq's sockets and of torch.distributed."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def where(path: Path, node: ast.stmt | ast.expr) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def imported(node: ast.AST) -> list[str]:
    """Full names of the modules that an import statement names; those of a relative one are ours."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
        return [node.module]
    return []


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(place, module) of every import in the file, wherever it stands."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for module in imported(node):
                yield where(path, node), module


def dotted(node: ast.expr) -> str:
    """`torch.load` of the expression torch.load; "" for anything but names and dots."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def last_name(expression: ast.expr) -> str:
    """`load` of the expression torch.load."""
    return dotted(expression).rpartition(".")[2]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_the_packages_below_them(package: str) -> None:
    forbidden = {*MAY_IMPORT, *SUPPORT} - MAY_IMPORT[package] - {package}
    wrong = [
        f"{place} imports {module}"
        for path in sources(package)
        for place, module in imports(path)
        if module.partition(".")[0] in forbidden
    ]
    assert wrong == []


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_only_workers_import_torch(package: str) -> None:
    wrong = [
        f"{place} imports {module}"
        for path in sources(package)
        for place, module in imports(path)
        if module.partition(".")[0] == "torch"
    ]
    assert wrong == []


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_torch_is_not_loaded_through_a_dependency(package: str) -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sources(package)
    ]
    code = "\n".join(
        [f"import {module}" for module in modules]
        + ["import sys", "sys.exit('torch was loaded' if 'torch' in sys.modules else 0)"]
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_no_import_is_hidden_behind_type_checking() -> None:
    wrong = [
        where(path, node)
        for path in sources(*MAY_IMPORT, *SUPPORT)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Name | ast.Attribute)
        if last_name(node) == "TYPE_CHECKING"
    ]
    assert wrong == []


def test_nothing_is_pickled() -> None:
    wrong = []
    for path in sources(*MAY_IMPORT, *SUPPORT):
        for place, module in imports(path):
            if module.partition(".")[0] in PICKLERS:
                wrong.append(f"{place} imports {module}")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and pickles(node):
                wrong.append(f"{where(path, node)} calls {dotted(node.func)}")
    assert wrong == []


def pickles(call: ast.Call) -> bool:
    return (
        dotted(call.func) in PICKLING_TORCH_CALLS
        or last_name(call.func) in PICKLING_METHODS
        or any(
            keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False"
            for keyword in call.keywords
        )
    )


def test_imports_stand_at_the_top_of_the_file_unless_there_is_a_reason() -> None:
    found = set()
    for path in sources(*MAY_IMPORT):
        for function in ast.walk(parse(path)):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    for module in imported(node):
                        found.add((path.relative_to(ROOT).as_posix(), module))
    # Equal, so that an entry goes when its import does.
    assert found == set(IMPORTS_INSIDE_FUNCTIONS)
