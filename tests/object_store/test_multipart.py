"""Multipart uploads, on both servers: what is uploaded is there, whole and once, or there is an error."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from raymoe.object_store.errors import (
    BucketMissing,
    ObjectChanged,
    ObjectMissing,
    StorageError,
    UploadNotFound,
)
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.protocol import MIN_PART_BYTES, ObjectInfo
from raymoe.object_store.s3_store import S3Store
from raymoe.object_store.urls import join_url, s3_location
from tests.object_store.servers import Server

A, B, C = os.urandom(MIN_PART_BYTES), os.urandom(MIN_PART_BYTES + 3), os.urandom(1000)
RUN = {"raymoe-run": "run-1"}

pytestmark = pytest.mark.every_server  # what all else that uses a store relies on


def test_an_object_appears_whole_when_it_is_completed(store: S3Store, bucket: str) -> None:
    url = join_url(bucket, "out/shard")
    upload = store.create_upload(url, RUN)
    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(lambda n: store.upload_part(url, upload, n, (A, B, C)[n - 1]), (3, 1, 2)))
    assert store.stat(url) is None
    assert store.list(bucket) == []
    assert list(store.list_parts(url, upload)) == sorted(parts, key=lambda part: part.number)
    info = store.complete_upload(url, upload, parts, metadata=RUN)
    assert info.size == len(A + B + C)
    assert store.read(url, 0, info.size, info.etag) == A + B + C
    assert store.list_uploads(bucket) == []


def test_an_object_that_is_replaced_at_once(store: S3Store, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a late request of another run, of the same size, before this process looks at the first object that it has
    made."""
    url, stat = join_url(bucket, "out/shard"), store.stat
    upload = store.create_upload(url, RUN)
    part = store.upload_part(url, upload, 1, A)

    def replaced(url: str) -> ObjectInfo | None:
        monkeypatch.undo()
        store.put(url, B[: len(A)])
        return stat(url)

    monkeypatch.setattr(store, "stat", replaced)
    with pytest.raises(StorageError, match="replaced as soon as it had been written"):
        store.complete_upload(url, upload, [part], metadata=RUN)


def test_data_may_be_any_bytes(store: S3Store, bucket: str) -> None:
    url = join_url(bucket, "object")
    upload = store.create_upload(url)
    parts = [
        store.upload_part(url, upload, 1, bytearray(A)),
        store.upload_part(url, upload, 2, memoryview(bytes(5) + C)[5:]),
    ]
    store.complete_upload(url, upload, parts)
    assert store.read_all(url) == A + C


def test_two_processes_feed_one_upload_and_a_part_sent_again_replaces(store: S3Store, bucket: str) -> None:
    url = join_url(bucket, "object")
    other = S3Store(StorageOptions(deadline_s=30))
    upload = store.create_upload(url)
    store.upload_part(url, upload, 1, B)
    parts = [other.upload_part(url, upload, 2, C), store.upload_part(url, upload, 1, A)]
    assert [part.size for part in other.list_parts(url, upload)] == [len(A), len(C)]
    other.complete_upload(url, upload, parts)
    assert store.read_all(url) == A + C


def test_the_store_copies_ranges(store: S3Store, bucket: str) -> None:
    source, url = join_url(bucket, "in/source +ä"), join_url(bucket, "out/shard")
    etag = store.put(source, A + B).etag
    upload = store.create_upload(url)
    end = len(A + B)
    parts = [
        store.copy_part(url, upload, 1, source, 3, 3 + MIN_PART_BYTES, etag),
        store.copy_part(url, upload, 2, source, MIN_PART_BYTES, end, etag),
        store.copy_part(url, upload, 3, source, end - 1, end),
    ]
    sent = store.counters.bytes_sent
    info = store.complete_upload(url, upload, parts)
    assert store.read(url, 0, info.size, info.etag) == (A + B)[3 : 3 + MIN_PART_BYTES] + B + B[-1:]
    assert store.counters.bytes_copied == info.size
    assert sent == len(A + B)


def test_copies_of_what_was_not_planned_are_refused(store: S3Store, bucket: str) -> None:
    """moto copies past the end (shorter, silently) and ignores the ETag; the gateway refuses both itself."""
    source, url = join_url(bucket, "source"), join_url(bucket, "out")
    etag = store.put(source, A).etag
    upload = store.create_upload(url)

    def copy(start: int, end: int, etag: str | None) -> None:
        store.copy_part(url, upload, 1, source, start, end, etag)
        store.check_copied(url, source, end, etag)

    with pytest.raises(ObjectChanged, match="source"):
        copy(0, len(A) + 1, etag)
    with pytest.raises(ObjectChanged, match="source"):
        copy(len(A) + 1, len(A) + 10, None)
    store.put(source, A[::-1])
    with pytest.raises(
        ObjectChanged, match=r"source s3://.*/source is no longer what the merge was planned with: its ETag"
    ):
        copy(0, len(A), etag)
    with pytest.raises(ObjectMissing, match=r"there is no object s3://.*/nothing to copy from"):
        store.copy_part(url, upload, 1, join_url(bucket, "nothing"), 0, len(A), etag)
    with pytest.raises(BucketMissing):
        store.copy_part(url, upload, 1, "s3://no-such-bucket-here/x", 0, len(A), etag)


