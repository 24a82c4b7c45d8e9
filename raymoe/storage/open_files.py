"""Keeps the open source files of one reader: a limited number at once, even if a shard needs more files.

A shard with tensors of all experts reads every expert's files. Files are opened when they are read, and the one that
has been idle longest is closed for the next. A descriptor that a thread is using is never closed: another file could
get its number at once.

If a file is written while it is read, the bytes would be a mix of old and new. So its time and size are noted when it
is first opened, and compared before it is closed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from raymoe.errors import CheckpointError, Problem
from raymoe.sources.facts import SourceFile

_MAX_OPEN = 32  # per reader; an actor has up to ten readers, and Ray may be started with a limit of 1024 files


@dataclass(slots=True)
class _OpenFile:
    file: SourceFile
    descriptor: int
    users: int = 0


class OpenFiles:
    """Descriptors by location, opened by `opener`. Thread-safe; `use` works again after `close`."""

    def __init__(self, opener: Callable[[SourceFile], int], max_open: int = _MAX_OPEN) -> None:
        self._opener, self._max_open = opener, max_open
        self._lock = threading.Lock()
        self._open: dict[str, _OpenFile] = {}  # the least recently used one first
        self._first_seen: dict[str, tuple[int, int]] = {}

    @contextmanager
    def use(self, file: SourceFile) -> Iterator[int]:
        """The file's descriptor, which stays open in the context. Raises CheckpointError."""
        with self._lock:
            known = self._open.pop(file.location, None)
            if known is None:
                self._close_idle(self._max_open - 1)
            opened = known or _OpenFile(file, self._opener(file))
            self._open[file.location] = opened
            if known is None:
                self._check(opened)
            opened.users += 1
        try:
            yield opened.descriptor
        finally:
            with self._lock:
                opened.users -= 1
                if not opened.users and self._open.get(file.location) is not opened:
                    os.close(opened.descriptor)  # `close` was called meanwhile

    def check(self) -> None:
        """Raises CheckpointError if an open file has been written since it was first opened."""
        with self._lock:
            for opened in self._open.values():
                self._check(opened)

    def close(self) -> None:
        """Close all files; a file in use is closed after its use."""
        with self._lock:
            for opened in self._open.values():
                if not opened.users:
                    os.close(opened.descriptor)
            self._open.clear()

    def _close_idle(self, most: int) -> None:
        for location, opened in list(self._open.items()):
            if len(self._open) <= most:
                return
            if not opened.users:
                del self._open[location]
                try:
                    self._check(opened)
                finally:
                    os.close(opened.descriptor)

    def _check(self, opened: _OpenFile) -> None:
        status = os.fstat(opened.descriptor)
        now = status.st_mtime_ns, status.st_size
        if self._first_seen.setdefault(opened.file.location, now) != now:
            remedy = "run the same command again when the file no longer changes"
            raise CheckpointError(
                [Problem(where=opened.file.location, what="the file was written while it was read", remedy=remedy)]
            )
