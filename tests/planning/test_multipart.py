"""Parts of an upload: whatever a shard is made of, they cover it, keep the store's limits and copy the right ranges."""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import raymoe
from raymoe.object_store.location import Location
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.protocol import MIN_PART_BYTES
from raymoe.planning import MergePlan
from raymoe.planning.multipart import UploadPart, server_side_bytes, upload_layout, upload_parts, upload_problems
from raymoe.planning.owner import BASE
from raymoe.planning.plan import Constant, Copy, Part, Router, Shard, Transform
from raymoe.planning.shard_packing import OutputTensor, pack_shards
from raymoe.sources.facts import SourceFile, TensorEntry
from raymoe.storage.outputs.open_output import open_output
from raymoe.storage.outputs.output_checks import plan_output_problems
from raymoe.storage.transfer_summary import bytes_by_method

MIB = 1 << 20
HEADER = bytes(4096)
MAX_COPY_BYTES, MAX_PART_BYTES, MAX_PARTS = 5 << 30, 5 << 30, 10_000
FILES = [SourceFile(location=f"s3://models/{name}/model.safetensors", size=1 << 50, etag=name) for name in "abc"]
LOCAL = SourceFile(location="/models/d/model.safetensors", size=1 << 50)


def is_remote(file: SourceFile) -> bool:
    return file.location.startswith("s3://")


def copied(nbytes: int, start: int, file: SourceFile = FILES[0], name: str = "t") -> OutputTensor:
    entry = TensorEntry(name=name, dtype="U8", shape=(nbytes,), file=file, start=start, end=start + nbytes)
    return OutputTensor(name=name, dtype="U8", shape=(nbytes,), owner=BASE, what=Copy(source=entry))


def computed(nbytes: int, name: str = "t") -> OutputTensor:
    return OutputTensor(name=name, dtype="U8", shape=(nbytes,), owner=BASE, what=Constant())


def shard_of(*tensors: OutputTensor, header: bytes = HEADER) -> Shard:
    """These tensors in this order."""
    at, parts = len(header), []
    for number, t in enumerate(tensors):
        name = f"t{number}"
        parts.append(Part(name=name, dtype=t.dtype, shape=t.shape, start=at, end=at + t.nbytes, what=t.what))
        at += t.nbytes
    return Shard(file_name="model.safetensors", owner=BASE, header=header, parts=tuple(parts))


def check(shard: Shard, parts: tuple[UploadPart, ...]) -> None:
    """Everything that has to be true of any upload's parts."""
    assert [part.number for part in parts] == list(range(1, len(parts) + 1))
    assert (parts[0].start, parts[-1].end) == (0, shard.nbytes)
    assert all(left.end == right.start for left, right in itertools.pairwise(parts))
    assert len(parts) <= MAX_PARTS
    assert all(part.nbytes >= MIN_PART_BYTES for part in parts[:-1]) and parts[-1].nbytes > 0
    assert all(part.nbytes <= MAX_PART_BYTES for part in parts)
    source_at = source_bytes(shard)
    for part in parts:
        if part.copy is None:
            continue
        assert part.start >= len(shard.header), "headers are nobody's bytes to copy"
        assert is_remote(part.copy.file)
        assert part.copy.end - part.copy.start == part.nbytes >= MIN_PART_BYTES
        # Every tensor that the range crosses lies where its own plan says.
        for start, end, file, source_start in source_at:
            low, high = max(start, part.start), min(end, part.end)
            if low < high:
                assert file == part.copy.file
                assert part.copy.start + (low - part.start) == source_start + (low - start)


def source_bytes(shard: Shard) -> list[tuple[int, int, SourceFile | None, int]]:
    """[start, end) of every part, its source's file and offset; no file for what is computed."""
    found: list[tuple[int, int, SourceFile | None, int]] = []
    for part in shard.parts:
        source = part.what.source if isinstance(part.what, Copy) else None
        found.append((part.start, part.end, source and source.file, source.start if source else 0))
    return found


