"""requirements.lock and requirements-dev.lock pin all that pyproject.toml asks for."""

import importlib.metadata
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUNTIME = [*PYPROJECT["project"]["dependencies"], *PYPROJECT["build-system"]["requires"]]
DEV = PYPROJECT["project"]["optional-dependencies"]["dev"]
CUDA_PREFIXES = ("cuda-", "nvidia-", "triton")


def lines(name: str) -> Iterator[str]:
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("-r "):
            yield from lines(line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            yield line


def pins(name: str) -> dict[str, Version]:
    found: dict[str, Version] = {}
    for line in lines(name):
        package, separator, version = line.partition("==")
        assert separator, f"{name}: {line!r} is not NAME==VERSION"
        found[canonicalize_name(package)] = Version(version)
    return found


@pytest.mark.parametrize(
    ("lock", "wanted"),
    [("requirements.lock", RUNTIME), ("requirements-dev.lock", [*RUNTIME, *DEV])],
)
def test_every_direct_dependency_is_pinned_within_its_range(lock: str, wanted: list[str]) -> None:
    pinned = pins(lock)
    for requirement in map(Requirement, wanted):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{lock} lacks {requirement}: run scripts/lock.py"
        assert version in requirement.specifier, f"{lock} has {version} for {requirement}"


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_what_pinned_packages_need_is_pinned_too(lock: str) -> None:
    pinned = pins(lock)
    missing = {
        f"{name} needs {needed}"
        for name in pinned
        for needed in map(Requirement, importlib.metadata.requires(name) or [])
        if needed.marker is None or needed.marker.evaluate({"extra": ""})
        if canonicalize_name(needed.name) not in pinned
        if not needed.name.startswith(CUDA_PREFIXES)
    }
    assert missing == set()


def test_the_pinned_versions_are_the_installed_ones() -> None:
    for name, version in pins("requirements-dev.lock").items():
        installed = Version(importlib.metadata.version(name))
        assert installed.public == version.public, f"{name} is {installed}, pinned is {version}"


def test_cuda_is_left_to_torch() -> None:
    assert [name for name in pins("requirements-dev.lock") if name.startswith(CUDA_PREFIXES)] == []
