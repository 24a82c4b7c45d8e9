"""What planning has read of objects, kept for the run that resumes the merge: one object in place of all headers.

    first run    headers, JSON files --> `add` --> `content` --> OUT/.raymoe/reads/RUN
    resumed run  OUT/.raymoe/reads/RUN --> `find` --> the same bytes, if a listing shows the object with the same ETag

An entry is found only for the location, size and ETag that it was read from. So after a change of a source its headers
are read again. Kept bytes are parsed and checked like those that a store sends. A content that is damaged or of another
format counts as empty. Local files and the files of the Hub are never kept.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable

import xxhash

from raymoe.sources.facts import SourceFile
from raymoe.sources.safetensors_header import header_bytes_in

_FORMAT = b"raymoe reads 1\n"
_DIGEST_BYTES, _LENGTH_BYTES = 16, 8
_MAX_READ_BYTES = 4 << 20  # of one entry
_MAX_TOTAL_BYTES = 64 << 20  # of all entries, compressed
_LEVEL = 1  # headers become 10 times smaller; more takes longer than it saves

# location, size and ETag of an object, and the range that was asked for
_Key = tuple[str, int, str, int, int]


class KeptReads:
    """Thread-safe. `load` gives the content that an earlier run has kept; it is called when the first object is read,
    so that a merge of local models sends no request for it."""

    def __init__(self, load: Callable[[], bytes] = bytes) -> None:
        self._load: Callable[[], bytes] | None = load
        self._earlier: dict[_Key, bytes] = {}  # compressed
        self._entries: dict[_Key, bytes] = {}  # found or added
        self._total = 0
        self._lock = threading.Lock()

    def find(self, file: SourceFile, start: int, end: int) -> bytes | None:
        """The bytes that a run has read of this very object, if it has asked for the same range.

        Of a range from the start of a safetensors file, only the header is kept.
        """
        if (key := _key(file, start, end)) is None:
            return None
        with self._lock:
            if self._load is not None:
                self._earlier, self._load = _parse(self._load()), None
            packed = self._entries.get(key) or self._earlier.get(key)
        data = _unpacked(packed, end - start) if packed is not None else None
        if packed is not None and data is not None:
            self._keep(key, packed)
        return data

    def add(self, file: SourceFile, start: int, end: int, data: bytes) -> None:
        """Keep a range of an object that was read, if it is a header or a small JSON file."""
        key, kept = _key(file, start, end), _worth_keeping(file, start, data)
        if key is not None and kept is not None:
            self._keep(key, zlib.compress(kept, _LEVEL))

    def content(self) -> bytes:
        """The entries that this run has found or added; empty if there are none."""
        with self._lock:
            entries = dict(self._entries)
        if not entries:
            return b""
        listed = json.dumps([[*key, len(packed)] for key, packed in entries.items()]).encode()
        names = zlib.compress(listed, _LEVEL)
        body = b"".join((len(names).to_bytes(_LENGTH_BYTES, "little"), names, *entries.values()))
        return _FORMAT + xxhash.xxh3_128_digest(body) + body

    def _keep(self, key: _Key, packed: bytes) -> None:
        with self._lock:
            if key not in self._entries and self._total + len(packed) <= _MAX_TOTAL_BYTES:
                self._entries[key] = packed
                self._total += len(packed)


def _key(file: SourceFile, start: int, end: int) -> _Key | None:
    """None if nothing identifies the content of the file."""
    if not file.kind.is_object or file.etag is None or end - start > _MAX_READ_BYTES:
        return None
    return file.location, file.size, file.etag, start, end


def _worth_keeping(file: SourceFile, start: int, data: bytes) -> bytes | None:
    if file.name.endswith(".json"):
        return data
    return header_bytes_in(data, start) if file.name.endswith(".safetensors") else None


def _parse(content: bytes) -> dict[_Key, bytes]:
    """The entries of a content. Empty if it is damaged, or of another format."""
    digest, body = content[len(_FORMAT) :][:_DIGEST_BYTES], content[len(_FORMAT) + _DIGEST_BYTES :]
    if not content.startswith(_FORMAT) or xxhash.xxh3_128_digest(body) != digest:
        return {}
    at = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "little")
    entries = {}
    try:
        for location, size, etag, start, end, length in json.loads(zlib.decompress(body[_LENGTH_BYTES:at])):
            entries[location, size, etag, start, end] = body[at : at + length]
            at += length
    except (ValueError, TypeError, zlib.error):
        return {}
    return entries


def _unpacked(packed: bytes, most: int) -> bytes | None:
    """At most so many bytes; None if this is not compressed data, or more."""
    decompress = zlib.decompressobj()
    try:
        data = decompress.decompress(packed, most + 1)
    except zlib.error:
        return None
    return data if decompress.eof and len(data) <= most else None
