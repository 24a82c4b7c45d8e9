"""Reads an object as a file, from start to end or with seeks; each read is one range request."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

from raymoe.object_store.errors import ObjectMissing, StoreRequest, storage_problem
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.registry import open_store

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class ObjectFile(io.RawIOBase):
    """The object at a normalized URL, as it is when this is created: a later change raises an error.

    For small reads wrap it in `io.BufferedReader`. Raises StorageError.
    """

    def __init__(self, url: str, options: StorageOptions | None = None):
        super().__init__()
        self._url, self._store, self._position = url, open_store(url, options), 0
        info = self._store.stat(url)
        if info is None:
            request = StoreRequest(operation="head_object", url=url)
            raise storage_problem(request, "there is no such object", "correct the name", ObjectMissing)
        self._size, self._etag = info.size, info.etag

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        count = max(0, min(len(target), self._size - self._position))
        if count:
            self._store.read_into(self._url, self._position, target[:count], self._etag)
        self._position += count
        return count
