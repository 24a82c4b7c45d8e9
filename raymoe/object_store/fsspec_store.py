"""Any file system that fsspec knows (gs://, az://, memory://, https://, ...) as a plain `ObjectStore`.

fsspec guarantees less for all of them than S3 does. No condition is sent with a request, so whether an object changed
is checked after it is read. 'Only if absent' is a check, and then the file system's own `mode="create"`, which is as
strong as that file system makes it. Each file system finds credentials itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from raymoe.object_store.error_messages import storage_error
from raymoe.object_store.errors import StoreRequest, object_exists_error
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.parallel import delete_each
from raymoe.object_store.protocol import BeforeRetry, FolderListing, ObjectEntry, ObjectInfo, StoreCounters
from raymoe.object_store.retry import Failure, FailureKind, Mismatch, Retries, ShortRead, classify_error

_T = TypeVar("_T")

# File systems in which folders exist even if they are empty.
_WITH_FOLDERS = frozenset({"file", "local", "memory", "sftp", "ssh", "hdfs", "arrow_hdfs", "webhdfs", "smb", "ftp"})
_COPY_BYTES = 8 << 20
# File systems that list nothing if the server was not reached.
_HIDES_MISSING = frozenset({"http", "https"})
# Names of a value that changes with the content, the best first.
_ETAG_KEYS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "generation",
    "mtime",
    "last_modified",
    "LastModified",
    "created",
)


class FsspecStore:
    """Implements `ObjectStore` for the URLs of one scheme."""

    def __init__(self, scheme: str, options: StorageOptions):
        self.scheme, self.options = scheme, options
        self._retries = Retries(options.max_requests, options.deadline_s)

    @property
    def counters(self) -> StoreCounters:
        return self._retries.counters

    def stat(self, url: str) -> ObjectInfo | None:
        def look() -> ObjectInfo | None:
            filesystem, path = self._open(url)
            try:
                info = filesystem.info(path)
            except FileNotFoundError as error:
                _raise_if_unreachable(error.__cause__)
                return None
            if info.get("type") == "directory":
                return None
            if info.get("size") is None:
                raise Mismatch("the server gives no size for it")
            return ObjectInfo(size=info["size"], etag=_etag(info))

        return self._call("head_object", url, look)

    def read(self, url: str, start: int, end: int, etag: str | None = None) -> bytes:
        if start == end:
            return b""

        def get() -> bytes:
            filesystem, path = self._open(url)
            data: bytes = filesystem.cat_file(path, start=start, end=end)
            if len(data) != end - start:
                size = filesystem.info(path).get("size")
                if size is not None and size < end:
                    raise Mismatch(f"it has {size} bytes, and at least {end} were expected")
                raise ShortRead(f"the store sent {len(data)} bytes, but {end - start} were requested")
            if etag is not None and (now := _etag(filesystem.info(path))) != etag:
                raise Mismatch(f"its ETag or time is another ({now})")
            return data

        data = self._call("get_object", url, get)
        self._retries.count(bytes_read=len(data))
        return data

    def read_into(self, url: str, start: int, buffer: memoryview, etag: str | None = None) -> None:
        buffer[:] = self.read(url, start, start + len(buffer), etag)

    def read_all(self, url: str) -> bytes:
        def get() -> bytes:
            filesystem, path = self._open(url)
            data: bytes = filesystem.cat_file(path)
            return data

        data = self._call("get_object", url, get)
        self._retries.count(bytes_read=len(data))
        return data

    def list(self, url: str) -> Sequence[ObjectEntry]:
        return self._find(url, depth=None)

    def list_folder(self, url: str) -> FolderListing:
        return FolderListing(objects=self._find(url, depth=1))

    def _find(self, url: str, depth: int | None) -> Sequence[ObjectEntry]:
        def find() -> Sequence[ObjectEntry]:
            filesystem, path = self._open(url)
            try:
                found = filesystem.find(path, maxdepth=depth, detail=True)
                if not found and self.scheme in _HIDES_MISSING:
                    try:
                        filesystem.ls(path)
                    except Exception as error:
                        _raise_if_unreachable(error)
            except FileNotFoundError as error:
                _raise_if_unreachable(error.__cause__)
                return []
            prefix = path.rstrip("/") + "/"
            # A file of this very name is listed as its own content.
            entries = [
                ObjectEntry(name=name.removeprefix(prefix), size=info.get("size") or 0, etag=_etag(info))
                for name, info in found.items()
                if name.startswith(prefix)
            ]
            return sorted(entries, key=lambda entry: entry.name)

        return self._call("list_objects_v2", url, find)

    def put(
        self, url: str, data: bytes, *, only_if_absent: bool = False, before_retry: BeforeRetry | None = None
    ) -> ObjectInfo:
        if only_if_absent and self.stat(url) is not None:
            raise object_exists_error(url)

        tries = 0

        def pipe() -> ObjectInfo:
            nonlocal tries
            tries += 1
            filesystem, path = self._open(url)
            try:
                if self.scheme in _WITH_FOLDERS:
                    filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                _write_object(filesystem, path, data, only_if_absent=only_if_absent)
            except FileExistsError:
                # It is our own if an earlier try succeeded and its reply was lost.
                if tries == 1 or filesystem.cat_file(path) != data:
                    raise
            info = filesystem.info(path)
            if info.get("size") != len(data):
                raise ShortRead(f"the store has {info.get('size')} bytes, and {len(data)} were sent")
            return ObjectInfo(size=len(data), etag=_etag(info))

        info = self._call("put_object", url, pipe, before_retry)
        self._retries.count(bytes_sent=len(data))
        return info

    def delete(self, url: str) -> None:
        def remove() -> None:
            filesystem, path = self._open(url)
            try:
                filesystem.rm_file(path)
            except FileNotFoundError:
                return

        self._call("delete_object", url, remove)

    def delete_all(self, urls: Sequence[str]) -> None:
        delete_each(self, urls)

    def move(self, url: str, to: str, size: int, *, before_retry: BeforeRetry | None = None) -> ObjectInfo:
        """Rename a file of `size` bytes, and replace any file at the new name. In one step if the file system can
        rename; else the store copies it, or, if it can do neither, this process."""
        tries = 0

        def rename() -> ObjectInfo:
            nonlocal tries
            tries += 1
            filesystem, path = self._open(url)
            _, target = self._open(to)
            try:
                if self.scheme in _WITH_FOLDERS:
                    filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                _rename(filesystem, path, target)
            except FileNotFoundError:
                # Did an earlier try succeed, and its reply get lost?
                if tries == 1 or not filesystem.exists(target):
                    raise
            info = filesystem.info(target)
            if info.get("size") != size:
                raise ShortRead(f"the store has {info.get('size')} bytes, and {size} were moved")
            return ObjectInfo(size=size, etag=_etag(info))

        return self._call("copy_object", to, rename, before_retry)

    def _open(self, url: str) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        # Cheap: fsspec caches the instances.
        filesystem, path = url_to_fs(url, use_listings_cache=False)
        return filesystem, str(path)

    def _call(self, operation: str, url: str, step: Callable[[], _T], before_retry: BeforeRetry | None = None) -> _T:
        outcome = self._retries.run(lambda _left: step(), urlsplit(url).netloc, before_retry=before_retry)
        if isinstance(outcome, Failure):
            raise storage_error(outcome, StoreRequest(operation=operation, url=url), self.options)
        return outcome


def _write_object(filesystem: Any, path: str, data: bytes, *, only_if_absent: bool) -> None:
    if only_if_absent:
        try:
            filesystem.pipe_file(path, data, mode="create")
            return
        # a file system without such a mode: the check before has to be enough
        except (NotImplementedError, ValueError):
            pass
    filesystem.pipe_file(path, data, mode="overwrite")


def _rename(filesystem: Any, path: str, target: str) -> None:
    from fsspec import AbstractFileSystem

    if type(filesystem).mv is not AbstractFileSystem.mv:  # fsspec's own generic move would copy, after many requests
        try:
            filesystem.mv(path, target)
        except FileExistsError:  # not all file systems replace an existing file
            filesystem.rm_file(target)
            filesystem.mv(path, target)
        return
    try:
        filesystem.cp_file(path, target)
    except NotImplementedError:
        with filesystem.open(path, "rb") as source, filesystem.open(target, "wb") as copy:
            shutil.copyfileobj(source, copy, _COPY_BYTES)
    if filesystem.info(target).get("size") == filesystem.info(path).get("size"):
        filesystem.rm_file(path)


def _raise_if_unreachable(error: BaseException | None) -> None:
    """Raise if a file system reports a missing file, but its server was not reached or is failing."""
    if isinstance(error, Exception) and classify_error(error) is not FailureKind.PERMANENT:
        raise error


def _etag(info: Mapping[str, Any]) -> str | None:
    value = next((info[key] for key in _ETAG_KEYS if info.get(key) is not None), None)
    # Some give a time as a number in one call and as a datetime in another.
    value = value.timestamp() if isinstance(value, datetime) else value
    return None if value is None else str(value).strip('"')
