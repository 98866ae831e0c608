"""The web page: the files that `npm run build` in gateway/webui has made, from memory.

They hold no data, so they are given without a key; the page asks for it and sends it with its calls.
"""

import gzip
import hashlib
import mimetypes
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).resolve().parent / "webui" / "dist"
_INDEX = "/index.html"
_SECURITY_HEADERS = {
    # No inline script or style, nothing from elsewhere: what a model writes stays text.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_FOR_EVER = "public, max-age=31536000, immutable"
"""For files with a digest of their content in the name."""
_ASK_EACH_TIME = "no-cache"
_COMPRESSIBLE = ("text/", "image/svg+xml")


@dataclass(frozen=True)
class PageFile:
    """One file as it is sent."""

    content: bytes
    compressed: bytes | None
    """With gzip; None where that gains nothing."""
    headers: dict[str, str]


def read_page(folder: Path = FOLDER) -> dict[str, PageFile]:
    """The files by the path of their URL; the page itself is at /. Raises OSError."""
    files = {
        f"/{path.relative_to(folder).as_posix()}": _read_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return {"/": _read_file(folder / _INDEX.lstrip("/")), **files}


def page_routes(files: dict[str, PageFile]) -> APIRouter:
    """GET and HEAD of the files."""
    router = APIRouter()

    async def send(request: Request) -> Response:
        file = files.get(request.url.path)
        if file is None:
            raise HTTPException(404)
        return _answer(request, file)

    # A pattern for the files with a digest: requests are counted by route, see RequestLog.
    patterns = {"/assets/{name}" if path.startswith("/assets/") else path for path in files}
    for pattern in sorted(patterns):
        router.add_api_route(pattern, send, methods=["GET", "HEAD"])
    return router


def _read_file(path: Path) -> PageFile:
    content = path.read_bytes()
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    compressed = gzip.compress(content, mtime=0) if kind.startswith(_COMPRESSIBLE) else None
    is_named_by_content = path.parent.name == "assets"
    headers = {
        "Content-Type": f"{kind}; charset=utf-8" if kind.startswith("text/") else kind,
        "Cache-Control": _FOR_EVER if is_named_by_content else _ASK_EACH_TIME,
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        "Vary": "Accept-Encoding",
        **_SECURITY_HEADERS,
    }
    return PageFile(content, compressed, headers)


def _answer(request: Request, file: PageFile) -> Response:
    if request.headers.get("if-none-match") == file.headers["ETag"]:
        return Response(status_code=304, headers=file.headers)
    if file.compressed is not None and "gzip" in request.headers.get("accept-encoding", ""):
        return Response(file.compressed, headers={**file.headers, "Content-Encoding": "gzip"})
    return Response(file.content, headers=file.headers)
