"""How a shard becomes an object: the parts of a multipart upload, chosen so that most bytes never pass a worker.

A part is either copied by the store itself from a source object (the bytes are unchanged and source and output are in
one store), or sent by a worker. The store's rules: all parts but the last have at least 5 MiB, a part at most 5 GiB, an
object at most 10,000 parts. So what lies between two copied ranges and is smaller than 5 MiB takes bytes of the range
after it along, and the header at a shard's beginning takes the first bytes of the data.

A shard of hundreds of gigabytes could have more such parts than an object may: then longer parts are copied, and short
ranges are sent.

Limits: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from raymoe.object_store.s3_limits import MAX_PART_BYTES, MAX_PARTS, MIN_PART_BYTES
from raymoe.planning.plan import Copy, Part, Shard
from raymoe.sources.facts import SourceFile

COPY_PART_BYTES = 1 << 30  # usual copies: they run side by side and are repeated sooner than the largest possible
STREAM_PART_BYTES = 16 << 20
# Raise this when the code below cuts a shard into other parts than before. A run goes on with an upload that another
# version of raymoe may have begun, and must not mix two layouts in one object.
_LAYOUT_FORMAT = 1


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
        """Whether it has bytes of that part of the shard."""
        return self.start < part.end and part.start < self.end


@dataclass(frozen=True, slots=True)
class _Region:
    start: int
    end: int
    copy: CopyRange | None

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def spans(parts: Iterable[Part]) -> Iterator[Span]:
    """The parts in order; copies whose source ranges touch are one span."""
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
    """Both as one span, if they are copies of ranges that touch."""
    a, b = left.what, right.what
    if left.end != right.start:  # what lies between them is not asked for
        return None
    if isinstance(a, CopyRange) and isinstance(b, CopyRange) and a.file == b.file and a.end == b.start:
        return Span(start=left.start, end=right.end, what=CopyRange(a.file, a.start, b.end))
    return None


def upload_parts(shard: Shard, same_store: Callable[[SourceFile], bool]) -> tuple[UploadPart, ...]:
    """The parts of a shard's upload. `same_store` says which sources the output's store can copy from."""
    # The usual piece is small enough for memory; a giant shard gets larger ones, so as to stay within MAX_PARTS.
    stream_bytes = max(STREAM_PART_BYTES, math.ceil(shard.nbytes / (MAX_PARTS // 2)))
    scale = 1
    while len(pieces := _pieces(shard, same_store, stream_bytes, scale)) > MAX_PARTS:
        scale *= 2
    return tuple(
        UploadPart(number=number, start=piece.start, end=piece.end, copy=piece.copy)
        for number, piece in enumerate(pieces, start=1)
    )


def upload_layout() -> tuple[int, ...]:
    """All that decides, besides the shard, into which parts it is cut."""
    return _LAYOUT_FORMAT, MIN_PART_BYTES, MAX_PART_BYTES, COPY_PART_BYTES, STREAM_PART_BYTES, MAX_PARTS


def server_side_bytes(parts: Sequence[UploadPart]) -> int:
    """Bytes that never pass a worker."""
    return sum(part.nbytes for part in parts if part.copy is not None)


def _pieces(shard: Shard, same_store: Callable[[SourceFile], bool], stream_bytes: int, scale: int) -> list[_Region]:
    """The parts, where no range of less than `scale` times a least part is copied."""
    copy_bytes = min(MAX_PART_BYTES, scale * COPY_PART_BYTES)
    regions = _merge_small_regions(_regions(shard, same_store, scale * MIN_PART_BYTES))
    return [
        piece for region in regions for piece in _split(region, stream_bytes if region.copy is None else copy_bytes)
    ]


def _regions(shard: Shard, same_store: Callable[[SourceFile], bool], least_copy: int) -> Iterator[_Region]:
    """Header and data as alternating regions: to be sent, or to be copied (of at least `least_copy` bytes)."""
    sent = _Region(0, len(shard.header), None)
    for span in spans(shard.parts):
        copy = span.what
        if isinstance(copy, CopyRange) and span.end - span.start >= least_copy and same_store(copy.file):
            if sent.nbytes:
                yield sent
            yield _Region(span.start, span.end, copy)
            sent = _Region(span.end, span.end, None)
        else:
            sent = _Region(sent.start, span.end, None)
    if sent.nbytes:
        yield sent


def _merge_small_regions(regions: Iterable[_Region]) -> Iterator[_Region]:
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


def _split(region: _Region, limit: int) -> Iterator[_Region]:
    """A region in nearly equal pieces of at most `limit` bytes."""
    count = math.ceil(region.nbytes / limit)
    for index in range(count):
        start = region.start + region.nbytes * index // count
        end = region.start + region.nbytes * (index + 1) // count
        copy = region.copy
        if copy is not None:
            shift = copy.start - region.start
            copy = replace(copy, start=start + shift, end=end + shift)
        yield _Region(start, end, copy)
