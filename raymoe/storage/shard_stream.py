"""A shard as a stream of bytes: header, copied ranges, transformed and combined blocks, computed rows, in file order.

Any range of a shard can be requested separately, so that several workers can each send a part of one file. Parts with
adjacent source ranges are read as one range. Memory: a few chunks of `CHUNK_BYTES`, or one transformed block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from raymoe.planning.multipart import CopyRange, Span, spans
from raymoe.planning.plan import Columns, Combine, Constant, Copy, Part, Router, Shard, Transform, Transposed
from raymoe.sources.facts import TensorEntry
from raymoe.storage.combine import combined_bytes
from raymoe.storage.source_reader import CHUNK_BYTES, SourceReader
from raymoe.storage.transform import NUMPY_DTYPES, row_blocks, transformed_bytes
from raymoe.storage.value_checks import number_bytes, scan_non_finite

_TRANSPOSED_BYTES = 4 << 20  # of a block of rows

RouterBytes = Callable[[Part, Router], bytes]


def shard_chunks(shard: Shard, reader: SourceReader, router: RouterBytes | None = None) -> Iterator[memoryview]:
    """All bytes of a shard file in order. A chunk is valid until the next one is requested."""
    return shard_range(shard, 0, shard.nbytes, reader, router)


def shard_range(
    shard: Shard, start: int, end: int, reader: SourceReader, router: RouterBytes | None = None
) -> Iterator[memoryview]:
    """Bytes [start, end) of a shard file, in order."""
    if start < len(shard.header):
        yield memoryview(shard.header)[start : min(end, len(shard.header))]
    yield from _range_chunks(shard.parts, start, end, reader, router)


def part_chunks(
    parts: tuple[Part, ...], reader: SourceReader, router: RouterBytes | None = None
) -> Iterator[memoryview]:
    """The bytes of consecutive parts. `router` gives the bytes of computed rows, if there are any."""
    return _range_chunks(parts, parts[0].start, parts[-1].end, reader, router)


def _range_chunks(
    parts: tuple[Part, ...], start: int, end: int, reader: SourceReader, router: RouterBytes | None
) -> Iterator[memoryview]:
    for span in spans(parts) if not reader.findings.strict else _single_spans(parts):
        low, high = max(span.start, start), min(span.end, end)
        if low < high:
            yield from _span_bytes(span, low - span.start, high - span.start, reader, router)


def _span_bytes(
    span: Span, start: int, end: int, reader: SourceReader, router: RouterBytes | None
) -> Iterator[memoryview]:
    """Bytes [start, end) of a span."""
    if isinstance(span.what, CopyRange):
        yield from reader.chunks(span.what.file, span.what.start + start, span.what.start + end)
        return
    part = span.what
    if isinstance(part.what, Copy):
        yield from _copy_chunks(part, part.what.source, start, end, reader)
    elif isinstance(part.what, Transform):
        yield from transformed_bytes(reader, part, part.what, start, end)
    elif isinstance(part.what, Combine):
        yield from combined_bytes(reader, part, part.what, start, end)
    elif isinstance(part.what, Columns):
        yield from _column_chunks(part, part.what, start, end, reader)
    elif isinstance(part.what, Transposed):
        yield from _transposed_chunks(part, part.what, start, end, reader)
    elif isinstance(part.what, Router):
        assert router is not None, "router rows asked for where none were computed"
        yield memoryview(router(part, part.what))[start:end]
    elif isinstance(part.what, Constant):
        yield from _constant(part.dtype, part.what.value, start, end)


def _single_spans(parts: Iterable[Part]) -> Iterator[Span]:
    """The parts in order, each as its own span."""
    return (Span(start=part.start, end=part.end, what=part) for part in parts)


def _copy_chunks(part: Part, source: TensorEntry, start: int, end: int, reader: SourceReader) -> Iterator[memoryview]:
    """Bytes [start, end) of a copied tensor; all values are checked for NaN and infinity."""
    at = source.start + start
    before = bytearray(start % number_bytes(part.dtype) if number_bytes(part.dtype) else 0)
    if before:
        reader.read_into(source.file, at - len(before), memoryview(before))
    yield from scan_non_finite(
        reader.chunks(source.file, at, source.start + end),
        part.dtype,
        lambda: reader.findings.note(part.tensor.name, f"NaN or infinity in {source.name} of {source.file.location}"),
        before=bytes(before),
    )


def _column_chunks(part: Part, what: Columns, start: int, end: int, reader: SourceReader) -> Iterator[memoryview]:
    """Bytes [start, end) of matrices side by side, one block of rows after another.

    The blocks are the same as for a transformed matrix, so that no block is computed twice.
    """
    row_bytes = part.nbytes // part.shape[0]
    for rows in row_blocks(what.matrices[0].shape):
        first, last = rows.start * row_bytes, rows.stop * row_bytes
        if first >= end or last <= start:
            continue
        block: npt.NDArray[np.uint8] = np.empty((rows.stop - rows.start, row_bytes), np.uint8)
        at = 0
        for matrix in what.matrices:
            width = matrix.nbytes // matrix.shape[0]
            (span,) = _single_spans((matrix,)) if reader.findings.strict else spans((matrix,))
            filled, done = np.empty((rows.stop - rows.start) * width, np.uint8), 0
            for chunk in _span_bytes(span, rows.start * width, rows.stop * width, reader, None):
                filled[done : done + len(chunk)] = chunk
                done += len(chunk)
            block[:, at : at + width] = filled.reshape(-1, width)
            at += width
        yield block.reshape(-1).data[max(0, start - first) : min(last, end) - first]


def _transposed_chunks(
    part: Part, what: Transposed, start: int, end: int, reader: SourceReader
) -> Iterator[memoryview]:
    """Bytes [start, end) of transposed matrices, one block of rows after another.

    Every row needs all rows of the matrices, so these are in memory meanwhile.
    """
    with _stacked_matrices.lock:
        rows = _stacked_matrices.load(part, what, reader)
        if end == part.nbytes:
            _stacked_matrices.forget()
    row_bytes = part.nbytes // part.shape[0]
    for block in row_blocks(part.shape, _TRANSPOSED_BYTES // rows.itemsize):
        first, last = block.start * row_bytes, block.stop * row_bytes
        if first < end and last > start:
            content = np.ascontiguousarray(rows[:, block].T).reshape(-1).view(np.uint8).data
            yield content[max(0, start - first) : min(last, end) - first]


class _StackedMatrices:
    """The matrices of the part that was transposed last, one below the other, until its end is written: an upload asks
    for a few MiB at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._key: tuple[object, ...] = ()
        self._rows: npt.NDArray[Any] = np.empty((0, 0))

    def load(self, part: Part, what: Transposed, reader: SourceReader) -> npt.NDArray[Any]:
        """The matrices of a part, (rows of all, columns)."""
        stamps = tuple(file.stamp for file in part.files_read)
        if self._key != (id(reader), part, stamps):
            content, filled = np.empty(part.nbytes, np.uint8), 0
            for matrix in what.matrices:
                (span,) = _single_spans((matrix,)) if reader.findings.strict else spans((matrix,))
                for chunk in _span_bytes(span, 0, matrix.nbytes, reader, None):
                    content[filled : filled + len(chunk)] = chunk
                    filled += len(chunk)
            self._rows = content.view(NUMPY_DTYPES[part.dtype]).reshape(-1, part.shape[0])
            self._key = (id(reader), part, stamps)
        return self._rows

    def forget(self) -> None:
        self._key, self._rows = (), np.empty((0, 0))