def shapes(parts: tuple[UploadPart, ...]) -> list[tuple[str, int]]:
    return [("copy" if part.copy else "send", part.nbytes) for part in parts]


# --- any shard


def seeds(count: int, *, of: int) -> list[Any]:
    """The first seeds of so many; `make soak` has the others."""
    return [*range(count), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(count, of))]


@pytest.mark.parametrize("seed", seeds(20, of=60))
def test_any_shard(seed: int) -> None:
    """Runs and single tensors, tiny to 3 GiB, of the same store, of another place, and computed."""
    numbers = random.Random(seed)
    tensors: list[OutputTensor] = []
    at = dict.fromkeys([*FILES, LOCAL], 8)
    sizes = [(1, 5000), (MIB, 6 * MIB), (MIN_PART_BYTES - 2, MIN_PART_BYTES + 2), (20 * MIB, 3 << 30)]
    weights = numbers.choices(range(1, 10), k=len(sizes))
    for _ in range(numbers.randint(1, 80)):
        nbytes = numbers.randint(*numbers.choices(sizes, weights)[0])
        if numbers.random() < 0.2:
            tensors.append(computed(nbytes))
            continue
        file = numbers.choice([*FILES, *FILES, LOCAL])
        at[file] += numbers.choice([0, 0, 0, 1, 10 * MIB])  # most are neighbours in their source
        tensors.append(copied(nbytes, at[file], file))
        at[file] += nbytes
    if numbers.random() < 0.5:
        tensors.sort(key=lambda t: t.what.source.start if isinstance(t.what, Copy) else 0)
    header = bytes(numbers.choice([64, 4096, 70_000, 6 * MIB]))
    shard = shard_of(*tensors, header=header)
    parts = upload_parts(shard, is_remote)
    check(shard, parts)
    # Copied is all that can be: what is sent is what must be, and for each gap at most one part's least size.
    gaps = sum(1 for left, right in itertools.pairwise(parts) if left.copy is None and right.copy is not None) + 1
    must_be_sent = len(header) + sum(nbytes for nbytes, long in runs(shard) if not long)
    glued = sum(nbytes for nbytes, long in runs(shard) if long and nbytes < 2 * MIN_PART_BYTES)
    assert shard.nbytes - server_side_bytes(parts) <= must_be_sent + glued + gaps * MIN_PART_BYTES
    nothing_there = upload_parts(shard, lambda file: False)
    check(shard, nothing_there)
    assert server_side_bytes(nothing_there) == 0


def runs(shard: Shard) -> list[tuple[int, bool]]:
    """Bytes of each run of neighbouring source ranges, and whether a store could copy it."""
    found: list[tuple[int, bool]] = []
    for _, group in itertools.groupby(numbered(shard), key=lambda item: item[0]):
        members = [part for _, part in group]
        nbytes = sum(part.nbytes for part in members)
        what = members[0].what
        found.append((nbytes, isinstance(what, Copy) and is_remote(what.source.file) and nbytes >= MIN_PART_BYTES))
    return found


def numbered(shard: Shard) -> list[tuple[int, Part]]:
    number, last, result = 0, None, []
    for part in shard.parts:
        here = part.what.source if isinstance(part.what, Copy) else None
        if last is None or here is None or (last.file, last.end) != (here.file, here.start):
            number += 1
        result.append((number, part))
        last = here
    return result


# --- each rule by itself


def test_neighbours_are_one_copy() -> None:
    """Five tensors of 3 MiB, none of which could be copied alone."""
    tensors = [copied(3 * MIB, 100 + n * 3 * MIB) for n in range(5)]
    parts = upload_parts(shard_of(*tensors), is_remote)
    assert shapes(parts) == [("send", 5 * MIB), ("copy", 10 * MIB + len(HEADER))]
    assert parts[1].copy is not None
    assert (parts[1].copy.start, parts[1].copy.end) == (100 + 5 * MIB - len(HEADER), 100 + 15 * MIB)


