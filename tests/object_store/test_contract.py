"""What every object store keeps to (`object_store/protocol.py`), whatever its client is: a new store is a kind here.

`test_whole_objects.py` and `test_multipart.py` say more of S3, on real servers.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raymoe.object_store.errors import ObjectChanged, ObjectExists, ObjectMissing
from raymoe.object_store.location import Location
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.protocol import ObjectStore
from raymoe.object_store.registry import open_store
from raymoe.object_store.urls import join_url
from tests.object_store.servers import environment, running_server

DATA = os.urandom(100_003)
KINDS = ("memory", "file", pytest.param("moto", marks=pytest.mark.s3))


def made_folder(kind: str, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty folder in a store of a kind."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    if kind == "memory":
        yield f"memory://{name}"
    elif kind == "file":
        yield f"file://{tmp_path}/out"
    else:
        server = running_server(kind)
        with environment(server.environment):
            server.client().create_bucket(Bucket=name)
            yield f"s3://{name}/out"


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield from made_folder(request.param, tmp_path)


@pytest.fixture
def store(folder: str) -> ObjectStore:
    return open_store(folder, StorageOptions(deadline_s=10))


def test_a_user_may_name_it(folder: str) -> None:
    assert Location.parse(f"{folder}/") == Location.of(folder)


def test_writing_looking_listing_reading_deleting(store: ObjectStore, folder: str) -> None:
    url = join_url(folder, "sub/a b+ä.bin")
    assert store.stat(url) is None
    assert store.list(folder) == []
    assert store.put(url, DATA).size == len(DATA)
    store.put(join_url(folder, "top"), b"x")
    info = store.stat(url)
    assert info is not None
    assert info.size == len(DATA)
    assert [(e.name, e.size) for e in store.list(folder)] == [("sub/a b+ä.bin", len(DATA)), ("top", 1)]
    listing = store.list_folder(folder)
    assert [e.name for e in listing.objects] == ["top"] and listing.folders in (None, {"sub"})
    assert store.list(folder)[0].etag == info.etag
    assert store.read_all(url) == store.read(url, 0, info.size, info.etag) == DATA
    for start, end in [(0, 1), (5, 5), (7, 90_000), (0, len(DATA))]:
        assert store.read(url, start, end, info.etag) == DATA[start:end]
    buffer = bytearray(30)
    store.read_into(url, 50, memoryview(buffer)[10:20], info.etag)
    assert buffer == bytes(10) + DATA[50:60] + bytes(10)
    store.delete(url)
    store.delete(url)
    assert store.stat(url) is None
    store.delete_all([url, join_url(folder, "top")])
    assert store.list(folder) == []


def test_listing_stays_in_its_folder(store: ObjectStore, folder: str) -> None:
    for name in ("model/a", "model2/b", "model.txt"):
        store.put(join_url(folder, name), name.encode())
    assert [entry.name for entry in store.list(join_url(folder, "model"))] == ["a"]
    assert store.list(join_url(folder, "mod")) == []


def test_what_is_not_as_planned(store: ObjectStore, folder: str) -> None:
    url, before = join_url(folder, "object"), store.counters.retries
    for read in (lambda: store.read(url, 0, 1), lambda: store.read_all(url)):
        with pytest.raises(ObjectMissing):
            read()
    etag = store.put(url, DATA).etag
    with pytest.raises(ObjectChanged, match="no longer what the merge was planned with"):
        store.read(url, 5, len(DATA) + 1)
    store.put(url, DATA[::-1])
    with pytest.raises(ObjectChanged, match="its ETag"):
        store.read(url, 0, 5, etag)
    assert store.counters.retries == before


def test_only_if_absent(store: ObjectStore, folder: str) -> None:
    url = join_url(folder, "index")
    store.put(url, b"first", only_if_absent=True)
    with pytest.raises(ObjectExists):
        store.put(url, b"second", only_if_absent=True)
    assert store.read_all(url) == b"first"
    store.put(url, b"third")
    assert store.read_all(url) == b"third"


def test_many_threads_share_a_store(store: ObjectStore, folder: str) -> None:
    before = store.counters

    def roundtrip(number: int) -> bool:
        url, content = join_url(folder, f"n{number}"), os.urandom(1000 + number)
        store.put(url, content)
        return store.read(url, 0, len(content)) == content

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(roundtrip, range(40)))
    sent = sum(1000 + number for number in range(40))
    after = store.counters
    assert (after.bytes_sent - before.bytes_sent, after.bytes_read - before.bytes_read) == (sent, sent)
