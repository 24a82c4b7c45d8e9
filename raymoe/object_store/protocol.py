"""The protocol that object stores are used through, and what it speaks of.

    ObjectStore       what every store can do: look, list, read a range, put a small object, delete
    MultipartStore    what S3 adds: objects assembled from parts that several processes upload or have copied

Promises of every method:
- Thread-safe; meant to be called from many threads at once. The store itself bounds the requests under way.
- Transient failures are retried until the deadline of `StorageOptions`; what is raised then, or for anything that
  waiting does not mend, is a `StorageError` (errors.py), with the special cases that callers tell apart as its
  subclasses.
- Idempotent: calling again after any failure, also after a reply that was lost, ends in the same state and the
  same result.
- URLs are normalised (urls.py), sizes are bytes, intervals half-open, ETags without their quotes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

# Limits of a multipart upload on S3: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
MIN_PART_BYTES = 5 << 20  # of each part but the last
MAX_PART_BYTES = 5 << 30
MAX_PARTS = 10_000
MAX_OBJECT_BYTES = 5 << 40
MAX_DELETED_AT_ONCE = 1000  # with a request


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """An object as it is now. `etag` changes with the content; it is no content hash. `metadata` is the writer's."""

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
    """A part that the store has: what completing an upload needs, and is checked against."""

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
    bytes_copied: int = 0  # by the server itself


class ObjectStore(Protocol):
    """One object store, seen from one process."""

    @property
    def counters(self) -> StoreCounters:
        """A snapshot."""

    def stat(self, url: str) -> ObjectInfo | None:
        """The object, or None if there is none. A missing bucket is an error, not None."""

    def read(self, url: str, start: int, end: int, etag: str | None = None) -> bytes:
        """Exactly the bytes [start, end). With `etag`, ObjectChanged if the object is another by now."""

    def read_into(self, url: str, start: int, buffer: memoryview, etag: str | None = None) -> None:
        """The same, into memory of the caller: what is read is held once and not twice."""

    def read_all(self, url: str) -> bytes:
        """A whole small object. ObjectMissing if there is none."""

    def list(self, url: str) -> Sequence[ObjectEntry]:
        """All objects in the folder `url` and in its subfolders, by name.

        Empty where there is nothing; a missing bucket is an error.
        """

    def list_folder(self, url: str) -> FolderListing:
        """The objects in the folder `url` itself, and its subfolders. Empty and an error as in `list`."""

    def put(self, url: str, data: bytes, *, only_if_absent: bool = False) -> ObjectInfo:
        """Write a small object as a whole.

        With `only_if_absent`, ObjectExists if there is one that was not written by this very call.
        """

    def delete(self, url: str) -> None:
        """Delete an object; done if there is none."""

    def delete_all(self, urls: Sequence[str]) -> None:
        """Delete objects of one bucket in any order, as many with a request as the store takes."""


class MultipartStore(ObjectStore, Protocol):
    """S3's multipart uploads.

    An upload is invisible until it is completed, and then visible at once as a whole. Parts are numbered 1 to 10,000,
    of 5 MiB to 5 GiB except the last. Sending a part of the same number again replaces it. Parts may come from any
    process that has the upload's id.
    """

    def create_upload(self, url: str, metadata: Mapping[str, str] | None = None) -> str:
        """Begin an upload and return its id. `metadata` becomes the object's: put an id of the run into it.

        The one call that is not idempotent: where its reply is lost, an upload stays open that nobody knows;
        `list_uploads` finds it.
        """

    def upload_part(self, url: str, upload_id: str, number: int, data: bytes | bytearray | memoryview) -> UploadedPart:
        """Send one part. What the store says it got is compared with what was sent."""

    def copy_part(
        self,
        url: str,
        upload_id: str,
        number: int,
        source_url: str,
        start: int,
        end: int,
        source_etag: str | None = None,
    ) -> UploadedPart:
        """Have the store copy bytes [start, end) of another of its objects as a part; ObjectChanged as in `read`.

        Not every server keeps the condition: call `check_copied` when all is copied."""

    def check_copied(self, url: str, source_url: str, end: int, source_etag: str | None = None) -> None:
        """Look at an object that parts of `url` have been copied from, up to `end`; ObjectChanged as in `read`."""

    def complete_upload(
        self, url: str, upload_id: str, parts: Sequence[UploadedPart], *, metadata: Mapping[str, str] | None = None
    ) -> ObjectInfo:
        """Make the object of its parts, in the order of their numbers, and check that it is made of them.

        The ETag of the answer shows it where the server's ETags are those that S3 makes of the parts'; else the object
        is looked at.

        `metadata` is what `create_upload` was given. Where the upload is no longer there, an object of the right size
        and metadata counts as this upload, completed earlier; else UploadNotFound.
        """

    def abort_upload(self, url: str, upload_id: str) -> None:
        """Drop an upload and its parts; done if there is none."""

    def list_uploads(self, url: str) -> Sequence[OpenUpload]:
        """All open uploads of objects in the folder `url`, and of `url` itself; whoever began them."""

    def list_parts(self, url: str, upload_id: str) -> Sequence[UploadedPart]:
        """The parts that an open upload has so far, by number. UploadNotFound if it is not open."""
