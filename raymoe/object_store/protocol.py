"""The protocol of object stores, and its data types.

    ObjectStore       what every store can do: look, list, read a range, put a small object, delete
    MultipartStore    what S3 adds: objects assembled from parts that several processes upload or have copied

Guarantees of every method:
- Thread-safe; may be called from many threads at once. The store limits the number of concurrent requests.
- Transient failures are retried until the deadline of `StorageOptions`. After it, and for permanent failures, a
  `StorageError` (errors.py) is raised; its subclasses are the cases that callers handle separately.
- Idempotent: a repeated call after any failure, even after a lost reply, gives the same state and the same result.
- URLs are normalized (urls.py), sizes are bytes, intervals half-open, ETags without their quotes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

# Limits of a multipart upload on S3: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
MIN_PART_BYTES = 5 << 20  # of each part but the last
MAX_PART_BYTES = 5 << 30
MAX_PARTS = 10_000
MAX_OBJECT_BYTES = 5 << 40
MAX_DELETED_AT_ONCE = 1000  # per request

# Called before a write is tried again after a transient failure. What it raises ends the call.
BeforeRetry = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """An object's current state. `etag` changes with the content; it is no content hash. `metadata` is the writer's."""

    size: int
    etag: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectEntry:
    """An object in a listing; `name` is relative to the folder that was listed, with '/' for subfolders."""

    name: str
    size: int
    etag: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderListing:
    """What is in a folder itself: its objects by name, and the names of its subfolders. `folders` is None where the
    store does not tell them with the objects."""

    objects: Sequence[ObjectEntry]
    folders: Collection[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadedPart:
    """A part that the store has. It is needed to complete an upload, and is checked then."""

    number: int
    etag: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenUpload:
    """A multipart upload that is neither completed nor aborted."""

    url: str
    upload_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCounters:
    """What this process has done through one store so far, for reports."""

    requests: int = 0
    retries: int = 0
    throttled: int = 0
    bytes_read: int = 0
    bytes_sent: int = 0
    bytes_copied: int = 0  # server-side


class ObjectStore(Protocol):
    """One object store, as one process uses it."""

    @property
    def counters(self) -> StoreCounters:
        """A snapshot of the counters."""

    def stat(self, url: str) -> ObjectInfo | None:
        """The object, or None if there is none. A missing bucket is an error, not None."""

    def read(self, url: str, start: int, end: int, etag: str | None = None) -> bytes:
        """Exactly the bytes [start, end). With `etag`, raises ObjectChanged if the object is another one now."""

    def read_into(self, url: str, start: int, buffer: memoryview, etag: str | None = None) -> None:
        """The same, into the caller's memory, which avoids a second copy of the bytes."""

    def read_all(self, url: str) -> bytes:
        """A whole small object. Raises ObjectMissing if there is none."""

    def list(self, url: str) -> Sequence[ObjectEntry]:
        """All objects in the folder `url` and in its subfolders, by name.

        Empty if there are none; a missing bucket is an error.
        """

    def list_folder(self, url: str) -> FolderListing:
        """The objects in the folder `url` itself, and its subfolders. Empty and an error as in `list`."""

    def put(
        self, url: str, data: bytes, *, only_if_absent: bool = False, before_retry: BeforeRetry | None = None
    ) -> ObjectInfo:
        """Write a small object as a whole.

        With `only_if_absent`, raises ObjectExists if there is one that this very call did not write.
        """

    def delete(self, url: str) -> None:
        """Delete an object; succeeds if there is none."""

    def delete_all(self, urls: Sequence[str]) -> None:
        """Delete objects of one bucket in any order, as many per request as the store allows."""


class MultipartStore(ObjectStore, Protocol):
    """S3's multipart uploads.

    An upload is invisible until it is completed, and then the whole object is visible at once. Parts are numbered 1 to
    10,000, of 5 MiB to 5 GiB except the last. Sending a part of the same number again replaces it. Parts may come from
    any process that has the upload's id.
    """

    def create_upload(self, url: str, metadata: Mapping[str, str] | None = None) -> str:
        """Begin an upload and return its id. `metadata` becomes the object's: put an id of the run into it.

        This is the only call that is not idempotent: if its reply is lost, an open upload remains with an id that no
        process has; `list_uploads` finds it.
        """

    def upload_part(
        self,
        url: str,
        upload_id: str,
        number: int,
        data: bytes | bytearray | memoryview,
        *,
        before_retry: BeforeRetry | None = None,
    ) -> UploadedPart:
        """Send one part. The store's checksum of it is compared with the sent bytes."""

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
        """Have the store copy bytes [start, end) of another of its objects as a part; raises ObjectChanged as in
        `read`.

        Not every server honors the condition: call `check_copied` after the last copy."""

    def check_copied(self, url: str, source_url: str, end: int, source_etag: str | None = None) -> None:
        """Check an object that parts of `url` were copied from, up to `end`; raises ObjectChanged as in `read`."""

    def complete_upload(
        self,
        url: str,
        upload_id: str,
        parts: Sequence[UploadedPart],
        *,
        metadata: Mapping[str, str] | None = None,
        before_retry: BeforeRetry | None = None,
    ) -> ObjectInfo:
        """Assemble the object from its parts, in the order of their numbers, and check that it is made of them.

        If the server computes ETags as S3 does, the reply's ETag shows this; otherwise the object is checked.

        `metadata` is the argument of `create_upload`. If the upload does not exist any more, an object with the right
        size and metadata counts as this upload, completed earlier; otherwise UploadNotFound is raised.
        """

    def abort_upload(self, url: str, upload_id: str) -> None:
        """Drop an upload and its parts; succeeds if there is none."""

    def list_uploads(self, url: str) -> Sequence[OpenUpload]:
        """All open uploads of objects in the folder `url`, and of `url` itself, also those that other programs
        began."""

    def list_parts(self, url: str, upload_id: str) -> Sequence[UploadedPart]:
        """The parts that an open upload has so far, by number. Raises UploadNotFound if it is not open."""