@pytest.mark.parametrize("metadata", [RUN, None])
def test_a_completed_upload_counts_also_when_the_answer_was_lost(
    store: S3Store, bucket: str, server: Server, metadata: dict[str, str] | None
) -> None:
    url = join_url(bucket, "object")
    upload = store.create_upload(url, metadata)
    parts = [store.upload_part(url, upload, 1, A), store.upload_part(url, upload, 2, C)]
    location = s3_location(url)
    listed = [{"PartNumber": part.number, "ETag": part.etag} for part in parts]
    # Somebody else heard the answer: for the store it is as if it never came.
    server.client().complete_multipart_upload(
        Bucket=location.bucket, Key=location.key, UploadId=upload, MultipartUpload={"Parts": listed}
    )
    for _ in range(2):
        info = store.complete_upload(url, upload, parts, metadata=metadata)
        assert info.size == len(A + C)
    assert store.read_all(url) == A + C


def test_another_object_of_the_same_size_does_not_count(store: S3Store, bucket: str, server: Server) -> None:
    url, impatient = join_url(bucket, "object"), S3Store(StorageOptions(deadline_s=3))
    upload = store.create_upload(url, RUN)
    parts = [store.upload_part(url, upload, 1, A), store.upload_part(url, upload, 2, C)]
    store.abort_upload(url, upload)
    store.put(url, C + A)
    # moto forgets uploads and then answers 500.
    with pytest.raises(UploadNotFound if server.kind == "juicefs" else StorageError):
        impatient.complete_upload(url, upload, parts, metadata=RUN)
    assert store.read_all(url) == C + A


def test_a_completed_upload_replaces_what_is_there(store: S3Store, bucket: str) -> None:
    url = join_url(bucket, "object")
    upload = store.create_upload(url, RUN)
    parts = [store.upload_part(url, upload, 1, C)]
    store.put(url, b"in the way")
    store.complete_upload(url, upload, parts, metadata=RUN)
    assert store.read_all(url) == C


def test_aborted_uploads(store: S3Store, bucket: str, server: Server) -> None:
    url = join_url(bucket, "object")
    upload = store.create_upload(url)
    parts = [store.upload_part(url, upload, 1, C)]
    store.abort_upload(url, upload)
    store.abort_upload(url, upload)
    with pytest.raises(UploadNotFound):
        store.list_parts(url, upload)
    if server.kind != "moto":  # which answers 500 to these
        with pytest.raises(UploadNotFound):
            store.complete_upload(url, upload, parts)
        with pytest.raises(UploadNotFound):
            store.upload_part(url, upload, 1, C)
    assert store.stat(url) is None


def test_a_part_that_was_never_sent_is_an_error(store: S3Store, bucket: str) -> None:
    from dataclasses import replace

    url = join_url(bucket, "object")
    upload = store.create_upload(url)
    part = store.upload_part(url, upload, 1, A)
    with pytest.raises(StorageError):
        store.complete_upload(url, upload, [part, replace(part, number=2)])
    with pytest.raises(StorageError):
        store.complete_upload(url, upload, [replace(part, etag="0" * 32)])
    assert store.stat(url) is None


def test_only_uploads_below_the_url_are_listed(store: S3Store, bucket: str) -> None:
    ours = [join_url(bucket, "run", name) for name in ("a", "b", "sub/c")]
    others = [join_url(bucket, name) for name in ("run2/a", "runaway", "other/run/a", "z")]
    ids = {url: [store.create_upload(url)] for url in [*ours, *others]}
    ids[ours[0]].append(store.create_upload(ours[0]))  # a second one for the same object
    found = store.list_uploads(join_url(bucket, "run"))
    assert sorted((upload.url, upload.upload_id) for upload in found) == sorted((u, i) for u in ours for i in ids[u])
    assert {upload.url for upload in store.list_uploads(bucket)} == set(ids)
    assert {upload.url for upload in store.list_uploads(ours[0])} == {ours[0]}
    for upload in found:
        store.abort_upload(upload.url, upload.upload_id)
    assert store.list_uploads(join_url(bucket, "run")) == []
    assert {upload.url for upload in store.list_uploads(bucket)} == set(others)


@pytest.mark.soak_on("juicefs")
def test_uploads_of_more_than_a_page(store: S3Store, bucket: str, page: int) -> None:
    urls = [join_url(bucket, "run", f"{number:04}") for number in range(page + 3)]
    with ThreadPoolExecutor(8) as pool:
        ids = dict(zip(urls, pool.map(store.create_upload, urls)))
    found = {upload.url: upload.upload_id for upload in store.list_uploads(join_url(bucket, "run"))}
    assert found == ids


@pytest.mark.soak_on("juicefs")
def test_parts_of_more_than_a_page(store: S3Store, bucket: str, page: int) -> None:
    url = join_url(bucket, "object")
    upload = store.create_upload(url)
    with ThreadPoolExecutor(8) as pool:
        sent = list(pool.map(lambda number: store.upload_part(url, upload, number, b"x"), range(1, page + 4)))
    assert list(store.list_parts(url, upload)) == sent
