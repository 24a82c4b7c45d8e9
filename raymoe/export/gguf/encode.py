"""Encodes a tensor for the file: its bytes are copied, or converted block by block to another order or type.

A block is whole rows of about `_BLOCK_ELEMENTS`, whole units if rows are reordered (`tensor_ops.TensorOp`). Threads
convert a few blocks ahead, so that only these are in memory, whatever the size of the model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import ml_dtypes
import numpy as np
import numpy.typing as npt

from raymoe.errors import Problem, ProblemReport
from raymoe.export.gguf.mixture_checks import ReadChunks
from raymoe.export.gguf.options import TensorType
from raymoe.export.gguf.tensor_layout import GgufTensor
from raymoe.export.gguf.tensor_ops import IDENTITY
from raymoe.sources.facts import TensorEntry
from raymoe.storage.source_reader import run_ahead
from raymoe.storage.transform import NUMPY_DTYPES

_BLOCK_ELEMENTS = 1 << 20  # 4 MiB of float32
_THREADS = min(4, os.cpu_count() or 1)

Float32 = npt.NDArray[np.float32]


class TensorEncoder:
    """Encodes tensors one after the other. A context manager, since it has threads."""

    def __init__(self, chunks: ReadChunks) -> None:
        self._chunks = chunks
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="encode")

    def __enter__(self) -> TensorEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def bytes_of(self, tensor: GgufTensor) -> Iterator[memoryview]:
        """All bytes in order; a piece is valid until the next one. Raises ProblemReport for values that don't fit."""
        if not tensor.sources:
            yield memoryview(np.resize(np.array(tensor.values, dtype=np.float32), tensor.shape).tobytes())
        for entry in tensor.sources:
            if entry.dtype.lower() == tensor.type.name and tensor.op == IDENTITY:
                yield from self._chunks(entry)
            else:
                yield from self._convert(tensor, entry)

    def _convert(self, tensor: GgufTensor, entry: TensorEntry) -> Iterator[memoryview]:
        blocks = _row_blocks(entry, tensor.op.unit, self._chunks)
        return run_ahead(self._pool, (partial(_encode, tensor, entry, block) for block in blocks), _THREADS + 1)


def _row_blocks(entry: TensorEntry, unit: int, chunks: ReadChunks) -> Iterator[bytearray]:
    """The tensor's bytes in blocks of whole units of rows, each in its own buffer."""
    width = math.prod(entry.shape[1:])
    rows = max(1, _BLOCK_ELEMENTS // width // unit) * unit
    size = rows * width * np.dtype(NUMPY_DTYPES[entry.dtype]).itemsize
    left = entry.nbytes
    block, filled = bytearray(min(size, left)), 0
    for chunk in chunks(entry):
        while len(chunk):
            count = min(len(chunk), len(block) - filled)
            block[filled : filled + count] = chunk[:count]
            chunk, filled = chunk[count:], filled + count
            if filled == len(block):
                yield block
                left -= filled
                block, filled = bytearray(min(size, left)), 0
    assert not left, f"{entry.name}: {left} bytes too few"


def _encode(tensor: GgufTensor, entry: TensorEntry, block: bytearray) -> memoryview:
    source: npt.NDArray[np.generic] = np.frombuffer(block, dtype=NUMPY_DTYPES[entry.dtype])
    rows = source.astype(np.float32, copy=False).reshape(-1, math.prod(entry.shape[1:]))
    encoded = _cast(tensor.op(rows), tensor.type)
    if encoded is None:
        if np.isfinite(rows).all():
            what, remedy = f"holds values beyond 65504, which {tensor.type.name} can't", "write --type bf16"
        else:
            what = "holds values that are not finite numbers"
            remedy = "a source model's weights are damaged: get them again"
        raise ProblemReport([Problem(where=entry.name, what=what, remedy=remedy)])
    return np.ascontiguousarray(encoded).reshape(-1).view(np.uint8).data


def _cast(rows: Float32, kind: TensorType) -> npt.NDArray[np.generic] | None:
    """`rows` as `kind`; None if a value does not fit into the type."""
    if kind.name == "f32":
        return rows
    if kind.name == "bf16":
        return rows.astype(ml_dtypes.bfloat16)
    if kind.name == "f16":
        with np.errstate(over="ignore"):
            halves = rows.astype(np.float16)
        return halves if np.isfinite(halves).all() else None
    if not np.isfinite(rows).all():
        return None
    import gguf

    quantized: npt.NDArray[np.generic] = gguf.quantize(rows, gguf.GGMLQuantizationType(kind.number))
    return quantized
