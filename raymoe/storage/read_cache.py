"""Caches object bytes so that each is fetched once per process, even if several jobs need it.

    gates    --read--> object store --+--> gates
                                      +--> temporary file --read--> shards; then its space is freed

The same holds if the shard reads first, and for shards that are made of the same weights, such as experts that share
one model and differ in adapters. Ranges that are being fetched are waited for. The cache is a sparse, unlinked
temporary file that uses the object's offsets. Ranges are freed after their last expected reader; the kernel removes the
file when the process exits.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from raymoe.sources.facts import SourceFile, TensorEntry
from raymoe.storage.file_writer import write_all
from raymoe.storage.linux_io import free_range

_MAX_BYTES = 64 << 30
_MAX_IN_MEMORY_BYTES = 256 << 20  # limit if temporary files are in memory

GATES = "gates"
SHARDS = "shards"
"""The names of readers: the gate pass, and shards (any shard that will come). A shard that shares weights with others
reads under its own name."""

Fetch = Callable[[int, memoryview], None]
"""Fills a buffer with the bytes of an object from a position on."""


@dataclass(eq=False)
class _Segment:
    """Bytes [start, end), their expected readers, and whether they are in the file."""

    start: int
    end: int
    wanted: set[str] = field(default_factory=set)
    is_stored: bool = False
    in_use: bool = False

    def split(self, at: int) -> _Segment:
        """Keep the bytes before `at`; returns a segment with the rest."""
        rest = _Segment(at, self.end, set(self.wanted), self.is_stored)
        self.end = at
        return rest

    def other_readers(self, reader: str) -> set[str]:
        """The expected readers other than `reader`, which reads now."""
        served = reader if reader in self.wanted or reader == GATES else SHARDS
        return self.wanted - {served}


@dataclass
class _CachedObject:
    """The segments of one object, in order, and the file that holds them."""

    segments: list[_Segment] = field(default_factory=list)
    file: IO[bytes] | None = None

    def add(self, start: int, end: int, readers: Iterable[str]) -> None:
        """Add `readers` as expected readers of a range."""
        at = start
        for known in [*self.segments_within(start, end), _Segment(end, end)]:
            if at < known.start:
                self.segments.insert(bisect_left(self.segments, at, key=_start), _Segment(at, known.start))
            at = max(at, known.end)
        for segment in self.overlapping(start, end):
            segment.wanted |= set(readers)

    def overlapping(self, start: int, end: int) -> list[_Segment]:
        first = max(0, bisect_left(self.segments, start, key=_start) - 1)
        last = bisect_left(self.segments, end, key=_start)
        return [segment for segment in self.segments[first:last] if segment.end > start]

    def segments_within(self, start: int, end: int) -> list[_Segment]:
        """The segments within [start, end); segments that extend beyond are split, unless they are in use."""
        for at in (start, end):
            for segment in self.overlapping(at, at + 1):
                if segment.start < at and not segment.in_use:
                    self.segments.insert(self.segments.index(segment) + 1, segment.split(at))
        return self.overlapping(start, end)


def _start(segment: _Segment) -> int:
    return segment.start


class ReadCache:
    """The object bytes that one process keeps between reads. Thread-safe.

    At most `most_bytes` are kept in `folder` (default: the system's temporary folder, at most half of its free space).
    Bytes that do not fit are read again from the store.
    """

    def __init__(self, folder: Path | None = None, most_bytes: int | None = None) -> None:
        self._folder = folder or Path(tempfile.gettempdir())
        self._most_bytes = _available_bytes(self._folder) if most_bytes is None else most_bytes
        self._changed = threading.Condition()
        self._objects: dict[SourceFile, _CachedObject] = {}
        self._cached_bytes = 0

    def expect(self, entries: Iterable[TensorEntry], *readers: str) -> None:
        """Announce that all of `readers` will read these. Local files are left to the page cache."""
        with self._changed:
            for entry in entries:
                if entry.file.kind.is_object and entry.nbytes:
                    self._objects.setdefault(entry.file, _CachedObject()).add(entry.start, entry.end, readers)

    def forget(self, entries: Iterable[TensorEntry], *readers: str) -> None:
        """Announce that `readers` will not read these any more, so they are not kept for them."""
        with self._changed:
            for entry in entries:
                if (kept := self._objects.get(entry.file)) is not None:
                    segments = kept.segments_within(entry.start, entry.end)
                    for segment in segments:
                        segment.wanted -= set(readers)
                    self._drop(kept, [s for s in segments if not s.wanted and not s.in_use])

    def read_into(self, reader: str, file: SourceFile, start: int, buffer: memoryview, fetch: Fetch) -> None:
        """Fill `buffer` from `start` on: cached bytes from the file, the rest by `fetch`."""
        found = self._claim(file, start, start + len(buffer))
        if found is None:
            fetch(start, buffer)
            return
        kept, segments = found
        try:
            there = [segment for segment in segments if segment.is_stored]
            self._read(kept, there, start, buffer)
            for low, high in _gaps(start, start + len(buffer), there):
                fetch(low, buffer[low - start : high - start])
            new = [segment for segment in segments if not segment.is_stored and segment.other_readers(reader)]
            stored = self._store(kept, new, start, buffer)
        except BaseException:
            self._release(segments)
            raise
        with self._changed:
            for segment in segments:
                segment.is_stored |= segment in stored
                segment.wanted = segment.other_readers(reader)
            self._drop(kept, [segment for segment in segments if not segment.wanted])
        self._release(segments)

    def _claim(self, file: SourceFile, start: int, end: int) -> tuple[_CachedObject, list[_Segment]] | None:
        """The segments of a range, reserved for this call to fetch or to take; None if no reader expects any of it."""
        with self._changed:
            kept = self._objects.get(file)
            if kept is None:
                return None
            while any(segment.in_use for segment in kept.overlapping(start, end)):
                self._changed.wait()
            segments = kept.segments_within(start, end)
            for segment in segments:
                segment.in_use = True
            return (kept, segments) if segments else None

    def _release(self, segments: Iterable[_Segment]) -> None:
        with self._changed:
            for segment in segments:
                segment.in_use = False
            self._changed.notify_all()

    def _read(self, kept: _CachedObject, segments: Sequence[_Segment], start: int, buffer: memoryview) -> None:
        for segment in segments:
            assert kept.file is not None
            part, done = buffer[segment.start - start : segment.end - start], 0
            while done < len(part):
                count = os.preadv(kept.file.fileno(), [part[done:]], segment.start + done)
                assert count, "the spool lost what it had kept"
                done += count

    def _store(
        self, kept: _CachedObject, segments: Sequence[_Segment], start: int, buffer: memoryview
    ) -> list[_Segment]:
        """Store segments; returns those that there was room for."""
        stored = []
        for segment in segments:
            size = segment.end - segment.start
            with self._changed:
                if self._cached_bytes + size > self._most_bytes:
                    continue
                self._cached_bytes += size
            try:
                with self._changed:
                    if kept.file is None:
                        kept.file = tempfile.TemporaryFile(dir=self._folder, prefix="raymoe-spool-")  # noqa: SIM115
                write_all(kept.file.fileno(), buffer[segment.start - start : segment.end - start], segment.start)
                stored.append(segment)
            except OSError:  # the disk is full, or the folder is gone: the bytes are read again
                with self._changed:
                    self._cached_bytes -= size
        return stored

    def _drop(self, kept: _CachedObject, segments: Iterable[_Segment]) -> None:
        """Forget segments without expected readers. Call it with the lock held."""
        for segment in segments:
            kept.segments.remove(segment)
            if segment.is_stored and kept.file is not None:
                self._cached_bytes -= segment.end - segment.start
                free_range(kept.file.fileno(), segment.start, segment.end - segment.start)
            segment.in_use = False
        self._changed.notify_all()


def _gaps(start: int, end: int, segments: Iterable[_Segment]) -> list[tuple[int, int]]:
    """The ranges of [start, end) that no segment covers."""
    gaps, at = [], start
    for segment in segments:
        if at < segment.start:
            gaps.append((at, segment.start))
        at = segment.end
    return [*gaps, (at, end)] if at < end else gaps


def _available_bytes(folder: Path) -> int:
    """Bytes that may be kept in a folder."""
    free = shutil.disk_usage(folder).free // 2
    return min(free, _MAX_IN_MEMORY_BYTES if _is_in_memory(folder) else _MAX_BYTES)


def _is_in_memory(folder: Path) -> bool:
    """Whether the folder is on a tmpfs. Linux only."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return False
    place = folder.resolve()
    above = [(len(words[1]), words[2]) for words in mounts if place.is_relative_to(words[1])]
    return max(above, default=(0, ""))[1] in ("tmpfs", "ramfs")
