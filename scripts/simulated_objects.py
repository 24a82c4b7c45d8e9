"""The objects of the simulated store: what they are made of, without their bytes; and whether a merge lies right.

    Object --> Part, Part, ...      a range of another object | bytes that were sent | a file of sparse_models.py

Of a part that was sent only its beginning and its MD5 are kept: `audit` makes the bytes that it has to hold once more.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sparse_models import Mixture, body_bytes, source_of

BLOCK = 1 << 20
_KEPT_BYTES = 1 << 20  # of a part that was sent: shards' headers, and all of small files
_ITEM_BYTES = 2  # bfloat16


@dataclass(slots=True)
class Part:
    """`size` bytes: [at, at + size) of `source`; else `head`, and after it the pattern `number`, or bytes that were not
    kept, which are read as zeros."""

    size: int
    etag: str
    source: Object | None = None
    at: int = 0
    head: bytes = b""
    number: int | None = None

    def blocks(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes [start, end) in blocks of at most BLOCK."""
        if self.source is not None:
            yield from self.source.blocks(self.at + start, self.at + end)
            return
        if head := self.head[start:end]:
            yield head
        for low in range(max(start, len(self.head)), end, BLOCK):
            high = min(end, low + BLOCK)
            yield bytes(high - low) if self.number is None else body_bytes(self.number, low, high)


@dataclass(slots=True, eq=False)
class Object:
    name: str  # bucket/key
    etag: str
    parts: Sequence[Part]
    metadata: Mapping[str, str] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)  # of its parts, then its size

    def __post_init__(self) -> None:
        self.starts = [0]
        for part in self.parts:
            self.starts.append(self.starts[-1] + part.size)

    @property
    def size(self) -> int:
        return self.starts[-1]

    def blocks(self, start: int, end: int) -> Iterator[bytes]:
        first = bisect.bisect_right(self.starts, start) - 1
        for begin, part in zip(self.starts[first:], self.parts[first:]):
            if begin >= end:
                return
            yield from part.blocks(max(start - begin, 0), min(end - begin, part.size))

    def read(self, start: int, end: int) -> bytes:
        return b"".join(self.blocks(start, end))


@dataclass(slots=True)
class Upload:
    name: str  # bucket/key
    metadata: Mapping[str, str]
    parts: dict[int, Part] = field(default_factory=dict)


def sent_part(data: bytes, etag: str, *, keep_all: bool = False) -> Part:
    """A part of which the beginning is kept: up to the end of a shard's header, if it begins with one."""
    kept = len(data) if keep_all or len(data) <= _KEPT_BYTES else _KEPT_BYTES
    if data[8:9] == b"{":
        kept = max(kept, min(len(data), 8 + int.from_bytes(data[:8], "little")))
    return Part(size=len(data), etag=etag, head=data[:kept])


def model_objects(mixture: Mixture, bucket: str) -> Iterator[Object]:
    """The files of a mixture's models as objects: bucket/0/config.json, ..."""
    number = 0
    for model in range(mixture.experts):
        for file in mixture.files:
            name = f"{bucket}/{model}/{file.name}"
            etag = md5(name.encode())
            yield Object(name, etag, [Part(size=file.size, etag=etag, head=file.head, number=number)])
            number += 1


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


# --- audit


@dataclass(frozen=True, slots=True)
class _Range:
    """Bytes [start, end) of a shard: those of `source` from `at` on; None: a router, whose bytes are not checked."""

    start: int
    end: int
    source: Object | None
    at: int