_stacked_matrices = _StackedMatrices()


def different_tensors(
    parts: Iterable[Part],
    written: Mapping[str, TensorEntry],
    reader: SourceReader,
    router: RouterBytes | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Names of the tensors with other bytes in `written` than the plan gives; all of them are read."""
    different = []
    for tensor, group in groupby(parts, key=lambda part: part.tensor):
        of_tensor = tuple(group)
        entry = written.get(tensor.name)
        if entry is None or (entry.dtype, entry.shape) != (of_tensor[0].dtype, tensor.shape):
            different.append(tensor.name)
            continue
        offset, same = entry.start, True
        for chunk in part_chunks(of_tensor, reader, router):
            found = bytearray(len(chunk))
            reader.read_into(entry.file, offset, memoryview(found))
            same = same and found == chunk
            offset += len(chunk)
            if progress is not None:
                progress(len(chunk))
        if not same:
            different.append(tensor.name)
    return different


def _constant(dtype: str, value: float, start: int, end: int) -> Iterator[memoryview]:
    """Bytes [start, end) of a tensor with the same value everywhere."""
    element = np.array([value], NUMPY_DTYPES[dtype]).tobytes() if value else b"\0"
    size = len(element)
    block = memoryview(element * (min(end - start, CHUNK_BYTES) // size + 2))
    while start < end:
        first, count = start % size, min(CHUNK_BYTES, end - start)
        yield block[first : first + count]
        start += count


def read_stream(chunks: Iterable[memoryview], size: int) -> bytearray:
    """A bounded stream in one buffer of `size` bytes."""
    buffer, filled = bytearray(size), 0
    for chunk in chunks:
        buffer[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    assert filled == size, f"a stream of {filled} bytes, expected {size}"
    return buffer