@pytest.mark.parametrize("file", [FILES[1], FILES[0]])
def test_ranges_that_do_not_touch_are_two_copies(file: SourceFile) -> None:
    """Of another file, or of the same one with a byte between them."""
    parts = upload_parts(shard_of(computed(6 * MIB), copied(7 * MIB, 0), copied(8 * MIB, 7 * MIB + 1, file)), is_remote)
    assert shapes(parts) == [("send", 6 * MIB + len(HEADER)), ("copy", 7 * MIB), ("copy", 8 * MIB)]


def test_small_runs_are_glued() -> None:
    """2 MiB to be sent between two copies take 3 MiB along of the range behind them, not of the one before."""
    small = [computed(MIB), copied(MIB, 0, FILES[1])]
    tensors = [computed(5 * MIB), copied(6 * MIB, 0), *small, copied(20 * MIB, 8 * MIB)]
    parts = upload_parts(shard_of(*tensors), is_remote)
    assert shapes(parts)[1:] == [("copy", 6 * MIB), ("send", 5 * MIB), ("copy", 17 * MIB)]
    assert parts[-1].copy is not None and parts[-1].copy.start == 11 * MIB


@pytest.mark.parametrize("left", [-1, 0])
def test_a_range_that_is_left_too_small_is_sent(left: int) -> None:
    """The header takes what it needs; if the rest is a byte short of a part, all of the range is sent."""
    nbytes = 2 * MIN_PART_BYTES - len(HEADER) + left
    shard = shard_of(copied(nbytes, 0), copied(30 * MIB, 0, FILES[1]))
    first, *rest = shapes(upload_parts(shard, is_remote))
    if left < 0:
        assert (first, *rest) == (("send", 2 * MIN_PART_BYTES - 1), ("copy", 30 * MIB))
    else:
        assert (first, *rest) == (("send", MIN_PART_BYTES), ("copy", MIN_PART_BYTES), ("copy", 30 * MIB))


def test_a_small_end_is_a_part_of_its_own() -> None:
    parts = upload_parts(shard_of(computed(5 * MIB), copied(6 * MIB, 0), computed(3)), is_remote)
    assert shapes(parts) == [("send", 5 * MIB + len(HEADER)), ("copy", 6 * MIB), ("send", 3)]


def test_a_large_header_needs_nothing_of_the_data() -> None:
    parts = upload_parts(shard_of(copied(6 * MIB, 7), header=bytes(5 * MIB)), is_remote)
    assert shapes(parts) == [("send", 5 * MIB), ("copy", 6 * MIB)]


def test_all_copied_all_sent_and_tiny() -> None:
    giant = shard_of(copied(4 << 30, 0))
    parts = upload_parts(giant, is_remote)
    check(giant, parts)
    assert giant.nbytes - server_side_bytes(parts) == MIN_PART_BYTES
    assert max(part.nbytes for part in parts) <= 1 << 30
    sent = upload_parts(giant, lambda file: False)
    check(giant, sent)
    assert server_side_bytes(sent) == 0 and max(part.nbytes for part in sent) <= 16 * MIB
    tiny = shard_of(copied(10, 0))
    assert shapes(upload_parts(tiny, is_remote)) == [("send", len(HEADER) + 10)]
    empty = shard_of(copied(0, 0), computed(0))
    assert shapes(upload_parts(empty, is_remote)) == [("send", len(HEADER))]


TB = 10**12
GIANTS: Mapping[str, Callable[[], Shard]] = {
    "one range": lambda: shard_of(copied(5 * TB, 0)),
    "runs of 5 MiB": lambda: alternating(70_000_000_000, MIN_PART_BYTES, 0),
    "runs of 5 MiB and as much computed": lambda: alternating(120_000_000_000, MIN_PART_BYTES, MIN_PART_BYTES),
    "runs of 200 MiB": lambda: alternating(2 * TB, 200 * MIB, 0),
    "runs of a byte over 1 GiB, and 100 MiB computed": lambda: alternating(5 * TB, (1 << 30) + 1, 100 * MIB),
    "runs of 60 MiB, and a byte computed": lambda: alternating(500_000_000_000, 60 * MIB, 1),
}


