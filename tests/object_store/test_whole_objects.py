"""Looking, listing, reading and writing, on both servers. How each server falls short is said where it matters."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from raymoe.object_store.errors import BucketMissing, ObjectChanged, ObjectExists, ObjectMissing, StorageError
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.registry import open_store
from raymoe.object_store.s3_store import S3Store
from raymoe.object_store.urls import join_url, s3_location
from tests.object_store.servers import Server

CONTENT = os.urandom(3_000_017)

pytestmark = pytest.mark.every_server  # what all else that uses a store relies on


@pytest.mark.parametrize("name", ["plain", "a b+c&d=e", "ä/ö/日本.bin", "%41%2F", "a@b/c", "semi;colon,~'()!*$"])
def test_an_object_of_any_name_is_written_looked_at_listed_read_and_deleted(
    store: S3Store, bucket: str, name: str
) -> None:
    url = join_url(bucket, "folder", name)
    assert store.stat(url) is None
    written = store.put(url, CONTENT)
    info = store.stat(url)
    assert info is not None
    assert (info.size, info.etag) == (len(CONTENT), written.etag)
    (entry,) = store.list(join_url(bucket, "folder"))
    assert (entry.name, entry.size, entry.etag) == (name, len(CONTENT), info.etag)
    assert store.read_all(url) == CONTENT
    store.delete(url)
    store.delete(url)
    assert store.stat(url) is None
    assert store.list(bucket) == []


def test_ranges_are_exact_or_an_error(store: S3Store, bucket: str) -> None:
    url, size = join_url(bucket, "object"), len(CONTENT)
    etag = store.put(url, CONTENT).etag
    for start, end in [(0, 1), (0, size), (7, 7), (1000, 700_001), (size - 1, size)]:
        assert store.read(url, start, end, etag) == store.read(url, start, end) == CONTENT[start:end]
    buffer = bytearray(100)
    store.read_into(url, 50, memoryview(buffer)[10:90], etag)
    assert buffer == bytes(10) + CONTENT[50:130] + bytes(10)
    for start, end in [(size - 1, size + 1), (size, size + 1), (0, size + 1)]:
        with pytest.raises(ObjectChanged, match="no longer what the merge was planned with"):
            store.read(url, start, end)


def test_a_replaced_object_is_noticed(store: S3Store, bucket: str) -> None:
    url = join_url(bucket, "object")
    etag = store.put(url, CONTENT).etag
    store.put(url, CONTENT[::-1])
    with pytest.raises(ObjectChanged, match="its ETag is another"):
        store.read(url, 0, 10, etag)
    assert store.read(url, 0, 10) == CONTENT[::-1][:10]


def test_what_is_missing(store: S3Store, bucket: str) -> None:
    for read in (lambda u: store.read(u, 0, 1), store.read_all):
        with pytest.raises(ObjectMissing, match="there is no such object"):
            read(join_url(bucket, "nothing"))
    nowhere = "s3://no-such-bucket-here/key"
    calls = [store.stat, store.list, store.read_all, store.create_upload, store.list_uploads]
    for call in [*calls, lambda u: store.put(u, b"x"), lambda u: store.put(u, b"x", only_if_absent=True)]:
        with pytest.raises(BucketMissing, match="there is no bucket no-such-bucket-here at http://127"):
            call(nowhere)
    assert store.counters.retries == 0


def test_listing_stays_in_its_folder(store: S3Store, bucket: str) -> None:
    names = ["model/a", "model/sub/b", "model/sub/deep/c", "model2/d", "model.txt"]
    for name in names:
        store.put(join_url(bucket, name), name.encode())
    server_client = open_store(bucket)
    assert [e.name for e in server_client.list(join_url(bucket, "model"))] == ["a", "sub/b", "sub/deep/c"]
    listing = server_client.list_folder(join_url(bucket, "model"))
    assert ([e.name for e in listing.objects], listing.folders) == (["a"], {"sub"})
    assert sorted(e.name for e in server_client.list(bucket)) == sorted(names)
    listing = server_client.list_folder(bucket)
    assert ([e.name for e in listing.objects], listing.folders) == (["model.txt"], {"model", "model2"})
    assert server_client.list(join_url(bucket, "mod")) == []


def test_folder_markers_are_not_files(store: S3Store, bucket: str, server: Server) -> None:
    client, name = server.client(), s3_location(bucket).bucket
    client.put_object(Bucket=name, Key="model/", Body=b"")
    client.put_object(Bucket=name, Key="model/sub/", Body=b"")
    client.put_object(Bucket=name, Key="model/a", Body=b"a")
    assert [entry.name for entry in store.list(join_url(bucket, "model"))] == ["a"]
    assert [entry.name for entry in store.list(bucket)] == ["model/a"]


@pytest.mark.soak_on("juicefs")
def test_listings_of_more_than_a_page(store: S3Store, bucket: str, page: int) -> None:
    names = [f"{number:04}" for number in range(page + 3)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(join_url(bucket, "many", name), b"x"), names))
    assert [entry.name for entry in store.list(join_url(bucket, "many"))] == names


def test_only_if_absent(store: S3Store, bucket: str) -> None:
    url = join_url(bucket, "index")
    info = store.put(url, b"first", only_if_absent=True)
    assert info.size == 5
    with pytest.raises(ObjectExists, match="there is an object of this name already"):
        store.put(url, b"second", only_if_absent=True)
    assert store.read_all(url) == b"first"
    store.put(url, b"third")
    assert store.read_all(url) == b"third"


def test_one_of_many_that_put_at_once_wins(store: S3Store, bucket: str, server: Server) -> None:
    url = join_url(bucket, "index")

    def put(number: int) -> int | None:
        try:
            store.put(url, f"writer {number}".encode(), only_if_absent=True)
        except ObjectExists:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number in pool.map(put, range(8)) if number is not None]
    # The gateway ignores the condition: there, all that looked before the first one wrote believe that they won.
    assert len(winners) == 1 if server.kind == "moto" else winners
    assert store.read_all(url) in [f"writer {number}".encode() for number in winners]


def test_many_threads_share_a_store(store: S3Store, bucket: str) -> None:
    def roundtrip(number: int) -> bool:
        url, content = join_url(bucket, str(number)), os.urandom(100_000 + number)
        etag = store.put(url, content).etag
        return store.read(url, 0, len(content), etag) == content == store.read_all(url)

    with ThreadPoolExecutor(24) as pool:
        assert all(pool.map(roundtrip, range(48)))
    counters = store.counters
    assert counters.bytes_sent == sum(100_000 + number for number in range(48))
    assert counters.bytes_read == 2 * counters.bytes_sent
    assert counters.requests >= 3 * 48


def _read_in_child(store: S3Store, url: str, answer: multiprocessing.SimpleQueue[bytes]) -> None:
    answer.put(store.read_all(url))


@pytest.mark.soak_on("juicefs")
def test_a_forked_child_builds_its_own_client(store: S3Store, bucket: str) -> None:
    url = join_url(bucket, "object")
    store.put(url, b"content")  # the parent's client is in use
    fork = multiprocessing.get_context("fork")
    answer = fork.SimpleQueue()
    child = fork.Process(target=_read_in_child, args=(store, url, answer))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert answer.get() == b"content"
    assert store.read_all(url) == b"content"


def test_stores_are_shared_by_place_and_options_and_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_store("s3://bucket/a")
    assert open_store("s3://other/b") is first
    assert open_store("s3a://other/b") is first
    assert open_store("s3://bucket/a", StorageOptions(max_requests=2)) is not first
    assert open_store("memory://a") is not first
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "renewed")
    assert open_store("s3://bucket/a") is not first


def test_endpoint_and_region_by_options(server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_REGION")
    options = StorageOptions(endpoint=server.endpoint, region="us-east-1", deadline_s=20)
    assert S3Store(options).list(bucket) == []


def test_profiles(server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("aws")
    (folder / "config").write_text(f"[profile work]\nregion = us-east-1\nendpoint_url = {server.endpoint}\n")
    (folder / "credentials").write_text(
        f"[work]\naws_access_key_id = {server.key}\naws_secret_access_key = {server.secret}\n"
    )
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    assert S3Store(StorageOptions(profile="work", deadline_s=20)).list(bucket) == []
    with pytest.raises(StorageError, match="no profile 'play'"):
        S3Store(StorageOptions(profile="play")).list(bucket)
