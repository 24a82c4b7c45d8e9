"""S3 and compatible servers as a `MultipartStore`. s3_client.py sends the requests.

Some servers do not keep their guarantees (seen with moto and the JuiceFS gateway), so these are checked afterwards:
- Uploaded bytes: `Content-MD5` is sent, *and* the ETag of the reply is compared with it if it is an MD5.
- Copied ranges: the source's ETag is a condition of the request, *and* `check_copied` checks it after the copies, with
  the source's size.
- 'Only if absent': a condition of the request, *and* a check before it. If the server ignores the condition, a gap
  between the two remains, which the client can't close.
- Finished uploads: the reply has the ETag that S3 computes from the parts' ETags. If it has another, and for the first
  upload of a process, the object is checked too: its size, and the ETag of the reply.

Content-MD5 is used instead of the SDK's default CRC32 trailers: every S3-compatible store supports it, TLS connections
then need no second hash of the body, and the same MD5 is compared with ETags.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raymoe.object_store.error_messages import storage_error
from raymoe.object_store.errors import (
    StoreRequest,
    object_changed_error,
    object_exists_error,
    object_replaced_error,
    wrong_size_error,
)
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.parallel import delete_each
from raymoe.object_store.protocol import (
    MAX_DELETED_AT_ONCE,
    BeforeRetry,
    FolderListing,
    ObjectEntry,
    ObjectInfo,
    OpenUpload,
    StoreCounters,
    UploadedPart,
)
from raymoe.object_store.retry import Failure, FailureKind, error_code, error_status
from raymoe.object_store.s3_client import S3Client
from raymoe.object_store.s3_responses import (
    S3Response,
    check_response,
    matches_parts,
    multipart_etag,
    quote_etag,
    read_body,
    unquote_etag,
    upload_check,
)
from raymoe.object_store.urls import join_url, s3_location

_PUT_TOKEN = "raymoe-put"  # metadata that identifies the object of a conditional put as this call's own


class S3Store:
    """Implements `MultipartStore`; see there for what the methods promise."""

    def __init__(self, options: StorageOptions):
        self._client = S3Client(options)
        self._buckets: set[str] = set()  # buckets that are known to exist
        self._deletes_many = True  # until the server refuses it
        self._first_etag = threading.Lock()
        self._tells_s3_etags = False  # until an object had the ETag that the reply to its upload's completion gave

    @property
    def options(self) -> StorageOptions:
        return self._client.options

    @property
    def counters(self) -> StoreCounters:
        return self._client.retries.counters

    # --- looking and reading

    def stat(self, url: str) -> ObjectInfo | None:
        request = StoreRequest(operation="head_object", url=url)
        outcome = self._client.send(request, _identity, **_bucket_and_key(url))
        if isinstance(outcome, Failure):
            # A reply to HEAD has no body, so it gives no reason. A one-byte GET does.
            probe: object = outcome
            if error_status(outcome.error) in (301, 400, 403) or s3_location(url).bucket not in self._buckets:
                get = StoreRequest(operation="get_object", url=url)
                probe = self._client.send(get, _close_body, Range="bytes=0-0", **_bucket_and_key(url))
            if isinstance(probe, Failure) and error_status(probe.error) != 416:
                if error_status(probe.error) == 404 and error_code(probe.error) in ("NoSuchKey", "404", ""):
                    self._buckets.add(s3_location(url).bucket)
                    return None
                raise storage_error(probe, request, self._client.options)
            outcome = self._client.send(request, _identity, **_bucket_and_key(url))  # the object was created meanwhile
            if isinstance(outcome, Failure):
                raise storage_error(outcome, request, self._client.options)
        self._buckets.add(s3_location(url).bucket)
        return ObjectInfo(
            size=outcome["ContentLength"], etag=unquote_etag(outcome.get("ETag")), metadata=outcome.get("Metadata", {})
        )

    def read(self, url: str, start: int, end: int, etag: str | None = None) -> bytes:
        data = bytearray(end - start)
        self.read_into(url, start, memoryview(data), etag)
        return bytes(data)

    def read_into(self, url: str, start: int, buffer: memoryview, etag: str | None = None) -> None:
        if len(buffer) == 0:
            return
        end = start + len(buffer)

        async def fill(response: S3Response) -> None:
            check_response(response, start, end, etag)
            await read_body(response, buffer)

        condition: dict[str, Any] = {"IfMatch": quote_etag(etag)} if etag else {}
        request = StoreRequest(operation="get_object", url=url)
        self._client.call(request, fill, Range=f"bytes={start}-{end - 1}", **_bucket_and_key(url), **condition)
        self._client.retries.count(bytes_read=len(buffer))

    def read_all(self, url: str) -> bytes:
        async def whole(response: S3Response) -> bytes:
            buffer = bytearray(response["ContentLength"])
            await read_body(response, memoryview(buffer))
            return bytes(buffer)

        data: bytes = self._client.call(StoreRequest(operation="get_object", url=url), whole, **_bucket_and_key(url))
        self._client.retries.count(bytes_read=len(data))
        return data

    def list(self, url: str) -> Sequence[ObjectEntry]:
        return self._list_objects(url).objects

    def list_folder(self, url: str) -> FolderListing:
        return self._list_objects(url, Delimiter="/")

    def _list_objects(self, url: str, **query: str) -> FolderListing:
        """The objects whose keys begin with the folder's, and the folders that `query` has the server tell instead."""
        bucket, key = s3_location(url)
        prefix = f"{key}/" if key else ""
        query |= {"Bucket": bucket, "Prefix": prefix}
        found: list[ObjectEntry] = []
        folders: set[str] = set()
        for page in self._pages("list_objects_v2", url, query, ContinuationToken="NextContinuationToken"):
            folders |= {each["Prefix"].removeprefix(prefix).rstrip("/") for each in page.get("CommonPrefixes", ())}
            for item in page.get("Contents", ()):
                name = item["Key"].removeprefix(prefix)
                # Consoles create 'folders': empty objects with a name that ends in '/'.
                if name and not name.endswith("/"):
                    found.append(ObjectEntry(name=name, size=item["Size"], etag=unquote_etag(item.get("ETag"))))
        return FolderListing(objects=sorted(found, key=lambda entry: entry.name), folders=folders)

    # --- writing whole objects

    def put(
        self, url: str, data: bytes, *, only_if_absent: bool = False, before_retry: BeforeRetry | None = None
    ) -> ObjectInfo:
        metadata, condition = {}, {}
        if only_if_absent:
            if self.stat(url) is not None:
                raise object_exists_error(url)
            metadata = {_PUT_TOKEN: uuid.uuid4().hex}
            condition = {"IfNoneMatch": "*"}
        request = StoreRequest(operation="put_object", url=url)
        handle, md5 = upload_check(data)
        sent = {"Body": data, "ContentMD5": md5, "Metadata": metadata, **condition}
        outcome = self._client.send(request, handle, before_retry=before_retry, **_bucket_and_key(url), **sent)
        if isinstance(outcome, Failure):
            # Did an earlier try of this very call succeed, and its reply get lost?
            info = self.stat(url) if only_if_absent and error_status(outcome.error) == 412 else None
            if info is None or info.metadata.get(_PUT_TOKEN) != metadata[_PUT_TOKEN]:
                raise storage_error(outcome, request, self._client.options)
            return info
        self._client.retries.count(bytes_sent=len(data))
        return ObjectInfo(size=len(data), etag=unquote_etag(outcome.get("ETag")), metadata=metadata)

    def delete(self, url: str) -> None:
        request = StoreRequest(operation="delete_object", url=url)
        outcome = self._client.send(request, _identity, **_bucket_and_key(url))
        if isinstance(outcome, Failure) and error_code(outcome.error) != "NoSuchKey":
            raise storage_error(outcome, request, self._client.options)

    def delete_all(self, urls: Sequence[str]) -> None:
        """Delete many objects. Those that a multi-object request left are deleted one by one, which gives each
        error."""
        for start in range(0, len(urls), MAX_DELETED_AT_ONCE):
            group = urls[start : start + MAX_DELETED_AT_ONCE]
            delete_each(self, group if len(group) == 1 or not self._deletes_many else self._not_deleted(group))

    def _not_deleted(self, urls: Sequence[str]) -> Sequence[str]:
        """The objects, of one bucket, that one request has not deleted."""
        by_key = {s3_location(url).key: url for url in urls}
        request = StoreRequest(operation="delete_objects", url=urls[0])
        delete = {"Objects": [{"Key": key} for key in by_key], "Quiet": True}
        outcome = self._client.send(request, _identity, Bucket=s3_location(urls[0]).bucket, Delete=delete)
        if isinstance(outcome, Failure):
            self._deletes_many = False  # not every server supports the request, or its checksum
            return urls
        return [by_key[error["Key"]] for error in outcome.get("Errors", ()) if error.get("Key") in by_key]

    # --- multipart uploads

    def create_upload(self, url: str, metadata: Mapping[str, str] | None = None) -> str:
        request = StoreRequest(operation="create_multipart_upload", url=url)
        response = self._client.call(request, _identity, Metadata=dict(metadata or {}), **_bucket_and_key(url))
        return str(response["UploadId"])

    def upload_part(
        self,
        url: str,
        upload_id: str,
        number: int,
        data: bytes | bytearray | memoryview,
        *,
        before_retry: BeforeRetry | None = None,
    ) -> UploadedPart:
        body = bytes(data) if isinstance(data, memoryview) else data
        handle, md5 = upload_check(body)
        sent = {"UploadId": upload_id, "PartNumber": number, "Body": body, "ContentMD5": md5}
        request = StoreRequest(operation="upload_part", url=url)
        response = self._client.call(request, handle, before_retry=before_retry, **_bucket_and_key(url), **sent)
        self._client.retries.count(bytes_sent=len(body))
        return UploadedPart(number=number, etag=str(unquote_etag(response["ETag"])), size=len(body))

    def copy_part(
        self,
        url: str,
        upload_id: str,
        number: int,
        source_url: str,
        start: int,
        end: int,
        source_etag: str | None = None,
        *,
        before_retry: BeforeRetry | None = None,
    ) -> UploadedPart:
        request = StoreRequest(operation="upload_part_copy", url=url, source_url=source_url)
        condition = {"CopySourceIfMatch": quote_etag(source_etag)} if source_etag else {}
        response = self._client.call(
            request,
            _identity,
            before_retry=before_retry,
            UploadId=upload_id,
            PartNumber=number,
            CopySource=_bucket_and_key(source_url),
            CopySourceRange=f"bytes={start}-{end - 1}",
            **condition,
            **_bucket_and_key(url),
        )
        self._client.retries.count(bytes_copied=end - start)
        return UploadedPart(number=number, etag=str(unquote_etag(response["CopyPartResult"]["ETag"])), size=end - start)

    def check_copied(self, url: str, source_url: str, end: int, source_etag: str | None = None) -> None:
        source, wrong = self.stat(source_url), None
        if source is None or source.size < end:
            wrong = f"it has {source.size if source else 'no'} bytes, and {end} were expected"
        elif source_etag is not None and source.etag != source_etag:
            wrong = "its ETag is another"
        if wrong is not None:
            request = StoreRequest(operation="upload_part_copy", url=url, source_url=source_url)
            raise object_changed_error(request, wrong)

    def complete_upload(
        self,
        url: str,
        upload_id: str,
        parts: Sequence[UploadedPart],
        *,
        metadata: Mapping[str, str] | None = None,
        before_retry: BeforeRetry | None = None,
    ) -> ObjectInfo:
        parts = sorted(parts, key=lambda part: part.number)
        request = StoreRequest(operation="complete_multipart_upload", url=url)
        listed = [{"PartNumber": part.number, "ETag": quote_etag(part.etag)} for part in parts]
        sent = {"UploadId": upload_id, "MultipartUpload": {"Parts": listed}}
        outcome = self._client.send(request, _identity, before_retry=before_retry, **_bucket_and_key(url), **sent)
        if isinstance(outcome, Failure):
            # Was it completed by an earlier try with a lost reply, or earlier in this run?
            if outcome.kind is FailureKind.PERMANENT and error_status(outcome.error) != 404:
                raise storage_error(outcome, request, self._client.options)
            info = self.stat(url)
            if info is None or not matches_parts(info, parts, metadata):
                raise storage_error(outcome, request, self._client.options)
            return info
        expected, etag = sum(part.size for part in parts), multipart_etag(parts)
        is_s3_etag = etag is not None and unquote_etag(outcome.get("ETag")) == etag
        if is_s3_etag:
            with self._first_etag:  # uploads that are completed at the same time wait for what the first one shows
                if not self._tells_s3_etags:
                    return self._checked_object(url, expected, etag)
            return ObjectInfo(size=expected, etag=etag, metadata=metadata or {})
        return self._checked_object(url, expected, None)

    def _checked_object(self, url: str, expected: int, etag: str | None) -> ObjectInfo:
        """The object of a completed upload. `etag` is that of the server's reply, if it is S3's."""
        info = self.stat(url)
        if info is None or info.size != expected:
            raise wrong_size_error(url, info.size if info else None, expected)
        # A server may give this ETag here, and another kind or none when it is queried.
        if etag is not None and info.etag not in (None, etag):
            raise object_replaced_error(url)
        self._tells_s3_etags = etag is not None and info.etag == etag
        return info

    def abort_upload(self, url: str, upload_id: str) -> None:
        request = StoreRequest(operation="abort_multipart_upload", url=url)
        outcome = self._client.send(request, _identity, UploadId=upload_id, **_bucket_and_key(url))
        if isinstance(outcome, Failure) and error_code(outcome.error) != "NoSuchUpload":
            raise storage_error(outcome, request, self._client.options)

    def list_uploads(self, url: str) -> Sequence[OpenUpload]:
        bucket, key = s3_location(url)
        markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        query = {"Bucket": bucket, "Prefix": key}
        return [
            OpenUpload(url=join_url(f"s3://{bucket}", item["Key"]), upload_id=item["UploadId"])
            for item in self._items("list_multipart_uploads", url, "Uploads", query, **markers)
            # The prefix 'run' matches 'run2/...' too.
            if not key or item["Key"] == key or item["Key"].startswith(f"{key}/")
        ]

    def list_parts(self, url: str, upload_id: str) -> Sequence[UploadedPart]:
        query = {"UploadId": upload_id, **_bucket_and_key(url)}
        parts = (
            UploadedPart(number=item["PartNumber"], etag=str(unquote_etag(item["ETag"])), size=item["Size"])
            for item in self._items("list_parts", url, "Parts", query, PartNumberMarker="NextPartNumberMarker")
        )
        return sorted(parts, key=lambda part: part.number)

    def _items(
        self, operation: str, url: str, kind: str, query: Mapping[str, Any], **markers: str
    ) -> Iterator[Mapping[str, Any]]:
        """What a listing has of a kind; `markers` as in `_pages`."""
        for page in self._pages(operation, url, query, **markers):
            yield from page.get(kind, ())

    def _pages(self, operation: str, url: str, query: Mapping[str, Any], **markers: str) -> Iterator[Mapping[str, Any]]:
        """The answers of a listing. `markers`: what the next request has of the answer before it."""
        page: Mapping[str, Any] = {}
        while not page or page.get("IsTruncated"):
            place = {name: page[of_page] for name, of_page in markers.items() if of_page in page}
            assert place or not page, f"{operation}: an incomplete listing without a marker for the next request"
            page = self._client.call(StoreRequest(operation=operation, url=url), _identity, **query, **place)
            yield page


async def _identity(response: S3Response) -> S3Response:
    return response


async def _close_body(response: S3Response) -> None:
    response["Body"].close()


def _bucket_and_key(url: str) -> dict[str, Any]:
    location = s3_location(url)
    return {"Bucket": location.bucket, "Key": location.key}