class Audit:
    """Whether each tensor of a merge lies over the range of the source that it is a copy of."""

    def __init__(self, mixture: Mixture, objects: Mapping[str, Object], bucket: str) -> None:
        self.problems: list[str] = []
        self.counts = {"shards": 0, "tensors": 0, "bytes_copied": 0, "bytes_sent": 0}
        self._mixture, self._objects, self._bucket = mixture, objects, bucket
        self._missing = dict(mixture.output_shapes)

    def check(self, output: str) -> None:
        """Look at the objects below `output` (bucket/prefix); what is wrong is in `problems`."""
        for name, shard in sorted(self._objects.items()):
            if name.startswith(f"{output}/") and name.endswith(".safetensors"):
                self._check_shard(shard)
        self.problems += [f"{name} is in no shard" for name in list(self._missing)[:20]]
        for name in ("model.safetensors.index.json", "config.json", "raymoe.json"):
            if f"{output}/{name}" not in self._objects:
                self.problems.append(f"{output}/{name} is not there")

    @functools.cached_property
    def _places(self) -> Mapping[str, tuple[str, int]]:
        """Tensors of each source model: their file, and where they begin in it."""
        places: dict[str, tuple[str, int]] = {}
        for file in self._mixture.files:
            if file.name.endswith(".safetensors"):
                header = json.loads(file.head[8:])
                data = len(file.head)
                places |= {name: (file.name, data + entry["data_offsets"][0]) for name, entry in header.items()}
        return places

    def _check_shard(self, shard: Object) -> None:
        length = int.from_bytes(shard.read(0, 8), "little")
        head = shard.read(0, 8 + length)
        ranges = sorted(self._ranges(shard, json.loads(head[8:]), len(head)), key=lambda each: each.start)
        self.counts["shards"] += 1
        end = max((each.end for each in ranges), default=len(head))
        if end != shard.size:
            self.problems.append(f"{shard.name}: {shard.size} bytes, and its header tells of {end}")
        for start, part in zip(shard.starts, shard.parts):
            if part.source is not None:
                self._check_copied(shard, part, start, ranges)
            else:
                self._check_sent(shard, part, start, ranges, head)

    def _ranges(self, shard: Object, header: dict[str, dict[str, list[int]]], data: int) -> Iterator[_Range]:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = (data + offset for offset in entry["data_offsets"])
            dims = self._missing.pop(name, None)
            if dims is None or end - start != math.prod(dims) * _ITEM_BYTES or tuple(entry["shape"]) != dims:
                self.problems.append(f"{shard.name}: {name} is there twice, of no model, or of another shape")
                continue
            self.counts["tensors"] += 1
            yield self._range(name, start, end)

    def _range(self, name: str, start: int, end: int) -> _Range:
        source = source_of(name)
        if source is None:
            return _Range(start, end, None, 0)
        model, tensor = source
        file, at = self._places[tensor]
        return _Range(start, end, self._objects[f"{self._bucket}/{model}/{file}"], at)

    def _check_copied(self, shard: Object, part: Part, start: int, ranges: Sequence[_Range]) -> None:
        covered = 0
        for low, high, each in _overlaps(ranges, start, start + part.size):
            covered += high - low
            if each.source is not part.source or each.at + low - each.start != part.at + low - start:
                self.problems.append(f"{shard.name}: bytes {low} to {high} are copied from another place")
        if covered != part.size:
            self.problems.append(f"{shard.name}: {part.size - covered} bytes from {start} on are copied for no tensor")
        self.counts["bytes_copied"] += part.size

    def _check_sent(self, shard: Object, part: Part, start: int, ranges: Sequence[_Range], head: bytes) -> None:
        """Make the bytes once more. Those of routers are random numbers that are not known here."""
        self.counts["bytes_sent"] += part.size
        digest, at = hashlib.md5(head[start : start + part.size], usedforsecurity=False), max(start, len(head))
        for low, high, each in _overlaps(ranges, start, start + part.size):
            if each.source is None:
                return
            digest.update(bytes(low - at))
            at = high
            for block in each.source.blocks(each.at + low - each.start, each.at + high - each.start):
                digest.update(block)
        digest.update(bytes(start + part.size - max(at, start)) if at < start + part.size else b"")
        if digest.hexdigest() != part.etag:
            self.problems.append(f"{shard.name}: the {part.size} bytes that were sent from {start} on are others")


def _overlaps(ranges: Sequence[_Range], start: int, end: int) -> Iterator[tuple[int, int, _Range]]:
    """What the sorted ranges have in common with [start, end)."""
    first = max(bisect.bisect_right(ranges, start, key=lambda each: each.start) - 1, 0)
    for each in ranges[first:]:
        if each.start >= end:
            return
        if each.end > start:
            yield max(start, each.start), min(end, each.end), each
