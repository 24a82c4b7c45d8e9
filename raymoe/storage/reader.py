"""Ranged reads of source files on this node.

A `SourceReader` opens each file once and serves ranges of it to several threads. Hub files are fetched into the Hub's
cache first. Two ways to read: `read_into` for bytes that are passed on (one copy, into the caller's buffer), `view` for
bytes that are computed with (mapped, no copy; pages are private, so that a caller may write to them).
"""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

from raymoe.errors import CheckpointError, Problem
from raymoe.sources.resolve import HubOptions, fetch_file
from raymoe.sources.types import SourceFile, TensorEntry

__all__ = ["SourceReader"]


class SourceReader:
    """Open source files of one process. Thread-safe. `close()` when done, or use it as a context manager."""

    def __init__(self, options: HubOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}

    def __enter__(self) -> SourceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def path(self, file: SourceFile) -> Path:
        """Where the file lies on this node. Raises CheckpointError if it is not there, or has changed size."""
        return fetch_file(file, self._options)

    def read_into(self, file: SourceFile, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `file` from `start` on. Raises CheckpointError on a short read."""
        descriptor, done = self._descriptor(file), 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], start + done)
            if count == 0:
                what = f"ends at byte {start + done}, expected at least {start + len(buffer)}"
                remedy = "the file changed while it was read; run the merge again"
                raise CheckpointError([Problem(where=file.location, what=what, remedy=remedy)])
            done += count

    def view(self, entry: TensorEntry) -> memoryview:
        """The bytes of a tensor, mapped. Valid until `close()`."""
        if entry.nbytes == 0:
            return memoryview(bytearray())
        return memoryview(self._map(entry.file))[entry.start : entry.end]

    def release(self) -> None:
        """Let go of mapped pages: the memory of views is given back as soon as the last of them is dropped."""
        with self._lock:
            self._maps.clear()

    def close(self) -> None:
        with self._lock:
            self._maps.clear()  # a mapping lives on while somebody still holds a view of it
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def _descriptor(self, file: SourceFile) -> int:
        with self._lock:
            if file.location not in self._descriptors:
                self._descriptors[file.location] = os.open(self.path(file), os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[file.location]

    def _map(self, file: SourceFile) -> mmap.mmap:
        descriptor = self._descriptor(file)
        with self._lock:
            if file.location not in self._maps:
                self._maps[file.location] = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE)
            return self._maps[file.location]