OF_MANY_TENSORS = ("runs of 5 MiB", "runs of 5 MiB and as much computed", "runs of 60 MiB, and a byte computed")


def alternating(nbytes: int, run: int, between: int) -> Shard:
    tensors: list[OutputTensor] = []
    for number in range(nbytes // (run + between)):
        tensors.append(copied(run, number * (run + 1)))
        if between:
            tensors.append(computed(between))
    return shard_of(*tensors)


@functools.cache
def giant(kind: str) -> Shard:
    return GIANTS[kind]()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in OF_MANY_TENSORS else kind for kind in GIANTS]
)
@pytest.mark.parametrize("same_store", [True, False])
def test_giant_shards(kind: str, same_store: bool) -> None:
    """At most 10,000 parts, of any shard up to 5 TB."""
    shard = giant(kind)
    parts = upload_parts(shard, is_remote if same_store else lambda file: False)
    check_limits(shard, parts)
    if same_store and kind in ("one range", "runs of a byte over 1 GiB, and 100 MiB computed"):
        could = sum(part.nbytes for part in shard.parts if isinstance(part.what, Copy))
        assert could - server_side_bytes(parts) <= 2 * MIN_PART_BYTES, "what a store can copy is not sent"


def check_limits(shard: Shard, parts: tuple[UploadPart, ...]) -> None:
    assert len(parts) <= MAX_PARTS
    assert (parts[0].start, parts[-1].end) == (0, shard.nbytes)
    assert all(left.end == right.start for left, right in itertools.pairwise(parts))
    assert all(MIN_PART_BYTES <= part.nbytes <= MAX_PART_BYTES for part in parts[:-1])


# --- more ranges than an object may have parts


def separate_ranges(count: int, seed: int) -> Shard:
    """Ranges of 5 MiB to 60 MiB, none of which touch in their source."""
    numbers, at, tensors = random.Random(seed), 0, []
    for _ in range(count):
        nbytes = numbers.choice([MIN_PART_BYTES, 6 * MIB, numbers.randint(MIN_PART_BYTES, 60 * MIB)])
        tensors.append(copied(nbytes, at))
        at += nbytes + 1
    return shard_of(*tensors)


def copied_share(shard: Shard) -> float:
    parts = upload_parts(shard, is_remote)
    check_limits(shard, parts)
    check_sources(shard, parts)
    return server_side_bytes(parts) / shard.nbytes


def check_sources(shard: Shard, parts: tuple[UploadPart, ...]) -> None:
    """The bytes of each copied part lie in its source where the plan says. As `check`, for many parts."""
    ranges = source_bytes(shard)
    ends = [end for _, end, _, _ in ranges]
    for part in parts:
        for start, end, file, source_start in ranges[bisect.bisect_right(ends, part.start) :] if part.copy else ():
            if start >= part.end:
                break
            low = max(start, part.start)
            if low < min(end, part.end):
                assert part.copy is not None and file == part.copy.file
                assert part.copy.start + (low - part.start) == source_start + (low - start)


@pytest.mark.parametrize(
    ("ranges", "least", "most"),
    [
        pytest.param(9_999, 0.9999, 1.0, marks=pytest.mark.slow),
        (10_001, 0.999, 0.9999),
        pytest.param(12_000, 0.8, 0.9, marks=pytest.mark.slow),
        pytest.param(40_000, 0.05, 0.5, marks=pytest.mark.slow),
    ],
)
def test_as_few_ranges_are_sent_as_it_takes(ranges: int, least: float, most: float) -> None:
    """9,999 ranges fit, but for what the header takes; each one more costs about one of the shortest."""
    assert least < copied_share(separate_ranges(ranges, seed=1)) < most


