"""A hub for tests: the part of the Hugging Face hub's HTTP that its library uses to download."""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_somebody_who_may"


@dataclass
class Repository:
    """Files by revision; a branch is the name of a commit."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    gated: bool = False
    private: bool = False


@dataclass
class Stub:
    """A server on a free port of this machine."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    cut_once: set[str] = field(default_factory=set)
    """Files whose first GET ends in the middle."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Range header) of each."""
    declared: dict[str, int] = field(default_factory=dict)
    """Sizes that the list of files gives in place of the true ones."""
    slow_s: float = 0.0
    """Pause after the first piece of a file."""

    def __enter__(self) -> "Stub":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Nobody answers at its address from then on."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def add(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit of the repository at the top of a branch; its hash."""
        content = repr((name, branch, sorted(files), [len(data) for data in files.values()]))
        commit = hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()
        repository = self.repositories.setdefault(name, Repository({}, {}))
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return commit

    def downloads(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return [
            path.rpartition("/")[2]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        ]


def _handler(stub: Stub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            stub.requests.append((self.command, path, self.headers.get("Range", "")))
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
                name, what, revision = match.groups()
                self._answer_api(name, what, revision or "main")
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._answer_file(*match.groups())
            elif path.startswith("/page/"):
                self._send(200, b"<html>")
            else:
                self._refuse(404, "NotFound")

        def _repository(self, name: str) -> Repository | None:
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            found = stub.repositories.get(name)
            return None if found is None or (found.private and not known) else found

        def _files(
            self, repository: Repository, revision: str
        ) -> tuple[str, dict[str, bytes]] | None:
            commit = repository.branches.get(revision, revision)
            return (commit, repository.commits[commit]) if commit in repository.commits else None

        def _answer_api(self, name: str, what: str | None, revision: str) -> None:
            repository = self._repository(name)
            if repository is None:
                return self._refuse(401, "RepoNotFound")
            found = self._files(repository, revision)
            if found is None:
                return self._refuse(404, "RevisionNotFound")
            commit, files = found
            if what == "tree":
                tree = [
                    {"type": "file", "path": file, "size": len(data), "oid": _etag(data)}
                    for file, data in files.items()
                ]
                return self._send(200, json.dumps(tree).encode())
            siblings = [
                {
                    "rfilename": file,
                    "size": stub.declared.get(file, len(data)),
                    "blobId": _etag(data),
                }
                for file, data in files.items()
            ]
            info = {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
            return self._send(200, json.dumps(info).encode())

        def _answer_file(self, name: str, revision: str, file: str) -> None:
            repository = self._repository(name)
            if repository is None:
                return self._refuse(401, "RepoNotFound")
            token = self.headers.get("Authorization") or ""
            if repository.gated and token != f"Bearer {TOKEN}":
                return self._refuse(403 if token else 401, "GatedRepo")
            found = self._files(repository, revision)
            if found is None or file not in found[1]:
                return self._refuse(404, "EntryNotFound")
            commit, data = found[0], found[1][file]
            headers = {
                "ETag": f'"{_etag(data)}"',
                "X-Repo-Commit": commit,
                "Accept-Ranges": "bytes",
            }
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if match is None:
                return self._send(200, data, headers, file)
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self._send(206, data[start:], headers, file)

        def _refuse(self, status: int, code: str) -> None:
            self._send(status, b"{}", {"X-Error-Code": code})

        def _send(
            self, status: int, body: bytes, headers: dict[str, str] | None = None, file: str = ""
        ) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if file in stub.cut_once:
                stub.cut_once.discard(file)
                body = body[: len(body) // 2]
                self.close_connection = True
            try:
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                if file and stub.slow_s:
                    time.sleep(stub.slow_s)
                self.wfile.write(body[len(body) // 2 :])
            except ConnectionError:
                self.close_connection = True  # the client has gone

    return Handler


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
