"""Computes tensors that are not copied unchanged: LoRA or DoRA, noise, scale, permuted rows, casts.

All is computed in float32, in bounded pieces.

A tensor is cut along its rows into blocks of about `BLOCK_ELEMENTS`, always the same blocks for the same shape. So
every random number and every rounding depends on the plan alone, not on the actor that computes it or on the number of
threads. If rows are permuted within heads, a block consists of whole heads. Blocks with noise or a LoRA delta take
time, so threads compute a few of them ahead. Casting and scaling are elementwise, so any blocks give the same bytes:
theirs are small enough to stay in the processor's cache.

Channels that are drawn anew (`Reinit`) get normal random numbers with the mean and the standard deviation that the
matrix has in these channels, as in Drop-Upcycling (Nakamura et al. 2025, https://arxiv.org/abs/2502.19261, section 3).
These two are measured first, in float64, in the same blocks. Which channels they are depends on the seed and the expert
alone, so all matrices of an expert have the same.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from raymoe.errors import MergeFailed
from raymoe.planning.plan import Part, Reinit, Transform
from raymoe.sources.facts import LoraPair, TensorEntry
from raymoe.storage.source_reader import SourceReader, run_ahead
from raymoe.storage.value_checks import has_non_finite

NUMPY_DTYPES: dict[str, npt.DTypeLike] = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}
BLOCK_ELEMENTS = 1 << 22  # 16 MiB of float32
_CAST_ELEMENTS = 1 << 17
# How many blocks are computed ahead at once; report/memory_estimate.py counts them.
THREADS = min(4, os.cpu_count() or 1)

Float32 = npt.NDArray[np.float32]
Rows = slice | npt.NDArray[np.int64]
"""Rows of a tensor: a block, or some of them in ascending order."""
_measured: dict[Any, tuple[float, float]] = {}
_locks: dict[Any, threading.Lock] = {}
_guard = threading.Lock()
_Rows = TypeVar("_Rows", bound=Any)
_Result = TypeVar("_Result")


def load_array(reader: SourceReader, entry: TensorEntry) -> npt.NDArray[np.generic]:
    """The tensor as an array of its own dtype and shape, backed by the bytes of `reader`."""
    flat = np.frombuffer(reader.view(entry), dtype=NUMPY_DTYPES[entry.dtype])
    return flat.reshape(entry.shape)


def with_lora(reader: SourceReader, block: Float32, lora: LoraPair, rows: Rows) -> Float32:
    """`block` (rows of a weight, in float32) plus those rows of scaling * B @ A; with DoRA, scaled to their magnitudes.

    Products and lengths are summed in float64: the order of a sum depends on the number of threads and on the
    processor, which in float32 would change the last bit.
    """
    a = load_array(reader, lora.a).astype(np.float64)
    b = load_array(reader, lora.b)[rows].astype(np.float64)
    merged: Float32 = block + np.float32(lora.scaling) * (b @ a).astype(np.float32)
    if lora.magnitude is not None:
        magnitude = load_array(reader, lora.magnitude)[rows].astype(np.float64)
        lengths = np.linalg.norm(merged.astype(np.float64), axis=1)
        merged *= dora_factors(magnitude, lengths).astype(np.float32)[:, None]
    return merged


def dora_factors(magnitude: npt.NDArray[np.float64], lengths: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The factors by which DoRA multiplies rows of these lengths. A row of length 0 has no direction: its factor is
    1."""
    return np.divide(magnitude, lengths, out=np.ones_like(lengths), where=lengths != 0)


def transformed_bytes(reader: SourceReader, part: Part, what: Transform, start: int, end: int) -> Iterator[memoryview]:
    """Bytes [start, end) of a transformed part, block by block, in order."""
    shape = what.source.shape
    is_cast = what.lora is None and what.noise_scale is None and what.reinit is None
    blocks = []
    together = what.heads.head_dim if what.heads is not None else 1
    for number, rows in enumerate(row_blocks(shape, _CAST_ELEMENTS if is_cast else BLOCK_ELEMENTS, together)):
        row_bytes = part.nbytes // shape[0]
        first, last = rows.start * row_bytes, rows.stop * row_bytes
        if start < last and first < end:
            blocks.append(((reader, part, what, number, rows), slice(max(0, start - first), min(last, end) - first)))
    calls = [partial(_transformed_block, *block) for block, _ in blocks]
    computed = (call() for call in calls) if is_cast else compute_ahead(calls)
    for content, (_, piece) in zip(computed, blocks, strict=True):
        yield content[piece]


