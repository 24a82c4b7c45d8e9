"""What several readers want of an object is fetched once, whoever comes first; all get the object's bytes."""

from __future__ import annotations

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raymoe.sources.facts import SourceFile, TensorEntry
from raymoe.storage.read_cache import GATES, SHARDS, ReadCache

SIZE = 100_000
CONTENT = random.Random(0).randbytes(SIZE)
FILE = SourceFile(location="s3://bucket/model.safetensors", size=SIZE, etag="1")
BOTH = (GATES, SHARDS)


class Store:
    """An object, and how often each of its bytes has been fetched."""

    def __init__(self) -> None:
        self.fetched, self.failing = [0] * SIZE, False
        self._lock = threading.Lock()

    def fetch(self, start: int, buffer: memoryview) -> None:
        if self.failing:
            raise OSError("no answer")
        buffer[:] = CONTENT[start : start + len(buffer)]
        with self._lock:
            for at in range(start, start + len(buffer)):
                self.fetched[at] += 1


def entry(start: int, end: int, location: str = FILE.location) -> TensorEntry:
    file = SourceFile(location=location, size=SIZE, etag="1")
    return TensorEntry(name=f"{start}", dtype="U8", shape=(end - start,), file=file, start=start, end=end)


def read(spool: ReadCache, store: Store, reader: str, start: int, end: int) -> None:
    found = bytearray(end - start)
    spool.read_into(reader, FILE, start, memoryview(found), store.fetch)
    assert found == CONTENT[start:end]


def room_taken(spool: ReadCache) -> int:
    """Bytes on disk of what is kept."""
    import os

    files = [kept.file for kept in spool._objects.values() if kept.file is not None]
    return sum(os.fstat(file.fileno()).st_blocks * 512 for file in files)


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 20))])
def test_two_sides_that_cut_the_object_differently(tmp_path: Path, seed: int) -> None:
    """Both read all of it, in pieces of their own, at the same time: each expected byte is fetched once."""
    numbers, spool, store = random.Random(seed), ReadCache(tmp_path), Store()
    bounds = sorted(numbers.sample(range(SIZE), 12))
    spool.expect((entry(start, end) for start, end in itertools.pairwise(bounds)), *BOTH)
    reads = []
    for side in BOTH:
        cuts = sorted({0, SIZE, *numbers.sample(range(SIZE), numbers.choice([3, 40]))})
        pieces = [(side, start, end) for start, end in itertools.pairwise(cuts)]
        numbers.shuffle(pieces)
        reads.append(pieces)
    mixed = [piece for pair in itertools.zip_longest(*reads) for piece in pair if piece is not None]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda piece: read(spool, store, *piece), mixed))
    for at in range(SIZE):
        assert store.fetched[at] == (1 if bounds[0] <= at < bounds[-1] else 2), at
    assert spool._cached_bytes == 0
    assert not any(kept.segments for kept in spool._objects.values())
    assert room_taken(spool) <= 2 * 4096 * len(mixed)  # holes are whole blocks
    assert not list(tmp_path.iterdir()), "the file has no name that could be left behind"


def test_what_is_kept_is_read_from_the_disk(tmp_path: Path) -> None:
    spool, store = ReadCache(tmp_path), Store()
    spool.expect([entry(0, 8192)], *BOTH)
    read(spool, store, GATES, 0, 8192)
    assert room_taken(spool) >= 8192
    store.failing = True
    read(spool, store, SHARDS, 0, 8192)
    assert room_taken(spool) == 0
    with pytest.raises(OSError, match="no answer"):
        read(spool, store, SHARDS, 0, 8192)  # a third time it is not there


def test_a_file_that_can_not_be_made(tmp_path: Path) -> None:
    """The read goes on, nothing counts as kept, and the bytes are fetched again."""
    spool, store = ReadCache(tmp_path / "gone", most_bytes=SIZE), Store()
    spool.expect([entry(0, 8192)], *BOTH)
    read(spool, store, GATES, 0, 8192)
    assert spool._cached_bytes == 0
    read(spool, store, SHARDS, 0, 8192)
    assert set(store.fetched[:8192]) == {2}
    assert not any(kept.segments for kept in spool._objects.values())


