"""Checksums of content that arrives in chunks, in the notation of records (`algorithm:hex`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import xxhash


def hex_digest(hasher: Any, chunks: Iterable[bytes | memoryview]) -> str:
    """The hex digest of a hasher (of hashlib or xxhash) after all chunks."""
    for chunk in chunks:
        hasher.update(chunk)
    return str(hasher.hexdigest())


def xxh3_checksum(chunks: Iterable[bytes | memoryview]) -> str:
    """XXH3-128 of the content, as `xxh3-128:hex` (`xxhsum -H2 FILE` prints the same digits)."""
    return f"xxh3-128:{hex_digest(xxhash.xxh3_128(), chunks)}"