def compute_ahead(calls: Sequence[Callable[[], _Result]]) -> Iterator[_Result]:
    """The results of calls in their order. This process's threads compute a few ahead; a single call runs directly."""
    return run_ahead(_threads(), calls, THREADS) if len(calls) > 1 else (call() for call in calls)


@cache
def _threads() -> ThreadPoolExecutor:
    """The process's threads for blocks. All its shards share them, so that memory does not grow with their number."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="transform")


@np.errstate(over="ignore", invalid="ignore")  # the result is checked
def _transformed_block(reader: SourceReader, part: Part, what: Transform, number: int, rows: slice) -> memoryview:
    block = read_rows(reader, what.source, rows)
    if what.lora is not None:
        block = with_lora(reader, block, what.lora, rows)
        _note_zero_rows(reader, part, what.lora, block, rows)
    block = _cut_columns(block, what)
    if what.reinit is not None:
        block = _redraw(reader, part, what, what.reinit, number, rows, block)
    if what.noise_scale is not None:
        noise = _generator(what.seed, part.name, number).standard_normal(block.shape, dtype=np.float32)
        block += np.float32(what.noise_scale) * noise
    if what.scale is not None:
        block *= np.float32(what.scale)
    if what.heads is not None:
        block = permute_heads(block, what.heads.head_dim, what.heads.order)
    return cast_block(reader, part, block, lambda: _non_finite_origin(reader, what, rows))


def _cut_columns(block: Float32, what: Transform) -> Float32:
    return block if what.columns is None else block[:, slice(*what.columns)]


def _redraw(
    reader: SourceReader, part: Part, what: Transform, reinit: Reinit, number: int, rows: slice, block: Float32
) -> Float32:
    """A block with the numbers of the chosen channels drawn anew."""
    chosen = chosen_channels(what.seed, reinit, part.shape[1] if reinit.of_columns else part.shape[0])
    if not reinit.of_columns:
        chosen = chosen[(chosen >= rows.start) & (chosen < rows.stop)] - rows.start
    mean, deviation = _moments(reader, what, part.shape)
    place = (slice(None), chosen) if reinit.of_columns else (chosen, slice(None))
    drawn = _generator(what.seed, f"{part.name}/reinit", number).standard_normal(block[place].shape, dtype=np.float32)
    block = block.copy()  # it may be a view of the bytes that were read
    block[place] = np.float32(mean) + np.float32(deviation) * drawn
    return block


@lru_cache(maxsize=64)
def chosen_channels(seed: int, reinit: Reinit, width: int) -> npt.NDArray[np.int64]:
    """The channels to draw anew, in ascending order: `share` of `width`, rounded down."""
    count = int(round(reinit.share * width, 6))
    return np.sort(_generator(seed, f"{reinit.channels}/channels", 0).permutation(width)[:count])


def _moments(reader: SourceReader, what: Transform, shape: tuple[int, ...]) -> tuple[float, float]:
    """The mean and the standard deviation of a matrix in its channels that are drawn anew. They are measured once per
    process, and cached."""
    # A local file that was written again is another file, although it compares equal.
    entries = (what.source, *(what.lora.entries.values() if what.lora is not None else ()))
    key = what, tuple(entry.file.stamp for entry in entries)
    with _guard:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        if key not in _measured:
            _measured[key] = _measure(reader, what, shape)
        return _measured[key]


@np.errstate(over="ignore", invalid="ignore")
def _measure(reader: SourceReader, what: Transform, shape: tuple[int, ...]) -> tuple[float, float]:
    assert what.reinit is not None
    of_columns = what.reinit.of_columns
    chosen = chosen_channels(what.seed, what.reinit, shape[1] if of_columns else shape[0])
    count, sums, squares = 0, [], []
    for rows in row_blocks(what.source.shape):
        block = read_rows(reader, what.source, rows)
        if what.lora is not None:
            block = with_lora(reader, block, what.lora, rows)
        block = _cut_columns(block, what)
        place = chosen if of_columns else chosen[(chosen >= rows.start) & (chosen < rows.stop)] - rows.start
        values = (block[:, place] if of_columns else block[place]).astype(np.float64)
        count += values.size
        sums.append(float(values.sum()))
        squares.append(float(np.square(values).sum()))
    mean = math.fsum(sums) / max(1, count)
    return mean, math.sqrt(max(0.0, math.fsum(squares) / max(1, count) - mean * mean))


@np.errstate(over="ignore", invalid="ignore")
def cast_block(reader: SourceReader, part: Part, block: Float32, origin: Callable[[], str]) -> memoryview:
    """The bytes of a computed block in the part's dtype. Raises MergeFailed for values that float16 can't hold.

    NaN and infinity are noted; `origin` gives a text that says where they come from.
    """
    target = np.dtype(NUMPY_DTYPES[part.dtype])
    cast = np.ascontiguousarray(block.astype(target))
    content = cast.reshape(-1).view(np.uint8).data
    check_float16(part.name, block, cast)
    if has_non_finite(content, part.dtype):
        reader.findings.note(part.tensor.name, f"NaN or infinity {origin()}")
    return content


def check_float16(name: str, block: Float32, cast: npt.NDArray[Any]) -> None:
    """Raises MergeFailed if float16 can't hold the values of a tensor."""
    if cast.dtype == np.float16 and (large := block[np.isinf(cast)]).size and np.isfinite(large).any():
        raise MergeFailed(
            f"{name}: its weights are as large as {np.abs(large[np.isfinite(large)]).max():.3g}, and float16 ends "
            "at 65504. Use dtype: bfloat16 or float32"
        )


