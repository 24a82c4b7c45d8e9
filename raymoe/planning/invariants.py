"""The plan's invariants. All of them are checked once, on every new plan."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from raymoe.planning.plan import Columns, Combine, Copy, Part, Shard, Transposed
from raymoe.planning.shard_packing import OutputTensor
from raymoe.sources.dtypes import tensor_nbytes


def check_plan(shards: Sequence[Shard], tensors: Sequence[OutputTensor]) -> None:
    """Every output tensor exactly once; bytes = dtype x shape; parts back to back; copies of equal length and dtype."""
    parts = [part.name for shard in shards for part in shard.parts]
    assert len(parts) == len(set(parts)), "a part is written twice"
    by_file = [name for shard in shards for name, _ in groupby(map(_tensor_name, shard.parts))]
    names = set(by_file)
    assert len(names) == len(by_file), "an output tensor is written twice"
    assert names == {t.name for t in tensors}, "an output tensor is not written"
    files = [shard.file_name for shard in shards]
    assert len(files) == len(set(files)), "two shards of one name"
    for shard in shards:
        end = len(shard.header)
        assert shard.header[8:9] == b"{" and int.from_bytes(shard.header[:8], "little") == end - 8
        for part in shard.parts:
            assert part.start == end, f"{part.name}: gap or overlap in {shard.file_name}"
            assert part.nbytes == tensor_nbytes(part.dtype, part.shape), f"{part.name}: bytes do not fit its shape"
            matrices = part.what.matrices if isinstance(part.what, (Columns, Transposed)) else (part,)
            for matrix in matrices:
                if isinstance(matrix.what, Copy):
                    source = matrix.what.source
                    assert (source.dtype, source.shape, source.nbytes) == (matrix.dtype, matrix.shape, matrix.nbytes)
                if isinstance(matrix.what, Combine):
                    whole = matrix.what.combination
                    assert (whole.dtype, whole.shape[1:]) == (matrix.dtype, matrix.shape[1:])
                    assert matrix.what.first_row + matrix.shape[0] <= whole.shape[0], f"{part.name}: rows missing"
            if isinstance(part.what, Columns):
                assert {(matrix.dtype, matrix.shape[0]) for matrix in matrices} == {(part.dtype, part.shape[0])}
                assert sum(matrix.nbytes for matrix in matrices) == part.nbytes, f"{part.name}: columns missing"
            if isinstance(part.what, Transposed):
                assert {(matrix.dtype, matrix.shape[1]) for matrix in matrices} == {(part.dtype, part.shape[0])}
                assert sum(matrix.nbytes for matrix in matrices) == part.nbytes, f"{part.name}: rows missing"
            end = part.end
        for name, of_tensor in groupby(shard.parts, key=_tensor_name):
            pieces = list(of_tensor)
            assert all(piece.whole == pieces[0].whole for piece in pieces[1:]), f"{name}: its parts have other shapes"
            size, shape = sum(piece.nbytes for piece in pieces), pieces[0].tensor.shape
            assert size == tensor_nbytes(pieces[0].dtype, shape), f"{name}: its parts do not make it up"


def _tensor_name(part: Part) -> str:
    return (part.whole or part).name
