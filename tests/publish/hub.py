"""The stand-in of tests/sources/hub_server.py, to which one can also push: what huggingface_hub sends, over real HTTP.

    with WritableHub(root) as hub: ...       hub.url is for HF_ENDPOINT, hub.token for HF_TOKEN
    hub.files("org/name")                    the bytes of a branch, by path
    hub.uploads                              every upload of bytes to its storage, in order

Repositories have branches and commits; a commit is a folder of its own and never changes. Large files go the way of
git-lfs: a batch request that tells what the storage lacks, a PUT (or one a part), a commit that names them by SHA-256.
What a .gitignore of the branch names it tells to leave out, as the Hub does, and trusts the client to do so.
It has no Xet, as servers that merely speak the Hub's API.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import os
import re
import socket
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.sources.hub_server import Handler, HubRepo, HubServer

__all__ = ["Upload", "WritableHub"]

_CREATE = re.compile(r"/api/repos/create")
_REPO = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)/(?P<verb>preupload|commit|branch)/(?P<rev>.+)")
_BATCH = re.compile(r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
_STORAGE = re.compile(r"/storage/(?P<id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})(?P<done>/complete)?")
_LICENCES = ("apache-2.0", "mit", "other", "llama3", "cc-by-4.0", "gemma")


@dataclass(frozen=True)
class Upload:
    """Bytes that came to the storage: of which object, which part of it (0: whole), how many."""

    oid: str
    part: int
    nbytes: int


@dataclass
class _Branches:
    """A repository that can be written to."""

    private: bool
    heads: dict[str, str] = field(default_factory=dict)
    snapshots: dict[str, Path] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, dict[str, str]] = field(default_factory=dict)  # commit -> path -> SHA-256


class WritableHub(HubServer):
    """`accounts` maps tokens to what whoami tells. `part_bytes`: larger files are asked for in parts of that size.
    `card_refusal` is the body of a 400 to every card.
    `before_upload` is called with the number of uploads so far before one is read; it may wait, or raise to cut it."""

    def __init__(self, root: Path, *, part_bytes: int = 1 << 30) -> None:
        super().__init__()
        self.root, self.part_bytes = root, part_bytes
        self.written: dict[str, _Branches] = {}
        self.uploads: list[Upload] = []
        self.before_upload: Callable[[int], None] = lambda count: None
        self.before_preupload: Callable[[], None] = lambda: None
        self.before_commit: Callable[[], None] = lambda: None
        self.drop_commit_answers = False
        self.card_refusal: bytes | None = None
        self.accounts: dict[str, dict[str, Any]] = {self.token: account("tester", "write", {"org": "write"})}
        self.lock = threading.RLock()

    @staticmethod
    def handler() -> type[Handler]:
        return _WritingHandler

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a command that is to use this Hub, with a cache of its own, and without Xet."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
        own = {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return {**kept, **own, **more}

    def snapshot(self, repo_id: str, revision: str = "main") -> Path:
        repo = self.written[repo_id]
        return repo.snapshots[repo.heads.get(revision, revision)]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        root = self.snapshot(repo_id, revision)
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

    def history(self, repo_id: str) -> list[str]:
        """The messages of all commits of a repository, oldest first."""
        return list(self.written[repo_id].messages.values())

    def create(self, repo_id: str, *, private: bool = False) -> None:
        """A repository as the Hub makes it: one commit with the attributes of git-lfs."""
        self.written[repo_id] = _Branches(private=private)
        attributes = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.commit(repo_id, "main", "initial commit", {".gitattributes": attributes.encode()}, {}, [])

    def commit(
        self,
        repo_id: str,
        branch: str,
        message: str,
        files: dict[str, bytes],
        pointers: dict[str, str],
        removed: list[str],
    ) -> str:
        """A commit on a branch: whole files, files of the storage by SHA-256, paths to remove. Returns its id."""
        with self.lock:
            repo = self.written[repo_id]
            parent = repo.heads.get(branch)
            commit = hashlib.sha1(f"{repo_id} {parent} {message} {len(repo.messages)}".encode()).hexdigest()
            folder = self.root / "snapshots" / commit
            folder.mkdir(parents=True)
            lfs = dict(repo.lfs[parent]) if parent else {}
            for name, content in (self.files(repo_id, branch) if parent else {}).items():
                _write(folder / name, content)
            for name in removed:
                (folder / name).unlink()
                lfs.pop(name, None)
            for name, content in files.items():
                _write(folder / name, content)
                lfs.pop(name, None)
            for name, oid in pointers.items():
                _write(folder / name, self.stored(repo_id, oid).read_bytes())
                lfs[name] = oid
            repo.snapshots[commit], repo.lfs[commit] = folder, lfs
            repo.heads[branch], repo.messages[commit] = commit, message
            return commit

    def stored(self, repo_id: str, oid: str) -> Path:
        """Where the storage has an object of a repository."""
        return self.root / "storage" / repo_id / oid


def account(name: str, role: str, orgs: dict[str, str]) -> dict[str, Any]:
    """What whoami tells of the owner of a token: its role, and by organisation the owner's."""
    organisations = [{"type": "org", "name": org, "roleInOrg": own} for org, own in orgs.items()]
    token = {"displayName": "test", "role": role}
    return {"type": "user", "name": name, "orgs": organisations, "auth": {"type": "access_token", "accessToken": token}}