def _non_finite_origin(reader: SourceReader, what: Transform, rows: slice) -> str:
    """A text that says where NaN or infinity comes from: the weights, the factors, or the computation."""
    source = what.source
    if (found := non_finite_source(reader, source, what.lora, rows)) is not None:
        return found
    return f"where it is made of {source.name} of {source.file.location}: its numbers are too large for the dtype"


def non_finite_source(reader: SourceReader, source: TensorEntry, lora: LoraPair | None, rows: slice) -> str | None:
    """A text that says whether a weight or one of its factors has NaN or infinity; None if neither has."""
    if not np.isfinite(read_rows(reader, source, rows)).all():
        return f"in {source.name} of {source.file.location}"
    for entry in lora.entries.values() if lora is not None else ():
        if not np.isfinite(load_array(reader, entry).astype(np.float32)).all():
            return f"in the LoRA factor {entry.name} of {entry.file.location}"
    return None


def _note_zero_rows(reader: SourceReader, part: Part, lora: LoraPair, block: Float32, rows: slice) -> None:
    """Note rows of zeros for which DoRA has a magnitude: such rows can't be scaled."""
    if lora.magnitude is None or (has_length := block.any(axis=1)).all():
        return
    if not load_array(reader, lora.magnitude)[rows][~has_length].any():
        return
    what = f"rows of length 0, to which the lora_magnitude_vector of {lora.magnitude.file.location} can't give a length"
    reader.findings.note(part.tensor.name, what)


def read_rows(reader: SourceReader, entry: TensorEntry, rows: slice) -> Float32:
    """Rows of a tensor in float32."""
    return read_stored_rows(reader, entry, rows).astype(np.float32, copy=False)


def read_stored_rows(reader: SourceReader, entry: TensorEntry, rows: slice) -> npt.NDArray[Any]:
    """Rows of a tensor as they are stored. They are read, not mapped: pages of a whole shard would count as memory of
    this process."""
    width = entry.nbytes // entry.shape[0]
    buffer = bytearray((rows.stop - rows.start) * width)
    reader.read_into(entry.file, entry.start + rows.start * width, memoryview(buffer))
    array = np.frombuffer(buffer, dtype=NUMPY_DTYPES[entry.dtype])
    return array.reshape(-1, *entry.shape[1:])


def permute_heads(rows: _Rows, head_dim: int, order: Sequence[int]) -> _Rows:
    """Rows of whole heads, with those of each head in another order; a numpy array or a torch tensor."""
    reordered: _Rows = rows.reshape(-1, head_dim, *rows.shape[1:])[:, order].reshape(rows.shape)
    return reordered


def row_blocks(shape: tuple[int, ...], elements: int = BLOCK_ELEMENTS, together: int = 1) -> Iterator[slice]:
    """Blocks of rows with about `elements` elements each; `together` rows are never separated."""
    if not shape or 0 in shape:
        return
    width = int(np.prod(shape[1:], dtype=np.int64))
    rows = max(1, elements // width // together) * together
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def _generator(seed: int, name: str, block: int) -> np.random.Generator:
    """Random numbers that depend on (seed, tensor, block) only."""
    key = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