def test_the_shortest_ranges_are_sent() -> None:
    """10,002 ranges, of which the last 5,000 are shorter by a byte: five of these are sent, as two parts."""
    tensors = [copied(6 * MIB + (number < 5_002), number * 7 * MIB) for number in range(10_002)]
    parts = upload_parts(shard_of(*tensors, header=bytes(5 * MIB)), is_remote)
    assert len(parts) == MAX_PARTS
    lengths = [part.nbytes for part in parts if part.copy is not None]
    assert (lengths.count(6 * MIB + 1), lengths.count(6 * MIB)) == (5_002, 4_995)


def test_longer_parts_are_copied_before_ranges_are_sent() -> None:
    """4,000 ranges of 1.2 GiB are 8,000 parts of the usual size, and 8,000 between them are sent."""
    length = 1_200 * MIB
    tensors: list[OutputTensor] = []
    for number in range(4_000):
        tensors += [computed(MIN_PART_BYTES), copied(length, number * (length + 1))]
    shard = shard_of(*tensors)
    parts = upload_parts(shard, is_remote)
    check_limits(shard, parts)
    assert server_side_bytes(parts) == 4_000 * length
    assert {part.nbytes for part in parts if part.copy is not None} == {length}


@pytest.mark.parametrize("seed", [pytest.param(1, marks=pytest.mark.slow), *seeds(1, of=1), *seeds(0, of=6)[2:]])
def test_any_shard_of_many_ranges(seed: int) -> None:
    """All rules of the store, for ranges of all kinds."""
    numbers, at, tensors = random.Random(seed), 0, []
    sizes = [(1, 5000), (MIN_PART_BYTES - 2, MIN_PART_BYTES + 2), (5 * MIB, 40 * MIB), (400 * MIB, 3 << 30)]
    weights = [*numbers.choices(range(1, 10), k=3), 1]
    for _ in range(numbers.randint(10_000, 16_000)):
        nbytes = numbers.randint(*numbers.choices(sizes, weights)[0])
        at += numbers.choice([0, 1])
        tensors.append(computed(nbytes) if nbytes < MIB and numbers.random() < 0.5 else copied(nbytes, at))
        at += nbytes
    shard = shard_of(*tensors, header=bytes(numbers.choice([4096, 2 * MIB])))
    assert 0 < copied_share(shard) < 1


def test_layout_of_many_ranges_has_a_number_of_its_own() -> None:
    """Usual shards keep their layout; a shard that may have too many ranges is cut as no earlier version did."""
    usual, many = separate_ranges(900, seed=2), separate_ranges(10_001, seed=2)
    assert upload_layout([usual])[0] == 1
    assert upload_layout([usual, many])[0] == 2


def test_objects_over_the_limit_are_refused() -> None:
    """5 TiB fit; a byte more does not, and the problem names the flag."""
    assert upload_problems([shard_of(copied((5 << 40) - len(HEADER), 0))], "s3://bucket/out") == []
    (problem,) = upload_problems([shard_of(copied((5 << 40) - len(HEADER) + 1, 0))], "s3://bucket/out")
    assert "5 TiB" in problem.what and "--out-shard-size" in str(problem)


