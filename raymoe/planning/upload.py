"""How a shard becomes an object: the parts of a multipart upload, chosen so that most bytes never pass a worker.

A part is either copied by the store itself from a source object (the bytes are unchanged and source and output are in one
store), or sent by a worker. The store's rules: all parts but the last have at least 5 MiB, a part at most 5 GiB, an
object at most 10,000 parts. So what lies between two copied ranges and is smaller than 5 MiB takes bytes of the range
after it along, and the header at a shard's beginning takes the first bytes of the data.

Limits: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from raymoe.planning.types import Copy, Part, Shard
from raymoe.sources.types import SourceFile

__all__ = ["MIN_PART_BYTES", "CopyRange", "UploadPart", "copied_by_store", "source_ranges", "upload_parts"]

MIN_PART_BYTES = 5 << 20
MAX_COPY_BYTES = 1 << 30  # the store allows 5 GiB; smaller ones run side by side and are repeated sooner
STREAM_PART_BYTES = 16 << 20
MAX_PARTS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyRange:
    """Bytes [start, end) of a source file."""

    file: SourceFile
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadPart:
    """Part `number` (from 1) of an upload: bytes [start, end) of the shard, copied from `copy` or sent by a worker."""

    number: int
    start: int
    end: int
    copy: CopyRange | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class _Region:
    start: int
    end: int
    copy: CopyRange | None

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def source_ranges(parts: Iterable[Part]) -> Iterator[tuple[int, int, CopyRange | None]]:
    """The shard's bytes as (start, end, source range): copies that touch in the source are one range, else None."""
    pending: tuple[int, int, CopyRange | None] | None = None
    for part in parts:
        copy = None
        if isinstance(part.what, Copy):
            source = part.what.source
            copy = CopyRange(file=source.file, start=source.start, end=source.end)
        if pending is not None and _touch(pending[2], copy):
            assert pending[2] is not None
            assert copy is not None
            pending = (pending[0], part.end, replace(pending[2], end=copy.end))
            continue
        if pending is not None:
            yield pending
        pending = (part.start, part.end, copy)
    if pending is not None:
        yield pending


def _touch(left: CopyRange | None, right: CopyRange | None) -> bool:
    return left is not None and right is not None and left.file == right.file and left.end == right.start


def upload_parts(shard: Shard, same_store: Callable[[SourceFile], bool]) -> tuple[UploadPart, ...]:
    """The parts of a shard's upload. `same_store` says which sources the output's store can copy from."""
    regions = list(_enough_for_a_part(_regions(shard, same_store)))
    # The usual piece is small enough for memory; a giant shard gets larger ones, so as to stay within MAX_PARTS.
    stream_bytes = max(STREAM_PART_BYTES, math.ceil(shard.nbytes / (MAX_PARTS // 2)))
    pieces = [piece for region in regions for piece in _split(region, stream_bytes)]
    assert len(pieces) <= MAX_PARTS, f"{shard.file_name}: {len(pieces)} parts"
    return tuple(
        UploadPart(number=number, start=piece.start, end=piece.end, copy=piece.copy)
        for number, piece in enumerate(pieces, start=1)
    )


def copied_by_store(parts: Sequence[UploadPart]) -> int:
    """Bytes that never pass a worker."""
    return sum(part.nbytes for part in parts if part.copy is not None)


def _regions(shard: Shard, same_store: Callable[[SourceFile], bool]) -> Iterator[_Region]:
    """Header and data as alternating regions: to be sent, or to be copied (large enough for a part)."""
    sent = _Region(0, len(shard.header), None)
    for start, end, copy in source_ranges(shard.parts):
        if copy is not None and end - start >= MIN_PART_BYTES and same_store(copy.file):
            if sent.nbytes:
                yield sent
            yield _Region(start, end, copy)
            sent = _Region(end, end, None)
        else:
            sent = _Region(sent.start, end, None)
    if sent.nbytes:
        yield sent


def _enough_for_a_part(regions: Iterable[_Region]) -> Iterator[_Region]:
    """Regions that are all large enough, but for the last: a small one takes from the copied range behind it."""
    pending: _Region | None = None  # to be sent
    for region in regions:
        if region.copy is None:
            pending = _Region(pending.start if pending else region.start, region.end, None)
            continue
        if pending is None:
            yield region
            continue
        missing = max(0, MIN_PART_BYTES - pending.nbytes)
        if region.nbytes - missing < MIN_PART_BYTES and missing:
            pending = _Region(pending.start, region.end, None)  # what would be left is too small to be copied
            continue
        cut = region.start + missing
        yield _Region(pending.start, cut, None)
        yield _Region(cut, region.end, replace(region.copy, start=region.copy.start + missing))
        pending = None
    if pending is not None:
        yield pending


def _split(region: _Region, stream_bytes: int) -> Iterator[_Region]:
    """A region in nearly equal pieces of at most the limit of its kind."""
    limit = stream_bytes if region.copy is None else MAX_COPY_BYTES
    count = math.ceil(region.nbytes / limit)
    for index in range(count):
        start = region.start + region.nbytes * index // count
        end = region.start + region.nbytes * (index + 1) // count
        copy = region.copy
        if copy is not None:
            shift = copy.start - region.start
            copy = replace(copy, start=start + shift, end=end + shift)
        yield _Region(start, end, copy)
