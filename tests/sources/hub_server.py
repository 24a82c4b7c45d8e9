"""A stand-in for the Hugging Face Hub on loopback: real HTTP, real files, what huggingface_hub asks for.

    server = HubServer()
    server.add("org/name", folder)           every file of the folder, at a made-up commit, as branch main
    with server: ...                         server.url is for HF_ENDPOINT or HubOptions(endpoint=...)
    server.requests                          what was asked for, with the bytes served

It serves /api/models/{id}[/revision/{rev}], /api/models/{id}/tree/{rev} and /{id}/resolve/{rev}/{file} with
HEAD and ranges. A repository can be gated (403 without the token) or private (401 without the token), as the
Hub answers them. `xet` says of one that its files are in Xet storage, at a URL where a test has a server or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

from tests.http_server import HttpServer

__all__ = ["Handler", "HubRepo", "HubServer", "Request"]

_API = re.compile(
    r"/api/models/(?P<id>[^/]+(?:/[^/]+)?)(?:/(?P<kind>revision|tree|xet-read-token)/(?P<rev>[^/]+)(?P<under>/.*)?)?"
)
_RESOLVE = re.compile(r"/(?P<id>[^/]+(?:/[^/]+)?)/resolve/(?P<rev>[^/]+)/(?P<name>.+)")


@dataclass
class HubRepo:
    """One repository at one commit; `access` is 'public', 'gated' or 'private'."""

    folder: Path
    commit: str
    access: str = "public"
    branches: tuple[str, ...] = ("main",)
    xet: str = ""

    def files(self) -> dict[str, Path]:
        found = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in found}


@dataclass(frozen=True)
class Request:
    """One answered request: `body_bytes` is the length of the body that was sent."""

    method: str
    path: str
    status: int
    body_bytes: int


@dataclass
class HubServer:
    """Serves repositories from a thread while it is used as a context."""

    token: str = "hf_test_token"
    repos: dict[str, HubRepo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._http = HttpServer(("127.0.0.1", 0), self.handler())
        self._http.hub = self  # type: ignore[attr-defined]
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    @staticmethod
    def handler() -> type[Handler]:
        """What answers requests; tests/publish has one that takes uploads too."""
        return Handler

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def add(self, repo_id: str, folder: Path, access: str = "public") -> HubRepo:
        commit = hashlib.sha1(f"{repo_id} {folder}".encode()).hexdigest()
        self.repos[repo_id] = HubRepo(folder=folder, commit=commit, access=access)
        return self.repos[repo_id]

    def body_bytes(self, suffix: str = "") -> int:
        """Bytes served in bodies, of paths with this ending."""
        return sum(request.body_bytes for request in self.requests if request.path.endswith(suffix))

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._thread.join(timeout=60)
        self._http.server_close()
        for connection in list(self._connections):  # kept alive by clients: a closed server must not answer on them
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def setup(self) -> None:
        super().setup()
        self.hub._connections.add(self.connection)

    def finish(self) -> None:
        self.hub._connections.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := _API.fullmatch(path):
            self._api(match["id"], match["kind"], match["rev"] or "main", (match["under"] or "").strip("/"))
        elif match := _RESOLVE.fullmatch(path):
            self._resolve(match["id"], match["rev"], match["name"])
        else:
            self._error(404, None, "no such page")

    do_HEAD = do_GET  # noqa: N815

    def _repo(self, repo_id: str, revision: str, *, file: bool) -> HubRepo | None:
        """The repository, or None after the error that the Hub answers has been sent."""
        repo = self.hub.repos.get(repo_id)
        trusted = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repo is None or (repo.access == "private" and not trusted):
            # As the Hub does: a private repository looks like one that does not exist.
            self._error(404 if trusted else 401, "RepoNotFound", "Repository not found")
        elif file and repo.access == "gated" and not trusted:
            self._error(403, "GatedRepo", f"Access to model {repo_id} is restricted.")
        elif revision != repo.commit and revision not in repo.branches:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repo
        return None

    def _api(self, repo_id: str, kind: str | None, revision: str, under: str) -> None:
        if (repo := self._repo(repo_id, revision, file=False)) is None:
            return
        sizes = {name: path.stat().st_size for name, path in repo.files().items()}
        if kind == "xet-read-token":
            token = {"X-Xet-Cas-Url": repo.xet, "X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": "9999999999"}
            self._send(200, b"{}", "application/json", token)
            return
        if kind == "tree":
            inside = {name: size for name, size in sizes.items() if not under or name.startswith(f"{under}/")}
            self._json([{"type": "file", "path": n, "size": s, "oid": _oid(n)} for n, s in inside.items()])
            return
        siblings = [{"rfilename": name, "size": size, "blobId": _oid(name)} for name, size in sizes.items()]
        gated = "manual" if repo.access == "gated" else False
        self._json({"id": repo_id, "modelId": repo_id, "sha": repo.commit, "gated": gated, "siblings": siblings})

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        if (repo := self._repo(repo_id, revision, file=True)) is None:
            return
        path = repo.files().get(name)
        if path is None:
            self._error(404, "EntryNotFound", f"{name} does not exist", {"X-Repo-Commit": repo.commit})
            return
        size = path.stat().st_size
        headers = {
            "X-Repo-Commit": repo.commit,
            "X-Linked-Size": str(size),
            "ETag": f'"{_oid(f"{repo.commit}/{name}")}"',
            "Accept-Ranges": "bytes",
        }
        if repo.xet:
            route = f"{self.hub.url}/api/models/{repo_id}/xet-read-token/{repo.commit}"
            headers |= {"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": route}
        start, end, status = 0, size, 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end, status = int(asked[1]), min(int(asked[2] or size) + 1, size), 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        with open(path, "rb") as handle:
            handle.seek(start)
            self._send(status, handle.read(end - start), "application/octet-stream", headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), "application/json", {})

    def _error(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        headers = {**(headers or {}), "X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, json.dumps({"error": message}).encode(), "application/json", headers)

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        sent = b"" if self.command == "HEAD" else body
        self.hub.requests.append(Request(self.command, urlsplit(self.path).path, status, len(sent)))
        self.wfile.write(sent)

    def log_message(self, *_: object) -> None:
        """Silent: tests read `HubServer.requests`."""


def _oid(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()