def test_a_fetch_that_fails_leaves_the_range_to_others(tmp_path: Path) -> None:
    spool, store = ReadCache(tmp_path), Store()
    spool.expect([entry(100, 300)], *BOTH)
    store.failing = True
    for side in BOTH:
        with pytest.raises(OSError, match="no answer"):
            read(spool, store, side, 0, 1000)
    store.failing = False
    for side in BOTH:
        read(spool, store, side, 0, 1000)
    assert store.fetched[100:300] == [1] * 200


def test_no_room(tmp_path: Path) -> None:
    """What does not fit is fetched twice, and that is all."""
    spool, store = ReadCache(tmp_path, most_bytes=150), Store()
    spool.expect([entry(0, 100), entry(100, 200)], *BOTH)
    for side in BOTH:
        read(spool, store, side, 0, 200)
    assert store.fetched[:200] == [1] * 100 + [2] * 100


def test_gates_that_end_early(tmp_path: Path) -> None:
    """Shards are not kept for a gate pass that has ended; what it has left for shards is."""
    spool, store = ReadCache(tmp_path), Store()
    spool.expect([entry(0, 100), entry(100, 200), entry(200, 300)], *BOTH)
    read(spool, store, GATES, 0, 100)
    read(spool, store, SHARDS, 100, 200)
    spool.forget([entry(0, 300)], GATES)
    assert spool._cached_bytes == 100
    read(spool, store, SHARDS, 0, 300)
    assert spool._cached_bytes == 0
    assert store.fetched[:300] == [1] * 100 + [2] * 100 + [1] * 100


def test_local_files_are_not_kept(tmp_path: Path) -> None:
    spool = ReadCache(tmp_path)
    spool.expect([entry(0, 100, location=str(tmp_path / "model.safetensors"))], *BOTH)
    assert not spool._objects


@pytest.mark.parametrize("seed", range(10))
def test_many_shards_of_the_same_weights(tmp_path: Path, seed: int) -> None:
    """Eight shards and a gate pass, some at the same time, each in pieces of its own; a second range that only some
    want, and a last one that nobody does."""
    numbers, spool, store = random.Random(seed), ReadCache(tmp_path), Store()
    everyone, some = entry(0, 50_000), entry(50_000, 80_000)
    names = [f"shard {number}" for number in range(8)]
    spool.expect([everyone], GATES, *names)
    spool.expect([some], *names[:3])

    def work(reader: str) -> None:
        cuts = sorted({0, SIZE, *numbers.sample(range(SIZE), 20)})
        for start, end in itertools.pairwise(cuts):
            read(spool, store, reader, start, end)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, [*names[:4], GATES, *names[4:]]))
    assert set(store.fetched[:50_000]) == {1}
    assert set(store.fetched[50_000:80_000]) <= set(range(1, 8)) and set(store.fetched[80_000:]) == {9}
    assert spool._cached_bytes == 0


def test_shards_that_come_one_after_the_other(tmp_path: Path) -> None:
    """Each says whether another will come; what it leaves is kept till then, and no longer."""
    spool, store, weights = ReadCache(tmp_path), Store(), [entry(0, 1000)]
    for number, more in enumerate([True, True, False]):
        name = f"shard {number}"
        spool.expect(weights, name, *([SHARDS] if more else []))
        if not more:
            spool.forget(weights, SHARDS)
        read(spool, store, name, 0, 1000)
        spool.forget(weights, name)
        assert spool._cached_bytes == (1000 if more else 0)
    assert store.fetched[:1000] == [1] * 1000


def test_a_reader_that_fails_is_not_waited_for(tmp_path: Path) -> None:
    spool, store = ReadCache(tmp_path), Store()
    spool.expect([entry(0, 8192)], "one", "two")
    read(spool, store, "one", 0, 8192)
    assert spool._cached_bytes == 8192
    spool.forget([entry(0, 8192)], "two")
    assert spool._cached_bytes == 0 and room_taken(spool) == 0
    assert not any(kept.segments for kept in spool._objects.values())
