"""A shard as a stream: the safetensors library reads from it what was planned, and sources are read in long ranges."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from raymoe.errors import CheckpointError
from raymoe.planning.owner import BASE, ROUTER
from raymoe.planning.plan import Constant, Copy, Part, Router, Shard, Transform, Transposed
from raymoe.planning.shard_packing import OutputTensor
from raymoe.sources.hub import HubOptions
from raymoe.sources.local_folder import LocalFolder
from raymoe.sources.weight_index import index_model_weights
from raymoe.storage.shard_stream import RouterBytes, different_tensors, part_chunks, shard_chunks, shard_range
from raymoe.storage.source_reader import CHUNK_BYTES, LOCAL_CHUNK_BYTES, SourceReader
from raymoe.storage.transform import BLOCK_ELEMENTS
from tests.storage.plans import one_shard, save, tensor

NUMBERS = np.random.default_rng(5)


@pytest.fixture
def reader() -> Iterator[SourceReader]:
    with SourceReader(HubOptions()) as opened:
        yield opened


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, bytes) of every read of a source from now on."""
    seen: list[tuple[int, int]] = []
    preadv = os.preadv

    def spy(descriptor: int, buffers: Any, offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        seen.append((offset, count))
        return count

    monkeypatch.setattr(os, "preadv", spy)
    return seen


def content(shard: Shard, reader: SourceReader, router: RouterBytes | None = None) -> bytes:
    return b"".join(bytes(chunk) for chunk in shard_chunks(shard, reader, router))


def test_every_kind_of_part(reader: SourceReader, tmp_path: Path) -> None:
    entries = save(tmp_path, {name: NUMBERS.standard_normal((4, 6), np.float32) for name in "abc"})
    rows = np.arange(12, dtype=np.float32).reshape(2, 6)
    shard = one_shard(
        [
            tensor(entries["a"]),
            tensor(entries["b"], Transform(source=entries["b"]), dtype="F16"),
            OutputTensor(name="zeros", dtype="F32", shape=(3, 5), owner=BASE, what=Constant()),
            OutputTensor(name="router", dtype="F32", shape=(2, 6), owner=BASE, what=Router(layer=1)),
            tensor(entries["c"]),
        ]
    )
    asked = []

    def router(part: Any, what: Router) -> bytes:
        asked.append((part.name, what.layer))
        return rows.tobytes()

    found = load(content(shard, reader, router))
    sources = load((tmp_path / "model.safetensors").read_bytes())
    assert found.keys() == {"a", "b", "c", "zeros", "router"}
    for name in "ac":
        assert np.array_equal(found[name], sources[name])
    assert np.array_equal(found["b"], sources["b"].astype(np.float16))
    assert not found["zeros"].any()
    assert np.array_equal(found["router"], rows)
    assert asked == [("router", 1)]


def test_matrices_are_transposed_in_any_ranges(
    reader: SourceReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several blocks, one matrix copied and one computed, as the parts of an upload are asked for."""
    monkeypatch.setattr("raymoe.storage.shard_stream._TRANSPOSED_BYTES", 100)
    entries = save(tmp_path, {name: NUMBERS.standard_normal((5, 7), np.float32) for name in "ab"})
    below = tuple(
        Part(name=name, dtype="F32", shape=(5, 7), start=0, end=140, what=what)
        for name, what in (("a", Copy(source=entries["a"])), ("b", Transform(source=entries["b"], scale=2.0)))
    )
    what = Transposed(matrices=below)
    shard = one_shard(
        [OutputTensor(name=n, dtype="F32", shape=(7, 10), owner=BASE, what=what) for n in ("once", "again")]
    )
    whole = content(shard, reader)
    sources = load((tmp_path / "model.safetensors").read_bytes())
    expected = np.concatenate([sources["a"], 2 * sources["b"]]).T
    assert all(np.array_equal(found, expected) for found in load(whole).values())
    again = [b"".join(shard_range(shard, at, min(at + 37, shard.nbytes), reader)) for at in range(0, shard.nbytes, 37)]
    assert b"".join(again) == whole


def test_neighbours_are_read_as_one_range(reader: SourceReader, reads: list[tuple[int, int]], tmp_path: Path) -> None:
    """Twelve tensors of 100 kB, back to back in their source: full chunks across their borders, and the rest."""
    entries = save(tmp_path, {f"t{n:02}": NUMBERS.integers(0, 255, 100_000, np.uint8) for n in range(12)})
    shard = one_shard([tensor(entry) for entry in entries.values()])
    reads.clear()
    found = content(shard, reader)
    first = min(entry.start for entry in entries.values())
    whole = [(first + n * LOCAL_CHUNK_BYTES, LOCAL_CHUNK_BYTES) for n in range(4)]
    assert reads == [*whole, (first + 4 * LOCAL_CHUNK_BYTES, 1_200_000 - 4 * LOCAL_CHUNK_BYTES)]
    assert found[len(shard.header) :] == (tmp_path / "model.safetensors").read_bytes()[first:]


def test_gaps_and_other_files_are_not_joined(
    reader: SourceReader, reads: list[tuple[int, int]], tmp_path: Path
) -> None:
    one = save(tmp_path / "1", {name: NUMBERS.standard_normal(8, np.float32) for name in "abc"})
    two = save(tmp_path / "2", {name: NUMBERS.standard_normal(8, np.float32) for name in "de"})
    shard = one_shard([tensor(entry) for entry in (one["a"], one["c"], two["d"], two["e"])])
    reads.clear()
    found = load(content(shard, reader))
    assert sorted(reads) == sorted([(one["a"].start, 32), (one["c"].start, 32), (two["d"].start, 64)])
    for entries, names in ((one, "ac"), (two, "de")):
        for name in names:
            raw = Path(entries[name].file.location).read_bytes()[entries[name].start : entries[name].end]
            assert found[name].tobytes() == raw


def test_chunks_are_bounded(reader: SourceReader, tmp_path: Path) -> None:
    """Neither a large copy nor a large transformed tensor nor large zeros come in one piece."""
    rows = 3 * BLOCK_ELEMENTS // 1000 // 2
    entries = save(tmp_path, {"a": np.zeros((rows, 1000), np.float32), "b": np.zeros(2 * CHUNK_BYTES + 5, np.uint8)})
    shard = one_shard(
        [
            tensor(entries["a"], Transform(source=entries["a"], scale=2.0)),
            tensor(entries["b"]),
            OutputTensor(name="z", dtype="U8", shape=(2 * CHUNK_BYTES + 5,), owner=BASE, what=Constant()),
        ]
    )
    sizes = [len(chunk) for chunk in shard_chunks(shard, reader)]
    assert sum(sizes) == shard.nbytes
    assert max(sizes) <= 4 * BLOCK_ELEMENTS
    assert len(sizes) >= 1 + 2 + 3 + 3


def test_a_router_that_nobody_computed(reader: SourceReader) -> None:
    shard = one_shard([OutputTensor(name="r", dtype="F32", shape=(2, 2), owner=ROUTER, what=Router(layer=0))])
    with pytest.raises(AssertionError, match="router rows asked for"):
        content(shard, reader)


def test_source_that_became_shorter(tmp_path: Path) -> None:
    """Its size is checked when it is opened, and every read after that."""
    entries = save(tmp_path, {name: NUMBERS.integers(0, 255, 5 * CHUNK_BYTES // 2, np.uint8) for name in "ab"})
    file = tmp_path / "model.safetensors"
    reader = SourceReader(HubOptions())
    chunks = shard_chunks(one_shard([tensor(entry) for entry in entries.values()]), reader)
    next(chunks)
    next(chunks)
    os.truncate(file, entries["a"].end)
    with pytest.raises(CheckpointError, match=r"model.safetensors: ends at byte \d+, expected at least \d+"):
        list(chunks)
    reader.close()
    with (
        SourceReader(HubOptions()) as fresh,
        pytest.raises(CheckpointError, match=r"has \d+ bytes, but had \d+ when the merge was planned"),
    ):
        fresh.path(entries["a"].file)


def test_different_tensors(reader: SourceReader, tmp_path: Path) -> None:
    """Changed bytes, another shape or dtype, and a tensor that is not there; the others are the same."""
    names = ["same", "late", "shape", "dtype", "gone", "scaled"]
    sources = {name: NUMBERS.standard_normal((6, 4), np.float32) for name in names}
    entries = save(tmp_path / "source", sources)
    parts = one_shard(
        [tensor(e, Transform(source=e, scale=3.0) if e.name == "scaled" else None) for e in entries.values()]
    ).parts
    written = {**sources, "scaled": sources["scaled"] * np.float32(3)}
    good = save(tmp_path / "good", written)
    progressed: list[int] = []
    assert different_tensors(parts, good, reader, progress=progressed.append) == []
    assert sum(progressed) == sum(array.nbytes for array in written.values())
    written["late"] = written["late"].copy()
    written["late"][-1, -1] += 1
    written["shape"] = written["shape"].reshape(4, 6)
    written["dtype"] = written["dtype"].view(np.int32)
    written["scaled"] = sources["scaled"]
    del written["gone"]
    bad = save(tmp_path / "bad", written)
    assert sorted(different_tensors(parts, bad, reader)) == ["dtype", "gone", "late", "scaled", "shape"]


def test_different_router(reader: SourceReader, tmp_path: Path) -> None:
    rows = NUMBERS.standard_normal((3, 4), np.float32)
    written = save(tmp_path, {"r": rows})
    router = OutputTensor(name="r", dtype="F32", shape=(3, 4), owner=ROUTER, what=Router(layer=0))
    parts = one_shard([router]).parts
    assert different_tensors(parts, written, reader, lambda part, what: rows.tobytes()) == []
    other = (rows + np.float32(1e-6)).tobytes()
    assert different_tensors(parts, written, reader, lambda part, what: other) == ["r"]


def test_parts_alone(reader: SourceReader, tmp_path: Path) -> None:
    entries = save(tmp_path, {name: NUMBERS.standard_normal((5, 3), np.float32) for name in "abc"})
    shard = one_shard([tensor(entry) for entry in entries.values()])
    whole = content(shard, reader)
    for part in shard.parts:
        assert b"".join(map(bytes, part_chunks((part,), reader))) == whole[part.start : part.end]
    assert index_model_weights(LocalFolder(str(tmp_path))).tensors == entries