def test_a_plan_for_s3_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of the store: the plan alone shows it. A folder has no such limit."""
    plan = hollow_plan(tmp_path, SMOLLM2)
    monkeypatch.setattr("raymoe.planning.multipart.MAX_OBJECT_BYTES", 1 << 20)
    problems = plan_output_problems(
        plan, open_output(Location.of("s3://bucket/out"), StorageOptions()), overwrite=False
    )
    assert problems and all("--out-shard-size" in str(problem) for problem in problems[:1])
    assert (
        plan_output_problems(plan, open_output(Location.parse(tmp_path / "out"), StorageOptions()), overwrite=False)
        == []
    )


# --- what packing does for it


def test_short_runs_come_first_and_neighbours_stay_together() -> None:
    """Runs of 4, 12, 1 and 9 MiB, in pieces, offered in disorder."""
    lengths, tensors, at = [4, 12, 1, 9], [], 0
    for run, length in enumerate(lengths):
        for piece in range(length):
            tensors.append(copied(MIB, at, name=f"run{run}.{piece:02}"))
            at += MIB
        at += 7
    expected = [f"run{run}.{piece:02}" for run in (0, 2, 1, 3) for piece in range(lengths[run])]
    random.Random(1).shuffle(tensors)
    (shard,) = pack_shards(tensors, [BASE], 1 << 40)
    assert [part.name for part in shard.parts] == expected
    parts = upload_parts(shard, is_remote)
    check(shard, parts)
    assert shapes(parts) == [("send", 5 * MIB + len(shard.header)), ("copy", 12 * MIB), ("copy", 9 * MIB)]


def test_transformed_tensors_are_no_run() -> None:
    """However large: there is nothing to copy, so they stand with what has to be sent."""
    source = TensorEntry(name="s", dtype="U8", shape=(6 * MIB,), file=FILES[0], start=50 * MIB, end=56 * MIB)
    what = Transform(source=source, scale=2.0)
    changed = OutputTensor(name="changed", dtype="U8", shape=(6 * MIB,), owner=BASE, what=what)
    (shard,) = pack_shards([copied(6 * MIB, 0, name="kept"), changed], [BASE], 1 << 40)
    assert [part.name for part in shard.parts] == ["changed", "kept"]
    assert shapes(upload_parts(shard, is_remote))[-1] == ("copy", 6 * MIB)


# --- real shapes

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
MISTRAL_7B = SMOLLM2 | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}


def tensor_shapes(config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, in the alphabetical order in which transformers and safetensors write them."""
    hidden, inner = int(str(config["hidden_size"])), int(str(config["intermediate_size"]))
    heads, kv_heads = int(str(config["num_attention_heads"])), int(str(config["num_key_value_heads"]))
    vocab, kv = int(str(config["vocab_size"])), hidden // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(int(str(config["num_hidden_layers"]))):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "mlp.down_proj.weight": (hidden, inner),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
        }
    return dict(sorted(shapes.items()))


def write_hollow(folder: Path, config: Mapping[str, object]) -> Path:
    """A model that is all header: its data is a hole, which takes no disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, dims in tensor_shapes(config).items():
        start, end = end, end + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def hollow_plan(folder: Path, config: Mapping[str, object]) -> MergePlan:
    models = [str(write_hollow(folder / f"model{number}", config)) for number in range(5)]
    experts = [{"source_model": model} for model in models[1:]]
    merge = {"base_model": models[0], "gate_mode": "random", "architecture": "mixtral", "experts": experts}
    return raymoe.plan(merge, allow_all_same=True)


@pytest.mark.parametrize(("config", "most"), [(MISTRAL_7B, 0.01), (SMOLLM2, 0.10)], ids=["7B", "SmolLM2-135M"])
def test_through_the_workers(config: Mapping[str, object], most: float, tmp_path: Path) -> None:
    """The share of the output that a worker has to send when all else is in one store. (Here the files are local.)"""
    plan = hollow_plan(tmp_path, config)
    total = sent = 0
    for shard in plan.shards:
        parts = upload_parts(shard, lambda file: True)
        total += shard.nbytes
        sent += shard.nbytes - server_side_bytes(parts)
        check_limits(shard, parts)
        router = sum(part.nbytes for part in shard.parts if isinstance(part.what, Router))
        assert shard.nbytes - server_side_bytes(parts) >= len(shard.header) + router
    assert total == plan.totals.output_bytes
    assert 0 < sent / total <= most
    print(f"{sent / total:.4f} of {total:,} bytes")


def test_ways_say_the_same(tmp_path: Path) -> None:
    """What `raymoe plan` shows: sources on this disk are sent, all of them."""
    plan = hollow_plan(tmp_path, SMOLLM2)
    ways = bytes_by_method(plan, open_output(Location.parse("s3://bucket/out"), StorageOptions()))
    assert set(ways) == {"local", "computed"}
    assert sum(ways.values()) == plan.totals.output_bytes