class _WritingHandler(Handler):
    """Routes; what they do to a repository is the server's business."""

    @property
    def writable(self) -> WritableHub:
        assert isinstance(self.hub, WritableHub)
        return self.hub

    def do_GET(self) -> None:  # noqa: N802
        if urlsplit(self.path).path == "/api/whoami-v2":
            who = self._account()
            self._json(who) if who else self._error(401, None, "Invalid credentials in Authorization header")
            return
        super().do_GET()

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:  # noqa: N802
        path, body = unquote(urlsplit(self.path).path), self._body()
        if path == "/api/validate-yaml":
            self._validate(json.loads(body))
        elif self._account() is None and not _STORAGE.fullmatch(path):
            self._error(401, None, "Invalid credentials in Authorization header")
        elif _CREATE.fullmatch(path):
            self._create(json.loads(body))
        elif match := _REPO.fullmatch(path):
            self._of_repository(match["verb"], match["id"], match["rev"], body)
        elif match := _BATCH.fullmatch(path):
            self._batch(match["id"], json.loads(body))
        elif match := _STORAGE.fullmatch(path):
            self._complete(match["id"], match["oid"], json.loads(body))
        else:
            self._error(404, None, "no such page")

    def do_PUT(self) -> None:  # noqa: N802
        url = urlsplit(self.path)
        match = _STORAGE.fullmatch(url.path)
        assert match is not None, self.path
        hub = self.writable
        try:
            hub.before_upload(len(hub.uploads))
        except ConnectionError:
            self._drop()
            return
        content = self._body()
        if len(content) != int(self.headers["Content-Length"]):  # the sender is gone: nothing is kept of it
            self._drop()
            return
        part = int(parse_qs(url.query).get("part", ["0"])[0])
        target = hub.stored(match["id"], match["oid"])
        _write(target.with_name(f"{target.name}.{part}") if part else target, content)
        with hub.lock:
            hub.uploads.append(Upload(match["oid"], part, len(content)))
        self._send(200, b"", "text/plain", {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def _drop(self) -> None:
        """End the connection without an answer."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _account(self) -> dict[str, Any] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.writable.accounts.get(token)

    def _may_write(self, repo_id: str) -> bool:
        """Else the Hub's refusal has been sent."""
        who = self._account()
        assert who is not None
        roles = {who["name"]: "write"} | {org["name"]: org["roleInOrg"] for org in who["orgs"]}
        role = who["auth"]["accessToken"]["role"]
        if role == "read" or roles.get(repo_id.partition("/")[0]) not in ("write", "contributor", "admin"):
            self._error(403, None, f"You don't have the rights to create a model under the namespace of {repo_id}")
            return False
        return True

    def _repo(self, repo_id: str, revision: str, *, file: bool) -> HubRepo | None:
        repo = self.writable.written.get(repo_id)
        if repo is None or (repo.private and self._account() is None):
            return super()._repo(repo_id, revision, file=file)
        commit = repo.heads.get(revision, revision)
        if commit not in repo.snapshots:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        access = "private" if repo.private else "public"
        return HubRepo(folder=repo.snapshots[commit], commit=commit, access=access)

    def _api(self, repo_id: str, kind: str | None, revision: str, under: str) -> None:
        written = self.writable.written.get(repo_id)
        if written is None or kind == "tree":
            self._tree(repo_id, revision) if written else super()._api(repo_id, kind, revision, under)
            return
        if (repo := self._repo(repo_id, revision, file=False)) is None:
            return
        siblings = [{"rfilename": name, "size": path.stat().st_size} for name, path in repo.files().items()]
        head = {"id": repo_id, "modelId": repo_id, "sha": repo.commit, "private": written.private, "gated": False}
        self._json({**head, "siblings": siblings})

    def _tree(self, repo_id: str, revision: str) -> None:
        if (repo := self._repo(repo_id, revision, file=False)) is None:
            return
        lfs = self.writable.written[repo_id].lfs[repo.commit]
        entries = []
        for name, path in repo.files().items():
            size, content = path.stat().st_size, path.read_bytes()
            entry: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": _git_oid(content)}
            if name in lfs:
                entry["lfs"] = {"oid": lfs[name], "size": size, "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def _create(self, asked: dict[str, Any]) -> None:
        repo_id = f"{asked['organization']}/{asked['name']}"
        if not self._may_write(repo_id):
            return
        if repo_id in self.writable.written:
            self._error(409, None, "You already created this model repo")
            return
        self.writable.create(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def _of_repository(self, verb: str, repo_id: str, revision: str, body: bytes) -> None:
        hub = self.writable
        if repo_id not in hub.written:
            self._error(404, "RepoNotFound", "Repository not found")
        elif verb == "branch":
            self._branch(repo_id, revision)
        elif revision not in hub.written[repo_id].heads:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif verb == "preupload":
            self._preupload(repo_id, revision, json.loads(body))
        elif self._may_write(repo_id):
            self._commit(repo_id, revision, body)

    def _branch(self, repo_id: str, branch: str) -> None:
        if not self._may_write(repo_id):
            return
        repo = self.writable.written[repo_id]
        if branch in repo.heads:
            self._error(409, None, f"Reference already exists: {branch}")
            return
        repo.heads[branch] = repo.heads["main"]
        self._json({})

    def _preupload(self, repo_id: str, revision: str, asked: dict[str, Any]) -> None:
        self.writable.before_preupload()
        files, patterns = [], self.writable.files(repo_id, revision).get(".gitignore", b"").decode().split()
        for file in asked["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] > 10_000_000
            ignored = any(fnmatch.fnmatchcase(file["path"], pattern) for pattern in patterns)
            files.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": ignored})
        self._json({"files": files})

    def _batch(self, repo_id: str, asked: dict[str, Any]) -> None:
        if not self._may_write(repo_id):
            return
        hub, objects = self.writable, []
        for wanted in asked["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
            href = f"{hub.url}/storage/{repo_id}/{oid}"
            if not hub.stored(repo_id, oid).exists():
                upload: dict[str, Any] = {"href": href}
                if size > hub.part_bytes:
                    parts = range(1, -(-size // hub.part_bytes) + 1)
                    header = {f"{n:05d}": f"{href}?part={n}" for n in parts}
                    upload = {"href": f"{href}/complete", "header": {"chunk_size": str(hub.part_bytes), **header}}
                entry["actions"] = {"upload": upload}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _complete(self, repo_id: str, oid: str, asked: dict[str, Any]) -> None:
        target = self.writable.stored(repo_id, oid)
        parts = [target.with_name(f"{oid}.{part['partNumber']}") for part in asked["parts"]]
        content = b"".join(part.read_bytes() for part in parts)
        if hashlib.sha256(content).hexdigest() != oid:
            self._error(400, None, "the parts are not the object")
            return
        _write(target, content)
        self._json({})

    def _commit(self, repo_id: str, branch: str, body: bytes) -> None:
        hub = self.writable
        hub.before_commit()
        by_key: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for line in map(json.loads, body.splitlines()):
            by_key[line["key"]].append(line["value"])
        header = by_key["header"][0]
        if header.get("parentCommit", hub.written[repo_id].heads[branch]) != hub.written[repo_id].heads[branch]:
            self._error(412, None, "A commit has happened since. Please refresh and try again.")
            return
        pointers = {value["path"]: value["oid"] for value in by_key["lfsFile"]}
        for name, oid in pointers.items():
            stored = hub.stored(repo_id, oid)
            if not stored.exists() or hashlib.sha256(stored.read_bytes()).hexdigest() != oid:
                self._error(400, None, f"Your push was rejected because an LFS pointer has no object: {name}")
                return
        files = {value["path"]: base64.b64decode(value["content"]) for value in by_key["file"]}
        removed = [value["path"] for value in by_key["deletedFile"]]
        commit = hub.commit(repo_id, branch, header["summary"], files, pointers, removed)
        if hub.drop_commit_answers:
            self._drop()
            return
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{repo_id}/commit/{commit}"})

    def _validate(self, asked: dict[str, Any]) -> None:
        """The rules of the Hub's own check that a card of a merge can break."""
        if (refusal := self.writable.card_refusal) is not None:
            self._send(400, refusal, "text/html", {})
            return
        matter = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
        data = yaml.safe_load(matter[1]) if matter else {}
        errors = []
        if data.get("license") not in (None, *_LICENCES):
            errors.append('"license" must be one of [apache-2.0, mit, ...]')
        bases = data.get("base_model", [])
        for base in bases if isinstance(bases, list) else [bases]:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
                errors.append(f'"base_model" with value "{base}" is not valid')
        answer = {"errors": [{"message": text} for text in errors], "warnings": []}
        self._send(400 if errors else 200, json.dumps(answer).encode(), "application/json", {})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
