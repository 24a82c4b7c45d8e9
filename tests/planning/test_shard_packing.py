"""Packing tensors into shards: limits, order, names, headers; and the plan's own check of itself."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from raymoe.planning.invariants import check_plan
from raymoe.planning.owner import BASE, ROUTER, Owner
from raymoe.planning.plan import Constant, Copy, Part, Router, Shard
from raymoe.planning.shard_packing import OutputTensor, pack_shards
from raymoe.sources.facts import SourceFile, TensorEntry

FILE = SourceFile(location="/models/a/model.safetensors", size=1 << 40)


def copied(name: str, elements: int, start: int = 0, owner: Owner = BASE, file: SourceFile = FILE) -> OutputTensor:
    """A vector of bfloat16 that is copied from byte `start` of a file."""
    entry = TensorEntry(
        name=f"source.{name}", dtype="BF16", shape=(elements,), file=file, start=start, end=start + 2 * elements
    )
    return OutputTensor(name=name, dtype="BF16", shape=(elements,), owner=owner, what=Copy(source=entry))


def names(shards: Sequence[Shard]) -> list[list[str]]:
    return [[part.name for part in shard.parts] for shard in shards]


def test_limit_is_of_the_tensors_bytes() -> None:
    """Ten tensors of 20 bytes, 50 to a shard: two each. A limit that fits exactly is used."""
    tensors = [copied(f"t{n}", 10, 20 * n) for n in range(10)]
    assert [len(group) for group in names(pack_shards(tensors, [BASE], 50))] == [2] * 5
    assert [len(group) for group in names(pack_shards(tensors, [BASE], 60))] == [3, 3, 3, 1]
    assert [len(group) for group in names(pack_shards(tensors, [BASE], 200))] == [10]


def test_tensor_larger_than_the_limit() -> None:
    """It gets a shard of its own, and those around it do not join it."""
    tensors = [copied("a", 10, 0), copied("big", 1000, 20), copied("b", 10, 2020), copied("c", 10, 2040)]
    assert names(pack_shards(tensors, [BASE], 100)) == [["a"], ["big"], ["b", "c"]]


def test_a_shard_has_one_owner() -> None:
    first, second = Owner.expert(0), Owner.expert(1)
    tensors = [copied(f"{owner} {n}", 5, 10 * n, owner) for n in range(3) for owner in (second, BASE, first)]
    owners = [BASE, first, second]
    shards = pack_shards(tensors, owners, 20)
    assert [shard.owner for shard in shards] == [BASE] * 2 + [first] * 2 + [second] * 2
    for shard in shards:
        assert {part.name.rpartition(" ")[0] for part in shard.parts} == {str(shard.owner)}


def test_order_is_that_of_the_source() -> None:
    """By file, then by offset: a copy reads forwards. Computed tensors keep the order that they came in."""
    other = SourceFile(location="/models/b/model.safetensors", size=1000)
    of_b = [copied("b2", 1, 200, file=other), copied("b1", 1, 100, file=other)]
    tensors = [of_b[0], copied("a2", 1, 90), of_b[1], copied("a1", 1, 8)]
    assert names(pack_shards(tensors, [BASE], 1000)) == [["a1", "a2", "b1", "b2"]]
    routers = [
        OutputTensor(name=f"router.{n}", dtype="F32", shape=(2,), owner=ROUTER, what=Router(layer=n))
        for n in (10, 9, 2)
    ]
    assert names(pack_shards(routers, [ROUTER], 1000)) == [["router.10", "router.9", "router.2"]]


def test_names_count_all_shards() -> None:
    """As transformers names them, which other tools look for."""
    shards = pack_shards([copied(f"t{n}", 10, 20 * n) for n in range(12)], [BASE], 20)
    expected = [f"model-{number:05}-of-00012.safetensors" for number in range(1, 13)]
    assert [shard.file_name for shard in shards] == expected


def test_header_is_a_safetensors_header() -> None:
    """Read by the safetensors library itself; data begins at a multiple of 64, `__metadata__` says pt."""
    from safetensors import deserialize

    tensors = [
        OutputTensor(name="ä.weight", dtype="F32", shape=(2, 3), owner=BASE, what=Constant()),
        OutputTensor(name="b", dtype="BF16", shape=(5,), owner=BASE, what=Constant()),
    ]
    (shard,) = pack_shards(tensors, [BASE], 1 << 20)
    assert len(shard.header) % 64 == 0
    data = shard.header + bytes(range(34))
    found = dict(deserialize(data))
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in found.items()} == {
        "ä.weight": ("F32", [2, 3]),
        "b": ("BF16", [5]),
    }
    assert bytes(found["b"]["data"]) == bytes(range(24, 34))
    assert [(part.name, part.start - len(shard.header), part.nbytes) for part in shard.parts] == [
        ("ä.weight", 0, 24),
        ("b", 24, 10),
    ]
    assert shard.nbytes == len(data)
    length = int.from_bytes(shard.header[:8], "little")
    assert json.loads(shard.header[8 : 8 + length])["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("seed", range(20))
def test_any_tensors(seed: int) -> None:
    """Whatever comes in: everything once, no shard too full, no two that would fit in one."""
    numbers = random.Random(seed)
    owners = [Owner.expert(n) for n in range(numbers.randint(1, 4))]
    tensors, end = [], 0
    for n in range(numbers.randint(1, 60)):
        elements = numbers.randint(1, 40)
        tensors.append(copied(f"t{n}", elements, end, numbers.choice(owners)))
        end += 2 * elements
    numbers.shuffle(tensors)
    limit = numbers.randint(10, 100)
    shards = pack_shards(tensors, owners, limit)
    check_plan(shards, tensors)
    for shard in shards:
        data = sum(part.nbytes for part in shard.parts)
        assert data <= limit or len(shard.parts) == 1
        starts = [part.what.source.start for part in shard.parts if isinstance(part.what, Copy)]
        assert starts == sorted(starts)
    for left, right in itertools.pairwise(shards):
        if left.owner == right.owner:
            assert sum(part.nbytes for part in left.parts) + right.parts[0].nbytes > limit
    in_other_order = sorted(tensors, key=lambda t: t.name)
    assert pack_shards(in_other_order, owners, limit) == shards


# --- what check_plan catches


@pytest.fixture
def plan() -> tuple[tuple[Shard, ...], list[OutputTensor]]:
    tensors = [copied(f"t{n}", 4, 8 * n) for n in range(6)]
    return pack_shards(tensors, [BASE], 24), tensors


def damaged_part(shards: tuple[Shard, ...], **changes: Any) -> tuple[Shard, ...]:
    """The plan with its second part changed."""
    first = shards[0]
    parts = (first.parts[0], dataclasses.replace(first.parts[1], **changes), *first.parts[2:])
    return (dataclasses.replace(first, parts=parts), *shards[1:])


def source_of(part: Part) -> TensorEntry:
    assert isinstance(part.what, Copy)
    return part.what.source


Damage = Callable[[tuple[Shard, ...]], tuple[Shard, ...]]
DAMAGES: dict[str, tuple[Damage, str | None]] = {
    "twice": (lambda s: damaged_part(s, name="t0"), "written twice"),
    "missing": (lambda s: s[:1], "not written"),
    "unknown": (lambda s: damaged_part(s, name="t99"), "not written"),
    "same file": (lambda s: (s[0], dataclasses.replace(s[1], file_name=s[0].file_name)), "two shards of one name"),
    "gap": (lambda s: damaged_part(s, start=s[0].parts[1].start + 1), "gap or overlap"),
    "overlap": (lambda s: damaged_part(s, start=s[0].parts[1].start - 1), "gap or overlap"),
    "too long": (lambda s: damaged_part(s, end=s[0].parts[1].end + 2), "do not fit its shape"),
    "other shape": (lambda s: damaged_part(s, shape=(5,)), "do not fit its shape"),
    "header length": (lambda s: (dataclasses.replace(s[0], header=s[0].header + b" "), s[1]), None),
    "copy of another dtype": (lambda s: damaged_part(s, dtype="F16"), None),
    "copy of another shape": (lambda s: damaged_part(s, shape=(2, 2)), None),
    "copy of a shorter range": (
        lambda s: damaged_part(s, what=Copy(source=dataclasses.replace(source_of(s[0].parts[1]), end=14))),
        None,
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_check_plan(plan: tuple[tuple[Shard, ...], list[OutputTensor]], damage: str) -> None:
    shards, tensors = plan
    check_plan(shards, tensors)
    change, message = DAMAGES[damage]
    with pytest.raises(AssertionError, match=message):
        check_plan(change(shards), tensors)


@pytest.mark.parametrize(("first", "expected"), [(4096 + 80, 80), (4096 * 3, 0), (4096 + 83, None)])
def test_long_copies_lie_in_their_blocks_as_in_the_source(first: int, expected: int | None) -> None:
    """So that a filesystem can share the blocks. The small tensor before them moves them by 16 bytes."""
    long = [copied("a", 3 << 20, first), copied("b", 5 << 20, first + (4 << 20))]
    (shard,) = pack_shards([copied("norm", 8, 8), *long], [BASE], 1 << 30)
    parts = {part.name: part for part in shard.parts}
    if expected is None:  # at an odd byte: no reader would be content with that
        assert len(shard.header) % 64 == 0
    else:
        assert (parts["b"].start - first) % 4096 == 0
        assert len(shard.header) % 8 == 0
    assert int.from_bytes(shard.header[:8], "little") == len(shard.header) - 8


def test_short_copies_keep_the_usual_alignment() -> None:
    (shard,) = pack_shards([copied("a", 1000, 8)], [BASE], 1 << 30)
    assert len(shard.header) % 64 == 0
