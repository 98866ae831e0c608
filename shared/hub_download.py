"""Models of the Hugging Face hub: download into the user's cache, or find there.

The cache, the token, the endpoint and proxies are huggingface_hub's own (HF_HOME, HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE); files that are complete are not downloaded again.
"""

import errno
import logging
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_cached_repo_tree, get_token, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import disable_progress_bars

from shared.errors import ModelError
from shared.hub import HubModel, Report
from shared.hub_progress import Progress, readable_bytes
from shared.model_config import INDEX_FILE, SINGLE_FILE

TEXT_FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
}

_POLL_S = 0.25
_TIMEOUT_S = 10.0
_MAIN = "main"

log = logging.getLogger(__name__)


def fetch(model: HubModel, *, offline: bool, report: Report, weights: bool = True) -> Path:
    """The folder of `model` in the cache; what is missing is downloaded, unless `offline`.

    Without `weights` those may be missing. A hub that cannot be reached is no error when the cache has the model. Raises ModelError.
    """
    with _quiet_library():
        if offline or constants.is_offline_mode():
            offline_by = (
                "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub was not asked"
            )
            return _cached(model, offline_by, weights)
        try:
            info = HfApi().model_info(
                model.name, revision=model.revision, files_metadata=True, timeout=_TIMEOUT_S
            )
        except (NetworkError, OSError, ValueError, TypeError, LookupError) as error:
            if _hub_is_away(error):
                why = f"{constants.ENDPOINT} cannot be reached ({_short(error)})"
                return _cached(model, why, weights)
            raise _explained(error, model) from None
        files = {file.rfilename: file for file in info.siblings or []}
        names = wanted_files(files)
        if not has_weights(names):
            raise ModelError(_without_weights(model, files))
        if info.sha is None:
            raise ModelError(f"{constants.ENDPOINT} names no commit for {model}: is it a hub?")
        if not weights:
            names = [name for name in names if name in TEXT_FILES]
        return _download(model, info.sha, [files[name] for name in names], report)


def wanted_files(names: Iterable[str]) -> list[str]:
    """Which of a repository's files a server needs: text side and one set of safetensors."""
    top = {name for name in names if "/" not in name}
    wanted = top & TEXT_FILES
    if SINGLE_FILE in top:
        wanted.add(SINGLE_FILE)
    elif INDEX_FILE in top:
        wanted.add(INDEX_FILE)
        wanted |= {
            name
            for name in top
            if name.endswith(".safetensors") and not name.startswith(("consolidated", "adapter"))
        }
    return sorted(wanted)


def has_weights(names: Iterable[str]) -> bool:
    """Whether there is what workers begin to read at."""
    return not {SINGLE_FILE, INDEX_FILE}.isdisjoint(names)


def cache_folder(model: HubModel) -> Path:
    """Where the cache has, or would have, all revisions of a model."""
    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{model.name.replace('/', '--')}"


def _download(model: HubModel, commit: str, files: list[RepoSibling], report: Report) -> Path:
    cache = cache_folder(model)
    snapshot = cache / "snapshots" / commit
    missing = {
        file.rfilename: file.size or 0
        for file in files
        if not (snapshot / file.rfilename).exists() and not _blob(cache, file).exists()
    }
    total = sum(missing.values())
    _check_disk(model, cache, total)
    stale = set(_partial_files(cache))
    progress = Progress(str(model), total, report) if missing else None
    with ThreadPoolExecutor(1) as executor:
        task = executor.submit(
            snapshot_download,
            model.name,
            revision=model.revision,
            allow_patterns=[file.rfilename for file in files],
        )
        try:
            while not _done(task):
                if progress is not None:
                    progress.update(_arrived(snapshot, missing, cache, stale))
        except KeyboardInterrupt:
            # The library's threads would go on to the end of their files.
            for path in set(_partial_files(cache)) - stale:
                path.unlink(missing_ok=True)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            if progress is not None:
                progress.close()
        try:
            return Path(task.result())
        except (NetworkError, XetDownloadError, RuntimeError, OSError, ValueError) as error:
            raise _explained(error, model) from None


def _blob(cache: Path, file: RepoSibling) -> Path:
    """Where the content of a file is kept for all revisions that have it."""
    return cache / "blobs" / str(file.lfs.sha256 if file.lfs else file.blob_id)


def _done(task: "Future[str]") -> bool:
    """Whether it has ended, after waiting a moment for that."""
    try:
        task.exception(timeout=_POLL_S)
    except TimeoutError:
        return task.done()
    return True


def _arrived(snapshot: Path, missing: dict[str, int], cache: Path, stale: set[Path]) -> int:
    """Bytes of the missing files that are on the disk by now."""
    complete = sum(size for name, size in missing.items() if (snapshot / name).exists())
    return complete + sum(_size(path) for path in set(_partial_files(cache)) - stale)


