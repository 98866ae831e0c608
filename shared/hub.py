"""What a user may call a model: a local folder, or a model of the Hugging Face hub.

The hub's library is loaded only when a model of the hub is asked for.
"""

import re
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from shared.errors import ModelError

Report = Callable[[str], None]
"""Takes one line for people."""

_SPEC = re.compile(
    r"(?!.*\.\.)(?P<name>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(@(?P<revision>[\w./+-]{1,255}))?",
    re.ASCII,
)


class HubModel(Struct, frozen=True):
    """A model of the hub."""

    name: str
    """ORG/NAME."""
    revision: str | None = None
    """Branch, tag or commit; None: the main branch."""

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def parse_hub_model(spec: str) -> HubModel | None:
    """What ORG/NAME or ORG/NAME@REVISION says; None for anything else."""
    match = _SPEC.fullmatch(spec)
    return HubModel(match["name"], match["revision"]) if match else None


def local_folder(spec: str) -> Path | None:
    """The folder of that name, absolute; None when there is none."""
    folder = Path(spec).expanduser()
    return folder.resolve() if spec and folder.is_dir() else None


def resolve_model(
    spec: str, *, offline: bool, report: Report | None = None, weights: bool = True
) -> Path:
    """The folder of a model: a local one if there is one, else it comes from the hub or its cache.

    Without `weights`, what comes from the hub may lack them: for those who only ask what it is.
    With `offline`, the hub is not asked and only the cache counts. `report` is told of a download,
    and every few seconds how far it is; on a terminal a line of standard error shows that.
    Raises ModelError saying what to do.
    """
    folder = local_folder(spec)
    if folder is not None:
        return folder
    model = parse_hub_model(spec)
    if model is None:
        raise ModelError(
            f"{spec!r} is neither a folder nor a model of the Hugging Face hub (ORG/NAME or "
            "ORG/NAME@REVISION): check the spelling"
        )
    from shared.hub_download import fetch

    return fetch(model, offline=offline, report=report or (lambda line: None), weights=weights)
