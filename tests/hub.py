"""A hub on 127.0.0.1: folders served as model repositories, over as much of the HTTP protocol as downloads need."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/models/(?P<repo>[^/]+(?:/[^/]+)??)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
_RESOLVE = re.compile(r"/(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_BLOCK_BYTES = 2**20
# A test's sparse file may be as large as the disk.
_MOST_HASHED_BYTES = 2**30

# What happens to one GET of a safetensors file: its connection is closed half-way, or it is answered 503.
Fault = Literal["cut", "unavailable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request as it came in."""

    method: str
    path: str
    token: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Repository:
    folder: Path
    commit: str
    gated: bool

    def has(self, revision: str) -> bool:
        return revision in ("main", self.commit)

    def files(self) -> dict[str, int]:
        paths = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}


@dataclass(slots=True, kw_only=True)
class Hub:
    """``weight_faults`` befall the next GETs of safetensors files, one each; the next ``unavailable`` requests,
    whatever they ask, are answered 503. While ``flowing`` is clear, safetensors files stop half-way.
    """

    url: str = ""
    token: str | None = None
    requests: list[Request] = field(default_factory=list)
    weight_faults: deque[Fault] = field(default_factory=deque)
    unavailable: int = 0
    flowing: threading.Event = field(default_factory=threading.Event)
    _repositories: dict[str, _Repository] = field(default_factory=dict)

    def publish(self, repo_id: str, folder: Path, *, gated: bool = False) -> str:
        """Serve ``folder`` as the repository's ``main``; returns the commit. A gated one opens to ``token`` alone."""
        listing = [(str(path), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))]
        commit = hashlib.sha1(json.dumps([repo_id, listing]).encode(), usedforsecurity=False).hexdigest()
        self._repositories[repo_id] = _Repository(folder=folder, commit=commit, gated=gated)
        return commit

    def reset(self) -> None:
        """Forget what was asked and what was to go wrong; the repositories stay."""
        self.requests.clear()
        self.weight_faults.clear()
        self.unavailable = 0
        self.token = None
        self.flowing.set()

    def repository(self, repo_id: str) -> _Repository | None:
        return self._repositories.get(repo_id)

    def weight_gets(self) -> list[str]:
        """The safetensors files that were asked for, one for each GET."""
        asked = (request.path for request in self.requests if request.method == "GET")
        return [path.rsplit("/", 1)[-1] for path in asked if path.endswith(".safetensors")]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub, until the context ends."""
    hub = Hub()
    hub.flowing.set()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.flowing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the base class's name)
        """Requests are kept in ``Hub.requests``, not printed."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api, resolve = _API.fullmatch(path), _RESOLVE.fullmatch(path)
        if api is None and resolve is None:
            # The library asks for other things of its own accord; they are no part of what a test counts.
            self._refuse(404, "")
            return
        self.served.requests.append(Request(method=self.command, path=path, token=self._token()))
        if self.served.unavailable > 0:
            self.served.unavailable -= 1
            self._refuse(503, "")
        elif api is not None:
            self._describe(api["repo"], api["what"] or "revision", api["revision"] or "main")
        elif resolve is not None:
            self._resolve(resolve["repo"], resolve["revision"], resolve["path"])

    def _token(self) -> str | None:
        header = self.headers.get("Authorization", "")
        return header.removeprefix("Bearer ") or None

    def _describe(self, repo_id: str, what: str, revision: str) -> None:
        repository = self._repository(repo_id, revision)
        if repository is None:
            return
        files = repository.files()
        if what == "tree":
            self._send_json([{"type": "file", "path": p, "size": n, "oid": _etag(p, n)} for p, n in files.items()])
            return
        siblings = [_sibling(repository.folder / path, path, size) for path, size in files.items()]
        self._send_json({"id": repo_id, "sha": repository.commit, "siblings": siblings})

    def _repository(self, repo_id: str, revision: str) -> _Repository | None:
        """None after a refusal was sent."""
        repository = self.served.repository(repo_id)
        if repository is None:
            self._refuse(404, "RepoNotFound")
        elif not repository.has(revision):
            self._refuse(404, "RevisionNotFound")
        else:
            return repository
        return None

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository = self._repository(repo_id, revision)
        if repository is None:
            return
        if repository.gated and (self.served.token is None or self._token() != self.served.token):
            self._refuse(403, "GatedRepo")
        elif path not in repository.files():
            self._refuse(404, "EntryNotFound")
        else:
            self._send_file(repository, path)

    def _send_file(self, repository: _Repository, path: str) -> None:
        is_weights = path.endswith(".safetensors") and self.command == "GET"
        fault = self.served.weight_faults.popleft() if is_weights and self.served.weight_faults else None
        if fault == "unavailable":
            self._refuse(503, "")
            return
        size = repository.files()[path]
        start = self._range_start()
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("ETag", f'"{_etag(path, size)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(size - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        middle = (start + size) // 2
        self._copy(repository.folder / path, start, middle)
        if fault == "cut":
            self.close_connection = True
            return
        if is_weights:
            self.served.flowing.wait()
        self._copy(repository.folder / path, middle, size)

    def _range_start(self) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(match[1]) if match else 0

    def _copy(self, path: Path, start: int, end: int) -> None:
        with path.open("rb") as file:
            file.seek(start)
            for position in range(start, end, _BLOCK_BYTES):
                self.wfile.write(file.read(min(_BLOCK_BYTES, end - position)))

    def _send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _sibling(file: Path, path: str, size: int) -> dict[str, Any]:
    """As the hub lists a file: what it keeps apart has a sha256 beside git's id."""
    if size > _MOST_HASHED_BYTES:
        return {"rfilename": path, "size": size}
    content = file.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % size + content, usedforsecurity=False).hexdigest()
    listed: dict[str, Any] = {"rfilename": path, "size": size, "blobId": blob}
    if path.endswith((".safetensors", ".bin")):
        sha256 = hashlib.sha256(content).hexdigest()
        listed["lfs"] = {"size": size, "sha256": sha256, "pointerSize": 134}
    return listed


def _etag(path: str, size: int) -> str:
    return hashlib.sha1(f"{path} {size}".encode(), usedforsecurity=False).hexdigest()