def _partial_files(cache: Path) -> list[Path]:
    return list((cache / "blobs").glob("*.incomplete"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # complete by now
        return 0


def _check_disk(model: HubModel, cache: Path, needed: int) -> None:
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ModelError(
            f"{model} needs {readable_bytes(needed)}, but {existing} has only "
            f"{readable_bytes(free)} free: make room (tpserve list, tpserve rm), or set HF_HOME to a "
            "folder on another disk"
        )


def _cached(model: HubModel, why: str, weights: bool) -> Path:
    """The folder in the cache. `why` the hub is not asked: for the error, or else the log."""
    try:
        tree = get_cached_repo_tree(model.name, revision=model.revision)
        names = wanted_files(file.path for file in tree)
        if not weights:
            names = [name for name in names if name in TEXT_FILES]
    except CachedRepoTreeNotFoundError:
        names = []  # another program's download, which kept no list
    try:
        folder = Path(
            snapshot_download(
                model.name,
                revision=model.revision,
                local_files_only=True,
                allow_patterns=names or None,
            )
        )
        complete = not weights or has_weights(names or [path.name for path in folder.iterdir()])
    except LocalEntryNotFoundError:
        complete = False
    except (HFValidationError, OSError) as error:
        raise _explained(error, model) from None
    if not complete:
        raise ModelError(
            f"there is no folder {model}, and the cache {constants.HF_HUB_CACHE} has no complete "
            f"{model}; {why}: run tpserve pull {model} where the hub can be reached (tpserve list shows what is in "
            "the cache)"
        )
    log.info("%s: the copy in the cache is used: %s", model, why)
    return folder


def _hub_is_away(error: Exception) -> bool:
    """Rather than having refused something."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, NetworkError)


def _explained(error: Exception, model: HubModel) -> ModelError:
    """What went wrong and what to do, in one line."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # it was not in the cache either; why it was looked for there
    where = constants.ENDPOINT
    token = _about_token()
    if isinstance(error, GatedRepoError):
        text = (
            f"{model.name} is gated, and {token}: ask for access at {where}/{model.name}, then set "
            "HF_TOKEN to a token of that account"
        )
    elif isinstance(error, RepositoryNotFoundError):
        text = (
            f"there is no folder {model.name}, and {where} has no model {model.name} that may be "
            f"read ({token}): check the spelling; a private model needs HF_TOKEN"
        )
    elif isinstance(error, RevisionNotFoundError):
        text = f"{model.name} has no revision {model.revision or _MAIN}: see {where}/{model.name}/tree/main"
    elif isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        text = f"{where} refuses {model} ({token}): set HF_TOKEN to a token that may read it"
    elif isinstance(error, HfHubHTTPError) and error.response.status_code == 429:
        text = f"{where} has had too many requests ({token}): try again later, or set HF_TOKEN"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = (
            f"the disk is full: make room in {constants.HF_HUB_CACHE} (tpserve list, tpserve rm), "
            "or set HF_HOME to a folder on another disk"
        )
    elif isinstance(error, OSError) and error.filename:
        text = f"{error.filename} cannot be used ({error.strerror}): set HF_HOME to a folder of your own"
    elif isinstance(error, HFValidationError):
        text = f"{model} is no name of the hub: {_short(error)}"
    elif isinstance(error, HfHubHTTPError):
        text = (
            f"{where} answers {error.response.status_code} when asked for {model}: check HF_ENDPOINT "
            "if you have set it, else try again later"
        )
    elif isinstance(error, ValueError | TypeError | LookupError):
        text = f"{where} does not answer as a hub does ({_short(error)}): check HF_ENDPOINT"
    else:
        text = (
            f"the download of {model} from {where} broke off ({_short(error)}): try again; "
            "complete files are kept"
        )
    return ModelError(text)


def _about_token() -> str:
    try:
        return "the token (HF_TOKEN) has no access" if get_token() else "no token is set"
    except OSError:
        return "the token file of HF_HOME cannot be read"


def _short(error: Exception) -> str:
    """The first line of what a library says."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)[:200]


def _without_weights(model: HubModel, names: Iterable[str]) -> str:
    endings = sorted(
        {Path(name).suffix for name in names} & {".bin", ".gguf", ".pth", ".pt", ".h5"}
    )
    others = f" (only {', '.join(endings)})" if endings else ""
    return (
        f"{model} has no {SINGLE_FILE} and no {INDEX_FILE}{others}, and nothing else is supported: "
        "choose a repository or revision with safetensors"
    )


@contextmanager
def _quiet_library() -> Iterator[None]:
    """What huggingface_hub would print is said here in other words."""
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.CRITICAL)
    for name in ("httpx", "httpx2"):  # a line for every request
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with disable_progress_bars():
            yield
    finally:
        hub_logging.set_verbosity(verbosity)
