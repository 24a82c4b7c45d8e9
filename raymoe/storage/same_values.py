"""Whether stored tensors have one value everywhere: of a large one, samples are read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from raymoe.sources.facts import TensorEntry
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transform import NUMPY_DTYPES

_WHOLE_BYTES = 8 << 20
_SAMPLE_BYTES = 1 << 20


def has_value(reader: SourceReader, entry: TensorEntry, value: float) -> bool:
    """Whether a tensor has `value`, rounded to its dtype, in all numbers that are read: of more than 8 MiB, the first,
    middle and last MiB. Raises CheckpointError."""
    kind = np.dtype(NUMPY_DTYPES[entry.dtype])
    expected = np.full(1, value).astype(kind).tobytes()
    for start, end in _ranges(entry, kind.itemsize):
        for content in reader.chunks(entry.file, start, end):
            numbers = np.frombuffer(content, np.uint8).reshape(-1, kind.itemsize)
            if not (numbers == np.frombuffer(expected, np.uint8)).all():
                return False
    return True


def _ranges(entry: TensorEntry, width: int) -> Iterator[tuple[int, int]]:
    if entry.nbytes <= _WHOLE_BYTES:
        if entry.nbytes:
            yield entry.start, entry.end
        return
    for start in (0, entry.nbytes // 2 // width * width, entry.nbytes - _SAMPLE_BYTES):
        yield entry.start + start, entry.start + start + _SAMPLE_BYTES
