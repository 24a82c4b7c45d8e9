"""One read of each byte: what the gate pass and the writing of shards both want of an object is fetched once.

    gates  --read--> object store --+--> gates
                                    +--> a file without a name --read--> shards, and its room is free again

and the other way round, whichever comes first. Ranges that are on their way are waited for. The file has the object's
own offsets and holds only what the other side has not read yet; it is gone with the process, however that ends.
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
from typing import IO, Literal

from raymoe.objects.urls import is_url
from raymoe.sources.types import SourceFile, TensorEntry
from raymoe.storage.linux import free_range

__all__ = ["Fetch", "Side", "Spool"]

_MOST_BYTES = 64 << 30
_MOST_IN_MEMORY = 256 << 20  # where temporary files lie in memory

Side = Literal["gates", "shards"]
Fetch = Callable[[int, memoryview], None]
"""Fills a buffer with the bytes of an object from a position on."""


@dataclass(eq=False)
class _Segment:
    """Bytes [start, end) that both sides want. `kept_by`: the side that has read them and left them for the other.

    `gates_gone`: the gate pass has ended meanwhile.
    """

    start: int
    end: int
    kept_by: Side | None = None
    in_use: bool = False
    gates_gone: bool = False

    def split(self, at: int) -> _Segment:
        """Keep what lies before `at`; the rest."""
        rest = _Segment(at, self.end, self.kept_by)
        self.end = at
        return rest


@dataclass
class _Object:
    """The segments of one object, in order, and the file that keeps them."""

    segments: list[_Segment] = field(default_factory=list)
    file: IO[bytes] | None = None

    def add(self, start: int, end: int) -> None:
        """Want a range, as far as it is not wanted already."""
        at = start
        for known in [*self.overlapping(start, end), _Segment(end, end)]:
            if at < known.start:
                self.segments.insert(bisect_left(self.segments, at, key=_start), _Segment(at, known.start))
            at = max(at, known.end)

    def overlapping(self, start: int, end: int) -> list[_Segment]:
        first = max(0, bisect_left(self.segments, start, key=_start) - 1)
        last = bisect_left(self.segments, end, key=_start)
        return [segment for segment in self.segments[first:last] if segment.end > start]

    def cut_out(self, start: int, end: int) -> list[_Segment]:
        """The segments within [start, end); those that reach beyond are split, unless they are in use."""
        for at in (start, end):
            for segment in self.overlapping(at, at + 1):
                if segment.start < at and not segment.in_use:
                    self.segments.insert(self.segments.index(segment) + 1, segment.split(at))
        return self.overlapping(start, end)


def _start(segment: _Segment) -> int:
    return segment.start


class Spool:
    """What one process keeps of objects between its two readings. Thread-safe.

    At most `most_bytes` are kept in `folder` (default: the system's for temporary files, at most half of its free
    room). What does not fit is simply read again.
    """

    def __init__(self, folder: Path | None = None, most_bytes: int | None = None) -> None:
        self._folder = folder or Path(tempfile.gettempdir())
        self._most_bytes = _room(self._folder) if most_bytes is None else most_bytes
        self._changed = threading.Condition()
        self._objects: dict[SourceFile, _Object] = {}
        self._kept_bytes = 0

    def expect(self, entries: Iterable[TensorEntry]) -> None:
        """The gate pass will read these, and they are also written. Local files are left to the page cache."""
        with self._changed:
            for entry in entries:
                if is_url(entry.file.location):
                    self._objects.setdefault(entry.file, _Object()).add(entry.start, entry.end)

    def gates_are_done(self, entries: Iterable[TensorEntry]) -> None:
        """The gate pass has read what it wanted of these: they are not kept for it any more."""
        with self._changed:
            for entry in entries:
                if (kept := self._objects.get(entry.file)) is not None:
                    left = [s for s in kept.cut_out(entry.start, entry.end) if s.kept_by != "gates"]
                    for segment in left:
                        segment.gates_gone = True
                    self._drop(kept, [segment for segment in left if not segment.in_use])

    def read_into(self, side: Side, file: SourceFile, start: int, buffer: memoryview, fetch: Fetch) -> None:
        """Fill `buffer` from `start` on: what the other side has left from the spool, the rest by `fetch`."""
        found = self._claim(side, file, start, start + len(buffer))
        if found is None:
            fetch(start, buffer)
            return
        kept, segments = found
        there = [segment for segment in segments if segment.kept_by is not None]
        stored: list[_Segment] = []
        try:
            self._read(kept, there, start, buffer)
            for low, high in _gaps(start, start + len(buffer), there):
                fetch(low, buffer[low - start : high - start])
            stored = self._store(kept, [s for s in segments if s.kept_by is None], start, buffer)
        except BaseException:
            self._give_back(segments)
            raise
        with self._changed:
            for segment in stored:
                segment.kept_by = side
            of_use = [segment for segment in stored if side == "gates" or not segment.gates_gone]
            self._drop(kept, [segment for segment in segments if segment not in of_use])
        self._give_back(of_use)

    def _claim(self, side: Side, file: SourceFile, start: int, end: int) -> tuple[_Object, list[_Segment]] | None:
        """The segments of a range that this call is to fetch and keep, or to take; None if it has none of either."""
        with self._changed:
            kept = self._objects.get(file)
            if kept is None:
                return None
            while any(segment.in_use for segment in kept.overlapping(start, end)):
                self._changed.wait()
            segments = [segment for segment in kept.cut_out(start, end) if segment.kept_by != side]
            for segment in segments:
                segment.in_use = True
            return (kept, segments) if segments else None

    def _give_back(self, segments: Iterable[_Segment]) -> None:
        with self._changed:
            for segment in segments:
                segment.in_use = False
            self._changed.notify_all()

    def _read(self, kept: _Object, segments: Sequence[_Segment], start: int, buffer: memoryview) -> None:
        for segment in segments:
            assert kept.file is not None
            part, done = buffer[segment.start - start : segment.end - start], 0
            while done < len(part):
                count = os.preadv(kept.file.fileno(), [part[done:]], segment.start + done)
                assert count, "the spool lost what it had kept"
                done += count

    def _store(self, kept: _Object, segments: Sequence[_Segment], start: int, buffer: memoryview) -> list[_Segment]:
        """Those of the segments that there was room for."""
        stored = []
        for segment in segments:
            size = segment.end - segment.start
            with self._changed:
                if self._kept_bytes + size > self._most_bytes:
                    continue
                self._kept_bytes += size
                if kept.file is None:
                    kept.file = tempfile.TemporaryFile(dir=self._folder, prefix="raymoe-spool-")  # noqa: SIM115
            try:
                _write(kept.file.fileno(), segment.start, buffer[segment.start - start : segment.end - start])
                stored.append(segment)
            except OSError:  # the disk is full: it is read again
                with self._changed:
                    self._kept_bytes -= size
        return stored

    def _drop(self, kept: _Object, segments: Iterable[_Segment]) -> None:
        """Forget segments; both sides have read them, or one never will. Call it with the lock held."""
        for segment in segments:
            kept.segments.remove(segment)
            if segment.kept_by is not None and kept.file is not None:
                self._kept_bytes -= segment.end - segment.start
                free_range(kept.file.fileno(), segment.start, segment.end - segment.start)
            segment.in_use = False
        self._changed.notify_all()


def _gaps(start: int, end: int, segments: Iterable[_Segment]) -> list[tuple[int, int]]:
    """What of [start, end) lies in none of the segments."""
    gaps, at = [], start
    for segment in segments:
        if at < segment.start:
            gaps.append((at, segment.start))
        at = segment.end
    return [*gaps, (at, end)] if at < end else gaps


def _write(descriptor: int, start: int, content: memoryview) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], start + done)


def _room(folder: Path) -> int:
    """Bytes that may be kept in a folder."""
    free = shutil.disk_usage(folder).free // 2
    return min(free, _MOST_IN_MEMORY if _is_in_memory(folder) else _MOST_BYTES)


def _is_in_memory(folder: Path) -> bool:
    """Whether the folder's filesystem is a tmpfs, as Linux tells it."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return False
    place = folder.resolve()
    above = [(len(words[1]), words[2]) for words in mounts if place.is_relative_to(words[1])]
    return max(above, default=(0, ""))[1] in ("tmpfs", "ramfs")
