"""Tensors made of pieces: kept together, in order, and checked."""

from __future__ import annotations

import dataclasses
import json

import pytest

from raymoe.planning.invariants import check_plan
from raymoe.planning.multipart import server_side_bytes, upload_parts
from raymoe.planning.owner import ALL_EXPERTS
from raymoe.planning.plan import Copy, Shard
from raymoe.planning.shard_packing import OutputTensor, Piece, pack_shards
from tests.planning.test_shard_packing import copied, damaged_part


def stacked(name: str, count: int, start: int = 0) -> OutputTensor:
    """(count, 4) bfloat16: rows of 8 bytes that lie apart from each other in their source, last first."""
    pieces = []
    for number in range(count):
        row = copied(f"{name}[{number}]", 4, start + 100 * (count - number))
        assert isinstance(row.what, Copy)
        pieces.append(Piece(name=row.name, shape=(4,), what=row.what))
    return OutputTensor(name=name, dtype="BF16", shape=(count, 4), owner=ALL_EXPERTS, what=tuple(pieces))


def test_pieces_stay_together_and_in_order() -> None:
    tensors = [stacked("b", 3, 1000), stacked("a", 3)]
    (shard,) = pack_shards(tensors, [ALL_EXPERTS], 1000)
    assert [part.name for part in shard.parts] == ["a[0]", "a[1]", "a[2]", "b[0]", "b[1]", "b[2]"]
    assert [part.tensor.name for part in shard.parts] == ["a"] * 3 + ["b"] * 3
    assert {part.tensor.shape for part in shard.parts} == {(3, 4)}
    length = int.from_bytes(shard.header[:8], "little")
    entries = json.loads(shard.header[8 : 8 + length])
    assert entries["a"] == {"dtype": "BF16", "shape": [3, 4], "data_offsets": [0, 24]}
    assert entries["b"]["data_offsets"] == [24, 48]
    assert shard.nbytes == len(shard.header) + 48
    check_plan((shard,), tensors)


def test_a_shard_is_not_begun_within_a_tensor() -> None:
    tensors = [stacked(name, 3, 1000 * n) for n, name in enumerate("abc")]
    shards = pack_shards(tensors, [ALL_EXPERTS], 30)
    assert [[part.tensor.name for part in shard.parts] for shard in shards] == [[name] * 3 for name in "abc"]
    check_plan(shards, tensors)


def test_what_a_plan_of_pieces_is_checked_for() -> None:
    tensors = [stacked("a", 2), stacked("b", 2, 1000)]
    shards = pack_shards(tensors, [ALL_EXPERTS], 1000)
    (first, *rest) = shards[0].parts

    def with_parts(*parts: object) -> tuple[Shard, ...]:
        return (dataclasses.replace(shards[0], parts=parts),)  # type: ignore[arg-type]

    with pytest.raises(AssertionError, match="written twice"):
        check_plan(with_parts(first, *rest, dataclasses.replace(first, name="c")), tensors)
    with pytest.raises(AssertionError, match="part is written twice"):
        check_plan(damaged_part(shards, name="a[0]"), tensors)
    with pytest.raises(AssertionError, match="its parts do not make it up"):
        check_plan(with_parts(first, *rest[:-1]), tensors)


def test_a_store_copies_the_pieces_of_one_tensor_from_their_own_places() -> None:
    """Pieces of 12 MiB: but for the header and what fills up its part, no byte passes a worker."""
    rows, width = 3, 6 << 20
    pieces = []
    for number in range(rows):
        row = copied(f"a[{number}]", width, 100 + (rows - number) * (width << 2))
        assert isinstance(row.what, Copy)
        pieces.append(Piece(name=row.name, shape=(width,), what=row.what))
    tensor = OutputTensor(name="a", dtype="BF16", shape=(rows, width), owner=ALL_EXPERTS, what=tuple(pieces))
    (shard,) = pack_shards([tensor], [ALL_EXPERTS], 1 << 30)
    parts = upload_parts(shard, lambda file: True)
    assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])] and parts[-1].end == shard.nbytes
    assert server_side_bytes(parts) > 0.8 * shard.nbytes
    for part in parts:
        if part.copy is not None:
            piece = next(p for p in shard.parts if p.start <= part.start and part.end <= p.end)
            assert isinstance(piece.what, Copy)
            assert part.copy.start - piece.what.source.start == part.start - piece.start
            assert part.copy.end - part.copy.start == part.nbytes
