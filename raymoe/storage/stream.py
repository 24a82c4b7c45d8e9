"""A shard as a stream of bytes: header, copied ranges, transformed blocks, computed rows, in file order.

Parts whose source ranges touch are read as one range. Memory: two buffers of `CHUNK_BYTES`, or one transformed block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from raymoe.planning.types import Copy, Part, Router, Shard, Transform
from raymoe.sources.types import SourceFile, TensorEntry
from raymoe.storage.reader import SourceReader
from raymoe.storage.transform import transformed_blocks

__all__ = ["CHUNK_BYTES", "RouterBytes", "different_tensors", "part_chunks", "shard_chunks"]

CHUNK_BYTES = 8 << 20

RouterBytes = Callable[[Part, Router], bytes]


@dataclass(frozen=True, slots=True)
class _Range:
    file: SourceFile
    start: int
    end: int


def shard_chunks(shard: Shard, reader: SourceReader, router: RouterBytes | None = None) -> Iterator[memoryview]:
    """All bytes of a shard file in order. A chunk is valid until the next one is asked for."""
    yield memoryview(shard.header)
    yield from part_chunks(shard.parts, reader, router)


def part_chunks(
    parts: tuple[Part, ...], reader: SourceReader, router: RouterBytes | None = None
) -> Iterator[memoryview]:
    """The bytes of consecutive parts. `router` gives the bytes of computed rows, where there are any."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for step in _steps(parts):
        if isinstance(step, _Range):
            for start in range(step.start, step.end, CHUNK_BYTES):
                chunk = buffer[: min(CHUNK_BYTES, step.end - start)]
                reader.read_into(step.file, start, chunk)
                yield chunk
        elif isinstance(step.what, Transform):
            yield from transformed_blocks(reader, step, step.what)
        elif isinstance(step.what, Router):
            assert router is not None, "router rows asked for where none were computed"
            yield memoryview(router(step, step.what))
        else:
            yield from _zeros(step.nbytes)


def different_tensors(
    parts: Iterable[Part],
    written: Mapping[str, TensorEntry],
    reader: SourceReader,
    router: RouterBytes | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Names of the parts whose bytes, as `written` holds them, are not what the plan says; all of them are read."""
    different = []
    for part in parts:
        entry = written.get(part.name)
        if entry is None or (entry.dtype, entry.shape) != (part.dtype, part.shape):
            different.append(part.name)
            continue
        offset, same = entry.start, True
        for chunk in part_chunks((part,), reader, router):
            found = bytearray(len(chunk))
            reader.read_into(entry.file, offset, memoryview(found))
            same = same and found == chunk
            offset += len(chunk)
            if progress is not None:
                progress(len(chunk))
        if not same:
            different.append(part.name)
    return different


def _steps(parts: tuple[Part, ...]) -> Iterator[_Range | Part]:
    """Copies joined to the longest ranges, everything else as it is."""
    pending: _Range | None = None
    for part in parts:
        if isinstance(part.what, Copy):
            source = part.what.source
            if pending and pending.file == source.file and pending.end == source.start:
                pending = _Range(pending.file, pending.start, source.end)
                continue
            if pending:
                yield pending
            pending = _Range(source.file, source.start, source.end)
            continue
        if pending:
            yield pending
            pending = None
        yield part
    if pending:
        yield pending


def _zeros(count: int) -> Iterator[memoryview]:
    block = memoryview(bytes(min(count, CHUNK_BYTES)))
    for start in range(0, count, CHUNK_BYTES):
        yield block[: min(CHUNK_BYTES, count - start)]
