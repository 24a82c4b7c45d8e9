"""Decides how a shard becomes an object: the parts of a multipart upload, chosen so that few bytes pass a worker.

A part is either a server-side copy from a source object (if the bytes are unchanged, and source and output are in one
store), or sent by a worker. The store's rules: all parts but the last have at least 5 MiB, a part at most 5 GiB, an
object at most 10,000 parts. So a gap of less than 5 MiB between two copied ranges takes bytes of the range after it
along, and the header at a shard's start takes the first bytes of the data.

A shard of hundreds of gigabytes could have more such parts than an object may. Then longer parts are copied, of up to 5
GiB. If there are still too many, the shortest ranges are sent, as few of them as possible.

Limits: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from raymoe.errors import Problem, first_few
from raymoe.formatting import human_bytes
from raymoe.object_store.protocol import MAX_OBJECT_BYTES, MAX_PART_BYTES, MAX_PARTS, MIN_PART_BYTES
from raymoe.planning.plan import Copy, Part, Shard
from raymoe.sources.facts import SourceFile

COPY_PART_BYTES = 1 << 30  # usual copies: they run in parallel, and are cheaper to retry than the largest possible
STREAM_PART_BYTES = 16 << 20
# Increase this if the code below cuts a shard into other parts than before. A run may resume an upload that another
# version of raymoe began, and must not mix two layouts in one object.
_LAYOUT_FORMAT = 1
_LAYOUT_FORMAT_OF_MANY_RANGES = 2  # the same for shards that may have more than MAX_PARTS ranges and gaps


@dataclass(frozen=True, slots=True)
class CopyRange:
    """Bytes [start, end) of a source file."""

    file: SourceFile
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Bytes [start, end) of a shard: one range of a source, or a part that is computed."""

    start: int
    end: int
    what: CopyRange | Part


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

    def overlaps(self, part: Part) -> bool:
        """Whether it contains bytes of that part of the shard."""
        return self.start < part.end and part.start < self.end


class _Region(NamedTuple):
    """Bytes [start, end) of a shard that are copied from `copy`, or sent."""

    start: int
    end: int
    copy: CopyRange | None

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def spans(parts: Iterable[Part]) -> Iterator[Span]:
    """The parts in order; adjacent copies with adjacent source ranges are one span."""
    pending: Span | None = None
    for part in parts:
        span = Span(start=part.start, end=part.end, what=part)
        if isinstance(part.what, Copy):
            source = part.what.source
            span = Span(start=part.start, end=part.end, what=CopyRange(source.file, source.start, source.end))
        joined = _join_spans(pending, span) if pending is not None else None
        if pending is not None and joined is None:
            yield pending
        pending = joined or span
    if pending is not None:
        yield pending


def _join_spans(left: Span, right: Span) -> Span | None:
    """Both as one span, if they are copies of adjacent ranges."""
    a, b = left.what, right.what
    if left.end != right.start:  # the bytes between them are not requested
        return None
    if isinstance(a, CopyRange) and isinstance(b, CopyRange) and a.file == b.file and a.end == b.start:
        return Span(start=left.start, end=right.end, what=CopyRange(a.file, a.start, b.end))
    return None


def upload_parts(shard: Shard, same_store: Callable[[SourceFile], bool]) -> tuple[UploadPart, ...]:
    """The parts of a shard's upload. `same_store` says which sources the output's store can copy from."""
    stream_bytes = _stream_bytes(shard)
    regions, copy_bytes = _fit(tuple(_regions(shard, same_store)), stream_bytes)
    pieces = (
        piece for region in regions for piece in _split(region, stream_bytes if region.copy is None else copy_bytes)
    )
    return tuple(
        UploadPart(number=number, start=piece.start, end=piece.end, copy=piece.copy)
        for number, piece in enumerate(pieces, start=1)
    )


def upload_problems(shards: Iterable[Shard], where: str) -> list[Problem]:
    """The shards that are too large for an S3 object, as problems of the output `where`."""
    return first_few(
        Problem(
            where=where,
            what=f"{shard.file_name} would have {human_bytes(shard.nbytes)}, but an object of S3 has at most "
            f"{human_bytes(MAX_OBJECT_BYTES)} (5 TiB)",
            remedy="use a smaller --out-shard-size",
        )
        for shard in shards
        if shard.nbytes > MAX_OBJECT_BYTES
    )


def upload_layout(shards: Iterable[Shard]) -> tuple[int, ...]:
    """Everything besides the shards that decides how they are cut into parts."""
    layout = _LAYOUT_FORMAT_OF_MANY_RANGES if any(map(_may_exceed_parts, shards)) else _LAYOUT_FORMAT
    return layout, MIN_PART_BYTES, MAX_PART_BYTES, COPY_PART_BYTES, STREAM_PART_BYTES, MAX_PARTS


