"""Packs output tensors into shard files. Names, headers and offsets are final before anything is written.

A shard belongs to one owner (the base, one expert, the router), so that the actor of that owner can write it alone.
Only tensors that hold several experts of a layer have many sources; they are in separate shards. Within an owner,
tensors keep the order of their source bytes: neighbours in the source stay neighbours in the output, and a run of
copies is one long range. Short runs come before long ones (see `_small_runs_first`).

File format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON padded with spaces, data).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from raymoe.object_store.protocol import MIN_PART_BYTES
from raymoe.planning.owner import Owner
from raymoe.planning.plan import (
    Columns,
    Combine,
    Copy,
    Part,
    PartSource,
    Shard,
    Transform,
    Transposed,
    WholeTensor,
)
from raymoe.sources.dtypes import DTYPE_BYTES

# Data starts at a multiple of this in every shard; 64 is enough for every dtype and for readers that map files.
_ALIGN = 64
# Some filesystems let two files share equal blocks, if these are aligned in both.
_BLOCK = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A block of an output tensor's rows."""

    name: str
    shape: tuple[int, ...]
    what: PartSource


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTensor:
    """A tensor of the merged model, before it is assigned to a file. `what` is its source, or how it is made."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    owner: Owner
    what: PartSource | tuple[Piece, ...]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces that it consists of, in order; most tensors are one piece."""
        return self.what if isinstance(self.what, tuple) else (Piece(name=self.name, shape=self.shape, what=self.what),)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def pack_shards(tensors: Sequence[OutputTensor], owners: Sequence[Owner], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Fill shards owner by owner, in the order of `owners`; a tensor above the limit gets a shard of its own."""
    groups: list[list[OutputTensor]] = []
    by_owner: dict[Owner, list[OutputTensor]] = {owner: [] for owner in owners}
    for tensor in tensors:
        by_owner[tensor.owner].append(tensor)
    for members in by_owner.values():
        groups.extend(_split_by_size(_small_runs_first(_source_order(members)), max_shard_bytes))
    count = len(groups)
    return tuple(
        _build(f"model-{number:05d}-of-{count:05d}.safetensors", group) for number, group in enumerate(groups, start=1)
    )


def _source_order(tensors: Sequence[OutputTensor]) -> list[OutputTensor]:
    def key(tensor: OutputTensor) -> tuple[str, int, str]:
        what = tensor.pieces[0].what
        if isinstance(what, (Columns, Transposed)):
            what = what.matrices[0].what
        if isinstance(what, Combine):
            entry = what.combination.base.entry
            return (entry.file.location, entry.start, tensor.name)
        if isinstance(what, (Copy, Transform)):
            return (what.source.file.location, what.source.start, tensor.name)
        return ("", 0, "")  # computed tensors have no source order; the sort is stable, so they keep the model's

    return sorted(tensors, key=key)


def _small_runs_first(tensors: Sequence[OutputTensor]) -> list[OutputTensor]:
    """Sort runs of adjacent source bytes that are too short for an upload part before longer ones.

    An object store copies long ranges server-side; the short ones, and the header, have to be sent. Together at the
    start of a shard they cost no more than their own bytes.
    """
    runs: list[list[OutputTensor]] = []
    for tensor in tensors:
        if runs and _is_adjacent(runs[-1][-1], tensor):
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
    short: list[OutputTensor] = []
    long: list[OutputTensor] = []
    for run in runs:
        (long if _is_long(run) else short).extend(run)
    return short + long


def _is_adjacent(left: OutputTensor, right: OutputTensor) -> bool:
    a, b = left.what, right.what
    return (
        isinstance(a, Copy)
        and isinstance(b, Copy)
        and a.source.end == b.source.start
        and (a.source.file is b.source.file or a.source.file == b.source.file)
    )


def _is_long(run: Sequence[OutputTensor]) -> bool:
    return isinstance(run[0].pieces[0].what, Copy) and sum(tensor.nbytes for tensor in run) >= MIN_PART_BYTES


def _split_by_size(tensors: Sequence[OutputTensor], max_shard_bytes: int) -> list[list[OutputTensor]]:
    groups: list[list[OutputTensor]] = []
    room = 0
    for tensor in tensors:
        if not groups or tensor.nbytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(tensor)
        room -= tensor.nbytes
    return groups


def _build(file_name: str, tensors: Sequence[OutputTensor]) -> Shard:
    (owner,) = [key for key, _ in groupby(tensors, key=lambda t: t.owner)]
    pieces = [(tensor, piece, _piece_bytes(tensor, piece)) for tensor in tensors for piece in tensor.pieces]
    header = _header(tensors, _data_place([(piece.what, nbytes) for _, piece, nbytes in pieces]))
    parts, start = [], len(header)
    whole: WholeTensor | None = None
    for tensor, piece, nbytes in pieces:
        if not isinstance(tensor.what, tuple):
            whole = None
        elif whole is None or whole.name != tensor.name:  # one object for all of its parts
            whole = WholeTensor(name=tensor.name, shape=tensor.shape)
        end = start + nbytes
        what = piece.what
        # A copy has its source's shape: the tuple is shared.
        shape = what.source.shape if isinstance(what, Copy) and what.source.shape == piece.shape else piece.shape
        parts.append(
            Part(name=piece.name, dtype=tensor.dtype, shape=shape, start=start, end=end, what=what, whole=whole)
        )
        start = end
    return Shard(file_name=file_name, owner=owner, header=header, parts=tuple(parts))


def _piece_bytes(tensor: OutputTensor, piece: Piece) -> int:
    return math.prod(piece.shape) * DTYPE_BYTES[tensor.dtype]


def _header(tensors: Sequence[OutputTensor], data_place: tuple[int, int]) -> bytes:
    # transformers rejects files without this metadata entry.
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    place, align = data_place
    padded = text + b" " * ((place - 8 - len(text)) % align)
    return len(padded).to_bytes(8, "little") + padded


def _data_place(pieces: Sequence[tuple[PartSource, int]]) -> tuple[int, int]:
    """The alignment of the data's start, as (remainder, modulus); `pieces` are the sources, each with its bytes.

    With long copies, the alignment is such that most of their bytes are in the same position within a block as in the
    source. A source's data starts at a multiple of 8 at least, which is enough for every reader of that source.
    """
    rests: Counter[int] = Counter()
    offset = 0
    for what, nbytes in pieces:
        if isinstance(what, Copy):
            rests[(what.source.start - offset) % _BLOCK] += nbytes
        offset += nbytes
    rest, count = max(rests.items(), key=lambda item: item[1], default=(0, 0))
    return (rest, _BLOCK) if count >= MIN_PART_BYTES and rest % 8 == 0 else (0, _ALIGN)
