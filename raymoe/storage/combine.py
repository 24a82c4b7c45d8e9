"""Combines tensors of several models: the base's and the experts', x_1 .. x_n with weights w_1 .. w_n.

    linear   m = x_1 + sum_i w_i (x_i - x_1) / sum_i w_i, which is their weighted mean
    slerp    m = sin((1 - t) a) / sin(a) x_1 + sin(t a) / sin(a) x_2, with t = w_2 / (w_1 + w_2) and `a` the angle
             between the two whole tensors; if they are nearly parallel, or one is zero, as `linear`
    ties     d_i = x_i - base, without those smaller than the threshold of i; per element, the sign with the larger sum
             of |w_i d_i| is elected, and m = base + the weighted mean of the d_i that have it

    regmean  m = (sum_i w_i x_i G_i) (sum_i w_i G_i)^-1, for matrices, with G_i the second moments of expert i's inputs.
             These are computed first, layer by layer (`routers.regmean`), and read here from what `SourceReader` has

The result is base + scale * (m - base). Sources: Shoemake 1985, "Animating rotation with quaternion curves"; Yadav et
al. 2023, https://arxiv.org/abs/2306.01708.

Everything is computed in float32, expert by expert in the plan's order, in blocks of rows that depend on the shape
alone. So the bytes do not depend on which actor computes a part, or on the part's size. If a method needs a statistic
of a whole tensor, it is measured first, in the same blocks:

- The angle comes from sums in float64, block by block.
- The threshold is the magnitude of the k-th largest difference, with k = density * elements, at least 1. The bits of
  non-negative float32 values sort like the values. An expert's bits are selected from in memory if they are at most
  64 MiB. Of a larger tensor, one pass counts the upper halves of the bits, which gives the upper half of the k-th
  value, and a second pass counts the lower halves below it. Both give the same value. Differences equal to the k-th
  all count, so they may be more than k.

If the sign sums of an element are equal, the positive sign is elected. If an element's result equals the base's or the
first expert's value, its bits are kept, including the sign of a zero.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from raymoe.planning.plan import Combination, Combine, MatrixMoments, Part, WeightRef
from raymoe.sources.facts import FileStamp, TensorEntry
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transform import (
    BLOCK_ELEMENTS,
    NUMPY_DTYPES,
    Float32,
    Rows,
    cast_block,
    compute_ahead,
    non_finite_source,
    permute_heads,
    read_stored_rows,
    row_blocks,
    with_lora,
)

_BLOCK_ELEMENTS = BLOCK_ELEMENTS  # of all tensors of a combination together
_WINDOW_ELEMENTS = 1 << 16  # about ten float32 arrays of this size are in use at once
_PARALLEL = 0.9995  # above this cosine, a sine is too small to divide by; mergekit and others use the same limit
_HALF_BITS = 16
_SELECT_ELEMENTS = 1 << 24  # the largest tensor of which all differences are held, one expert's at a time
_SIGN_BIT = np.uint32(1 << 31)

Statistics = tuple[float, ...]
"""Statistics of the whole tensors: a threshold per expert (`ties`), or the cosine of two (`slerp`); empty for
`linear`."""


def combined_bytes(reader: SourceReader, part: Part, what: Combine, start: int, end: int) -> Iterator[memoryview]:
    """Bytes [start, end) of a combined part, block by block, in order."""
    combination, row_bytes = what.combination, part.nbytes // part.shape[0]
    statistics = measure(reader, combination)
    calls, cuts = [], []
    for rows in _blocks(combination):
        own = slice(max(rows.start, what.first_row), min(rows.stop, what.first_row + part.shape[0]))
        first, last = (row_bytes * (row - what.first_row) for row in (own.start, own.stop))
        if own.start < own.stop and start < last and first < end:
            calls.append(partial(_combined_block, reader, part, what, statistics, rows, own))
            cuts.append(slice(max(0, start - first), min(last, end) - first))
    for content, cut in zip(compute_ahead(calls), cuts, strict=True):
        yield content[cut]


def _combined_block(
    reader: SourceReader, part: Part, what: Combine, statistics: Statistics, rows: slice, own: slice
) -> memoryview:
    """The part's `own` rows of a block of rows."""
    block = combined_rows(reader, what.combination, rows, statistics)[own.start - rows.start : own.stop - rows.start]
    if what.heads is not None:
        block = permute_heads(block, what.heads.head_dim, what.heads.order)
    return cast_block(reader, part, block, lambda: _non_finite_origin(reader, what.combination, rows))