def _may_exceed_parts(shard: Shard) -> bool:
    """Whether parts of the usual sizes could be too many, whichever ranges a store copies. Never up to 20 GB."""
    usual = math.ceil(shard.nbytes / COPY_PART_BYTES) + math.ceil(shard.nbytes / _stream_bytes(shard))
    if usual + 2 * (shard.nbytes // MIN_PART_BYTES) < MAX_PARTS:
        return False
    lengths = (span.end - span.start for span in spans(shard.parts) if isinstance(span.what, CopyRange))
    return usual + 2 * sum(length >= MIN_PART_BYTES for length in lengths) >= MAX_PARTS


def _stream_bytes(shard: Shard) -> int:
    """The size of sent parts: small enough for memory; larger for a giant shard, to stay within MAX_PARTS."""
    return max(STREAM_PART_BYTES, math.ceil(shard.nbytes / (MAX_PARTS // 2)))


def server_side_bytes(parts: Sequence[UploadPart]) -> int:
    """Bytes that never pass a worker."""
    return sum(part.nbytes for part in parts if part.copy is not None)


def _fit(regions: Sequence[_Region], stream_bytes: int) -> tuple[list[_Region], int]:
    """The regions with which an upload has at most MAX_PARTS parts, and the largest part that is copied.

    Copies have the usual size if they fit, else a larger one; else the shortest ranges are sent: among equal ones the
    first, which are next to sent ranges.
    """
    merged = list(_merge_small_regions(regions))
    for copy_bytes in range(COPY_PART_BYTES, MAX_PART_BYTES + 1, COPY_PART_BYTES):
        if _count_parts(merged, stream_bytes, copy_bytes) <= MAX_PARTS:
            return merged, copy_bytes
    by_length = sorted(
        (number for number, region in enumerate(regions) if region.copy is not None),
        key=lambda number: regions[number].nbytes,
    )

    def without_shortest(count: int) -> Iterator[_Region]:
        sent = set(by_length[:count])
        return _merge_small_regions(
            _Region(region.start, region.end, None) if number in sent else region
            for number, region in enumerate(regions)
        )

    def fits(count: int) -> bool:
        return _count_parts(without_shortest(count), stream_bytes, MAX_PART_BYTES) <= MAX_PARTS

    # An upload with sent parts only always fits.
    fewest = bisect_left(range(len(by_length)), True, key=fits)
    return list(without_shortest(fewest)), MAX_PART_BYTES


def _count_parts(regions: Iterable[_Region], stream_bytes: int, copy_bytes: int) -> int:
    return sum(-(-region.nbytes // (stream_bytes if region.copy is None else copy_bytes)) for region in regions)


def _regions(shard: Shard, same_store: Callable[[SourceFile], bool]) -> Iterator[_Region]:
    """Header and data as regions to send, or to copy (of at least MIN_PART_BYTES)."""
    sent = _Region(0, len(shard.header), None)
    for span in spans(shard.parts):
        copy = span.what
        if isinstance(copy, CopyRange) and span.end - span.start >= MIN_PART_BYTES and same_store(copy.file):
            if sent.nbytes:
                yield sent
            yield _Region(span.start, span.end, copy)
            sent = _Region(span.end, span.end, None)
        else:
            sent = _Region(sent.start, span.end, None)
    if sent.nbytes:
        yield sent


def _merge_small_regions(regions: Iterable[_Region]) -> Iterator[_Region]:
    """Regions that are all large enough, except the last: a small one takes bytes from the copied range behind it."""
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
            pending = _Region(pending.start, region.end, None)  # the rest would be too small to copy
            continue
        cut = region.start + missing
        yield _Region(pending.start, cut, None)
        yield _Region(cut, region.end, _slice(region.copy, missing, region.nbytes))
        pending = None
    if pending is not None:
        yield pending


def _split(region: _Region, limit: int) -> Iterator[_Region]:
    """A region in nearly equal pieces of at most `limit` bytes."""
    count = math.ceil(region.nbytes / limit)
    for index in range(count):
        start = region.start + region.nbytes * index // count
        end = region.start + region.nbytes * (index + 1) // count
        copy = region.copy and _slice(region.copy, start - region.start, end - region.start)
        yield _Region(start, end, copy)


def _slice(copy: CopyRange, start: int, end: int) -> CopyRange:
    """Bytes [start, end) of a range."""
    return CopyRange(copy.file, copy.start + start, copy.start + end)
