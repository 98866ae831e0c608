"""What the Hugging Face cache holds, and how it is taken out."""

import shutil
from pathlib import Path

from huggingface_hub import CachedRepoInfo, HFCacheInfo, constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from msgspec import Struct

from shared.errors import ModelError
from shared.hub import HubModel
from shared.hub_download import cache_folder


class CachedModel(Struct, frozen=True, kw_only=True):
    """One revision of a model."""

    name: str
    revision: str
    """Commit."""
    refs: list[str]
    """Branches and tags that are at this commit, as far as the cache knows."""
    size_bytes: int
    last_used: float
    """Of any revision of the model; seconds since the epoch."""
    path: str


class Removal(Struct, frozen=True, kw_only=True):
    """What is to be taken out of the cache."""

    model: HubModel
    commits: list[str]
    size_bytes: int
    """That will be free; other revisions may share files."""


def cached_models() -> list[CachedModel]:
    """All models of the cache, by name; those of a repository's revisions, newest first."""
    info = _scan()
    repos = [] if info is None else [repo for repo in info.repos if repo.repo_type == "model"]
    return [
        CachedModel(
            name=repo.repo_id,
            revision=revision.commit_hash,
            refs=sorted(revision.refs),
            size_bytes=revision.size_on_disk,
            last_used=repo.last_accessed,
            path=str(revision.snapshot_path),
        )
        for repo in sorted(repos, key=lambda repo: repo.repo_id.lower())
        for revision in sorted(repo.revisions, key=lambda item: -item.last_modified)
    ]


def plan_removal(model: HubModel) -> Removal:
    """What would go. Raises ModelError when the cache does not have the model or its revision."""
    info = _scan()
    repo = None if info is None else _find(info, model)
    folder = cache_folder(model)
    if info is None or repo is None or not repo.revisions:
        if model.revision is None and folder.is_dir():  # the rest of a download that never ended
            return Removal(model=model, commits=[], size_bytes=_size(folder))
        raise ModelError(
            f"{model.name} is not in the cache {constants.HF_HUB_CACHE}: tpserve list shows what is"
        )
    commits = [
        item.commit_hash
        for item in repo.revisions
        if model.revision is None
        or model.revision in item.refs
        or (len(model.revision) >= 7 and item.commit_hash.startswith(model.revision))
    ]
    if not commits:
        known = ", ".join(
            sorted({name for item in repo.revisions for name in (*item.refs, item.commit_hash[:8])})
        )
        raise ModelError(
            f"the cache has no revision {model.revision} of {model.name} (it has {known})"
        )
    size = info.delete_revisions(*commits).expected_freed_size
    return Removal(model=model, commits=sorted(commits), size_bytes=size)


def remove(removal: Removal) -> None:
    """Do it. Raises ModelError when files cannot be deleted."""
    info = _scan()
    folder = cache_folder(removal.model)
    try:
        if info is not None and removal.commits:
            info.delete_revisions(*removal.commits).execute()
        if removal.model.revision is None and folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise ModelError(f"{folder} cannot be deleted: {error.strerror}") from None
    if folder.exists() and removal.model.revision is None:
        raise ModelError(f"{folder} cannot be deleted: is it yours?")


def _scan() -> HFCacheInfo | None:
    """None: there is no cache yet."""
    try:
        return scan_cache_dir()
    except (CacheNotFound, ValueError):
        return None
    except OSError as error:
        raise ModelError(
            f"the cache {constants.HF_HUB_CACHE} cannot be read: {error.strerror}"
        ) from None


def _find(info: HFCacheInfo, model: HubModel) -> CachedRepoInfo | None:
    found = (r for r in info.repos if r.repo_type == "model" and r.repo_id == model.name)
    return next(found, None)


def _size(folder: Path) -> int:
    return sum(
        path.lstat().st_size for path in folder.rglob("*") if path.is_file() or path.is_symlink()
    )