def load_combined(reader: SourceReader, combination: Combination) -> npt.NDArray[np.generic]:
    """The whole tensor, with the dtype and values of the output."""
    loaded = np.empty(combination.shape, NUMPY_DTYPES[combination.dtype])
    statistics, blocks = measure(reader, combination), list(_blocks(combination))
    computed = compute_ahead([partial(combined_rows, reader, combination, rows, statistics) for rows in blocks])
    for rows, block in zip(blocks, computed, strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            loaded[rows] = block.astype(loaded.dtype)
        reader.heartbeat()
    return loaded


def weight_rows(reader: SourceReader, ref: WeightRef, rows: Rows) -> Float32:
    """Rows of a weight in float32, as the model that reads prompts uses them: with its LoRA delta, or combined."""
    if ref.combined is None:
        block = _read(reader, ref.entry, rows).astype(np.float32, copy=False)
        return block if ref.lora is None else with_lora(reader, block, ref.lora, rows)
    combination, dtype = ref.combined, NUMPY_DTYPES[ref.combined.dtype]
    statistics = measure(reader, combination)
    count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
    found: Float32 = np.empty((count, *combination.shape[1:]), np.float32)
    # In blocks: the rows of all tensors are read at once.
    for part in row_blocks(found.shape, _block_elements(combination)):
        each = slice(rows.start + part.start, rows.start + part.stop) if isinstance(rows, slice) else rows[part]
        with np.errstate(over="ignore", invalid="ignore"):
            found[part] = combined_rows(reader, combination, each, statistics).astype(dtype)
    return found


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # the result is checked for it
def combined_rows(reader: SourceReader, combination: Combination, rows: Rows, statistics: Statistics) -> Float32:
    """Some rows of the result, in float32. Where some experts have too few rows, the others are combined."""
    if combination.moments is not None:
        return _merged_rows(reader, combination, combination.moments, rows)
    pieces = [
        _combine(window, statistics)
        for part in _split_by_height(combination, rows)
        for window in _Tensors(reader, combination, part).windows()
    ]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _merged_rows(reader: SourceReader, combination: Combination, moments: MatrixMoments, rows: Rows) -> Float32:
    """Rows of a matrix that was merged before, with the values that it has in the output."""
    assert reader.matrices is not None, f"{combination.base.entry.name} is read before it is merged"
    stored = reader.matrices.rows_of(moments.layer, combination.base.entry.name)[rows]
    merged: Float32 = np.ascontiguousarray(stored).view(NUMPY_DTYPES[combination.dtype]).astype(np.float32)
    return merged


def with_scale(base: Float32, merged: Float32, scale: float) -> Float32:
    """`base` plus `scale` times the difference of `merged` to it, in the memory of `base`."""
    return add_changes(base, np.float32(scale) * (merged - base))


def _blocks(combination: Combination) -> Iterator[slice]:
    """The blocks that a combination is computed in. Their total size over all tensors is bounded."""
    return row_blocks(combination.shape, _block_elements(combination), combination.together)


def _block_elements(combination: Combination) -> int:
    return max(_WINDOW_ELEMENTS, _BLOCK_ELEMENTS // (1 + len(combination.experts)))


def _split_by_height(combination: Combination, rows: Rows) -> list[Rows]:
    """The rows, split where an expert's tensor ends."""
    heights = sorted({ref.entry.shape[0] for ref in combination.experts})
    if isinstance(rows, slice):
        cuts = [rows.start, *(height for height in heights if rows.start < height < rows.stop), rows.stop]
        return [slice(start, stop) for start, stop in pairwise(cuts)]
    return [piece for piece in np.split(rows, np.searchsorted(rows, heights)) if len(piece)]


class _Tensors:
    """The same rows of all tensors of a combination, each read on first use.

    `windows` yields a few of the rows at a time, so that intermediate results stay in the processor's cache.
    """

    def __init__(self, reader: SourceReader, combination: Combination, rows: Rows) -> None:
        self._reader, self._rows, self.combination = reader, rows, combination
        first = rows.start if isinstance(rows, slice) else int(rows[0])
        self.present = [number for number, ref in enumerate(combination.experts) if first < ref.entry.shape[0]]
        self._stored: dict[TensorEntry, npt.NDArray[Any]] = {}
        self._adapted: dict[WeightRef, Float32] = {}
        self._window = slice(None)

    def windows(self) -> Iterator[_Tensors]:
        """Yield this object once per window; its tensors are then limited to the window's rows."""
        count = self._rows.stop - self._rows.start if isinstance(self._rows, slice) else len(self._rows)
        for rows in row_blocks((count, *self.combination.shape[1:]), _WINDOW_ELEMENTS):
            self._window = rows
            yield self

    def base(self) -> Float32:
        return self._values(self.combination.base)

    def expert(self, number: int) -> Float32:
        return self._values(self.combination.experts[number])

    def _values(self, ref: WeightRef) -> Float32:
        """The values, in memory of their own."""
        if ref.entry not in self._stored:
            self._stored[ref.entry] = _read(self._reader, ref.entry, self._rows)
        stored = self._stored[ref.entry]
        if ref.lora is None:
            values: Float32 = stored[self._window].astype(np.float32)
            return values
        if ref not in self._adapted:
            self._adapted[ref] = with_lora(self._reader, stored.astype(np.float32), ref.lora, self._rows)
        adapted: Float32 = self._adapted[ref][self._window].copy()
        return adapted


def _read(reader: SourceReader, entry: TensorEntry, rows: Rows) -> npt.NDArray[Any]:
    """The rows as they are stored."""
    if isinstance(rows, slice):
        return read_stored_rows(reader, entry, rows)
    width = entry.nbytes // entry.shape[0]
    ranges = [(entry.start + row * width, entry.start + (row + 1) * width) for row in rows.tolist()]
    array = np.frombuffer(b"".join(reader.read_ranges(entry.file, ranges)), dtype=NUMPY_DTYPES[entry.dtype])
    return array.reshape(-1, *entry.shape[1:])


def _combine(tensors: _Tensors, statistics: Statistics) -> Float32:
    method = tensors.combination.method
    if not tensors.present:
        return tensors.base()
    if method == "ties":
        return _ties(tensors, statistics)
    is_turn = method == "slerp" and len(tensors.present) == 2 and _has_angle(*statistics)
    merged = _slerp(tensors, *statistics) if is_turn else _linear(tensors)
    scale = tensors.combination.scale
    if scale == 1.0:
        return merged
    return with_scale(tensors.base(), merged, scale)


def add_changes(block: Float32, changes: Float32) -> Float32:
    """`block` plus `changes`, in place; bits are kept where the change is zero."""
    # A sum with -0.0 is the other number, even if that is -0.0. A masked sum would take many times as long.
    np.bitwise_or(changes.view(np.uint32), (changes == 0) * _SIGN_BIT, out=changes.view(np.uint32))
    block += changes
    return block


def _select(is_first: npt.NDArray[np.bool_], first: Float32, second: Float32) -> Float32:
    """As `np.where`, which guesses a branch per element: several times as slow where the values of a mask alternate."""
    ones = np.negative(is_first, dtype=np.int32, casting="unsafe")  # all bits or none
    kept: npt.NDArray[np.int32] = first.view(np.int32) & ones
    kept |= second.view(np.int32) & ~ones
    return kept.view(np.float32)


def _linear(tensors: _Tensors) -> Float32:
    first, *others = tensors.present
    weights = tensors.combination.weights
    start = tensors.expert(first)
    changes = np.zeros_like(start)
    for number in others:
        difference = tensors.expert(number)
        difference -= start
        difference *= np.float32(weights[number])
        changes += difference
    changes /= np.float32(math.fsum(weights[number] for number in tensors.present))
    return add_changes(start, changes)


def _has_angle(cosine: float) -> bool:
    return abs(cosine) <= _PARALLEL


def _slerp(tensors: _Tensors, cosine: float) -> Float32:
    one, other = tensors.combination.weights
    share, angle = other / (one + other), math.acos(cosine)
    merged = tensors.expert(0)
    merged *= np.float32(math.sin((1 - share) * angle) / math.sin(angle))
    end = tensors.expert(1)
    end *= np.float32(math.sin(share * angle) / math.sin(angle))
    merged += end
    return merged


def _ties(tensors: _Tensors, thresholds: Statistics) -> Float32:
    base = tensors.base()
    # Sums of positive and of negative differences, and the sums of their weights.
    sums, weights = ([np.zeros_like(base), np.zeros_like(base)] for _ in range(2))
    for number in tensors.present:
        difference = tensors.expert(number)
        difference -= base
        difference *= ~(np.abs(difference) < np.float32(thresholds[number]))  # NaN stays
        weight = np.float32(tensors.combination.weights[number])
        difference *= weight
        for sign, of_sign in enumerate((np.maximum(difference, 0), np.minimum(difference, 0))):
            sums[sign] += of_sign
            weights[sign] += (of_sign != 0) * weight
    is_positive = ~(sums[0] + sums[1] < 0)
    changes, weight_sums = _select(is_positive, *sums), _select(is_positive, *weights)
    weight_sums += weight_sums == 0  # there, the change is zero
    changes /= weight_sums
    changes *= np.float32(tensors.combination.scale)
    return add_changes(base, changes)


_Stamps = tuple[FileStamp | None, ...]
_measured: dict[tuple[Combination, _Stamps], Statistics] = {}
_locks: dict[tuple[Combination, _Stamps], threading.Lock] = {}
_guard = threading.Lock()
_selecting = threading.Lock()  # one tensor of a process at a time, so that memory is bounded


def measure(reader: SourceReader, combination: Combination) -> Statistics:
    """The method's statistics of the whole tensors. They are measured once per process, and cached: a few numbers."""
    if (measured := _MEASURES.get(combination.method)) is None:
        return ()
    # A local file that was written again is another file, although it compares equal.
    key = combination, tuple(entry.file.stamp for entry in combination.entries)
    with _guard:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        if key not in _measured:
            _measured[key] = measured(reader, combination)
        return _measured[key]


def _measure_angle(reader: SourceReader, combination: Combination) -> Statistics:
    """The cosine of the two experts' tensors over the rows that both have; 1 if one of them is zero."""
    rows = list(_common_blocks(combination, *combination.experts))
    sums = [*zip(*compute_ahead([partial(_products, reader, combination, piece) for piece in rows]), strict=True)]
    dot, one, other = map(math.fsum, sums)
    length = math.sqrt(one) * math.sqrt(other)
    return (dot / length if length > 0 else 1.0,)


@np.errstate(over="ignore", invalid="ignore")
def _products(reader: SourceReader, combination: Combination, rows: slice) -> tuple[float, float, float]:
    """Scalar products of two tensors' rows: with each other, and of each with itself."""
    tensors = _Tensors(reader, combination, rows)
    one, other = (tensors.expert(number).astype(np.float64) for number in range(2))
    return float(np.sum(one * other)), float(np.sum(one * one)), float(np.sum(other * other))


def _measure_thresholds(reader: SourceReader, combination: Combination) -> Statistics:
    """For each expert, the smallest magnitude of a difference that counts."""
    heights = [min(combination.shape[0], ref.entry.shape[0]) for ref in combination.experts]
    elements = [height * math.prod(combination.shape[1:]) for height in heights]
    ranks = [max(1, int(combination.density * count)) for count in elements]
    if all(rank >= count for rank, count in zip(ranks, elements, strict=True)):
        return (0.0,) * len(ranks)
    if max(elements) <= _SELECT_ELEMENTS:
        return tuple(_select_threshold(reader, combination, number, rank) for number, rank in enumerate(ranks))
    return _count_thresholds(reader, combination, ranks)


def _select_threshold(reader: SourceReader, combination: Combination, number: int, rank: int) -> float:
    """The `rank`-th largest magnitude of an expert's differences."""
    blocks = list(_common_blocks(combination, combination.experts[number]))
    width = math.prod(combination.shape[1:])
    with _selecting:
        bits = np.empty(blocks[-1].stop * width, np.uint32)
        calls = [partial(_magnitude_bits, reader, combination, number, rows) for rows in blocks]
        for rows, found in zip(blocks, compute_ahead(calls), strict=True):
            bits[rows.start * width : rows.stop * width] = found
        bits.partition(len(bits) - rank)
        return float(bits[len(bits) - rank].view(np.float32))


def _count_thresholds(reader: SourceReader, combination: Combination, ranks: Sequence[int]) -> Statistics:
    """The same for all experts, by two passes that count."""
    counts = _count_differences(reader, combination, lambda _, bits: bits >> _HALF_BITS)
    upper = [_half_of_rank(counted, rank) for counted, rank in zip(counts, ranks, strict=True)]
    counts = _count_differences(
        reader, combination, lambda number, bits: bits[bits >> _HALF_BITS == upper[number][0]] & 0xFFFF
    )
    thresholds = []
    for counted, rank, (half, larger) in zip(counts, ranks, upper, strict=True):
        bits = half << _HALF_BITS | _half_of_rank(counted, rank - larger)[0]
        thresholds.append(float(np.array(bits, np.uint32).view(np.float32)))
    return tuple(thresholds)


_Halves = Callable[[int, npt.NDArray[np.uint32]], npt.NDArray[Any]]


def _count_differences(reader: SourceReader, combination: Combination, halves: _Halves) -> npt.NDArray[np.int64]:
    """Count, for each expert `number`, how often each value occurs in `halves(number, bits)` of its differences' bits.

    Shape (experts, values).
    """

    @np.errstate(over="ignore", invalid="ignore")
    def count(rows: slice) -> npt.NDArray[np.uint32]:
        found: list[list[npt.NDArray[np.uint16]]] = [[] for _ in combination.experts]
        for part in _split_by_height(combination, rows):
            for window in _Tensors(reader, combination, part).windows():
                base = window.base()
                for number in window.present:
                    difference = np.abs(window.expert(number) - base).reshape(-1)
                    found[number].append(halves(number, difference.view(np.uint32)).astype(np.uint16))
        counted = (np.bincount(np.concatenate(each), minlength=1 << _HALF_BITS) if each else 0 for each in found)
        return np.stack([np.broadcast_to(each, 1 << _HALF_BITS).astype(np.uint32) for each in counted])

    counts = np.zeros((len(combination.experts), 1 << _HALF_BITS), np.int64)
    for counted in compute_ahead([partial(count, rows) for rows in _blocks(combination)]):
        counts += counted
    return counts


def _half_of_rank(counts: npt.NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The `rank`-th largest of the counted values, and how many values are larger."""
    from_above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_above, rank))
    return len(counts) - 1 - place, int(from_above[place] - counts[len(counts) - 1 - place])


@np.errstate(over="ignore", invalid="ignore")
def _magnitude_bits(reader: SourceReader, combination: Combination, number: int, rows: slice) -> npt.NDArray[np.uint32]:
    tensors = _Tensors(reader, combination, rows)
    difference = tensors.expert(number)
    difference -= tensors.base()
    return np.abs(difference).reshape(-1).view(np.uint32)


def _common_blocks(combination: Combination, *refs: WeightRef) -> Iterator[slice]:
    """The blocks, limited to rows that all of `refs` have."""
    height = min(combination.shape[0], *(ref.entry.shape[0] for ref in refs))
    for rows in _blocks(combination):
        if rows.start < height:
            yield slice(rows.start, min(rows.stop, height))


_MEASURES: Mapping[str, Callable[[SourceReader, Combination], Statistics]] = {
    "slerp": _measure_angle,
    "ties": _measure_thresholds,
}


def _non_finite_origin(reader: SourceReader, combination: Combination, rows: slice) -> str:
    """A text that says which model's tensor has NaN or infinity."""
    for ref in (combination.base, *combination.experts):
        held = slice(rows.start, min(rows.stop, ref.entry.shape[0]))
        if held.start < held.stop and (found := non_finite_source(reader, ref.entry, ref.lora, held)) is not None:
            return found
    source = combination.base.entry
    return f"where {source.name} is combined: its numbers are too large for the dtype"
