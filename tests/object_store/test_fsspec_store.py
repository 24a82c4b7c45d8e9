"""Stores through fsspec beyond the contract (test_contract.py): moves, and a web server."""

from __future__ import annotations

import functools
import http.server
import os
import threading
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from raymoe.object_store.errors import ObjectChanged, ObjectMissing, StorageError
from raymoe.object_store.fsspec_store import FsspecStore
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.protocol import ObjectStore
from raymoe.object_store.registry import open_store
from raymoe.object_store.urls import join_url
from tests.http_server import HttpServer

DATA = os.urandom(100_003)


@pytest.fixture(params=["memory", "file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"file://{tmp_path}/out"


@pytest.fixture
def store(folder: str) -> ObjectStore:
    return open_store(folder, StorageOptions(deadline_s=10))


def test_a_message_says_how_an_object_has_changed(store: ObjectStore, folder: str) -> None:
    url = join_url(folder, "object")
    etag = store.put(url, DATA).etag
    with pytest.raises(ObjectChanged, match=rf"it has {len(DATA)} bytes, and at least {len(DATA) + 1} were expected"):
        store.read(url, 5, len(DATA) + 1)
    store.put(url, DATA[::-1])
    with pytest.raises(ObjectChanged, match="its ETag or time is another"):
        store.read(url, 0, 5, etag)


@pytest.mark.parametrize("there", [None, b"older and of another size"])
def test_move(store: ObjectStore, folder: str, there: bytes | None) -> None:
    assert isinstance(store, FsspecStore)
    url, to = join_url(folder, "parts/a.1"), join_url(folder, "sub/a")
    store.put(url, DATA)
    if there is not None:
        store.put(to, there)
    info = store.move(url, to, len(DATA))
    assert info == store.stat(to) and info.size == len(DATA)
    assert store.read_all(to) == DATA and store.stat(url) is None
    with pytest.raises(ObjectMissing):
        store.move(url, to, len(DATA))
    assert store.read_all(to) == DATA, "what is there is not touched by a move that can't be done"


class WithoutCopies(MemoryFileSystem):
    """A file system that can neither rename nor copy."""

    protocol, store, pseudo_dirs = "raymoewithoutcopies", {}, [""]

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        raise NotImplementedError


class WithoutReplacing(MemoryFileSystem):
    """A file system that renames, but not to a name that is taken."""

    protocol, store, pseudo_dirs = "raymoewithoutreplacing", {}, [""]

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        if self.exists(path2):
            raise FileExistsError(path2)
        self.cp_file(path1, path2)
        self.rm_file(path1)


@pytest.mark.parametrize("kind", [WithoutCopies, WithoutReplacing])
def test_move_on_file_systems_that_can_do_less(kind: type[MemoryFileSystem]) -> None:
    fsspec.register_implementation(str(kind.protocol), kind, clobber=True)
    folder = f"{kind.protocol}://{uuid.uuid4().hex}"
    store = open_store(folder, StorageOptions(deadline_s=10))
    assert isinstance(store, FsspecStore)
    url, to = join_url(folder, "part"), join_url(folder, "whole")
    for content in (DATA, DATA[::-1]):
        store.put(url, content)
        store.move(url, to, len(DATA))
        assert store.read_all(to) == content and store.stat(url) is None


@pytest.mark.processes
def test_reading_from_a_web_server(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(DATA)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with HttpServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/config.json"
        store = open_store(url, StorageOptions(deadline_s=10))
        info = store.stat(url)
        assert info is not None and info.size == len(DATA)
        assert store.read_all(url) == DATA
        with pytest.raises(StorageError):
            store.read_all(url + "x")
        server.shutdown()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://no-such-host.invalid/models/x", "the host no-such-host.invalid was not found"),
        ("http://127.0.0.1:9/models/x", "the host 127.0.0.1 can't be reached"),
    ],
)
@pytest.mark.processes
def test_a_host_that_is_not_reached_is_no_missing_file(
    url: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given up soon, also where another host of this kind has answered."""
    monkeypatch.setattr("raymoe.object_store.retry._INITIAL_BACKOFF_S", 0.001)
    store = FsspecStore(url.partition(":")[0], StorageOptions())
    if store.scheme == "http":
        (tmp_path / "config.json").write_bytes(b"{}")
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
        with HttpServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            there = f"http://127.0.0.1:{server.server_port}"
            assert [entry.name for entry in store.list(there)] == ["config.json"]
            assert store.list(f"{there}/gone") == [] and store.stat(f"{there}/gone") is None
            server.shutdown()
    for ask in (store.list, store.stat, store.read_all):
        with pytest.raises(StorageError, match=said):
            ask(url)
