"""Transformed tensors against the formula, written out with numpy; in blocks that are the same for everybody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from raymoe.errors import MergeFailed
from raymoe.planning.plan import HeadPermutation, Transform
from raymoe.sources.facts import LoraPair
from raymoe.sources.hub import HubOptions
from raymoe.storage.shard_stream import part_chunks
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transform import NUMPY_DTYPES, load_array, transformed_bytes
from tests.storage.plans import one_shard, save, tensor

BF16 = ml_dtypes.bfloat16
BLOCK_ELEMENTS = 1 << 18  # raymoe's own blocks have 16 times as many
# More than a block in rows of this width.
ROWS, WIDTH = BLOCK_ELEMENTS // 2048 + 100, 2048


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymoe.storage.transform.BLOCK_ELEMENTS", BLOCK_ELEMENTS)
    monkeypatch.setattr("raymoe.storage.transform._CAST_ELEMENTS", BLOCK_ELEMENTS // 16)


@pytest.fixture
def reader() -> Iterator[SourceReader]:
    with SourceReader(HubOptions()) as opened:
        yield opened


def transformed(reader: SourceReader, entry: Any, what: Transform, dtype: str, name: str = "out") -> Any:
    """The part's values, and the number of pieces that they came in."""
    part = one_shard([tensor(entry, what, name=name, dtype=dtype)]).parts[0]
    chunks = [bytes(chunk) for chunk in part_chunks((part,), reader)]
    return np.frombuffer(b"".join(chunks), NUMPY_DTYPES[dtype]).reshape(part.shape), len(chunks)


@pytest.mark.parametrize("source", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("target", ["BF16", "F16", "F32"])
def test_cast(reader: SourceReader, tmp_path: Path, source: Any, target: str) -> None:
    """Through float32, to nearest even; infinity stays what it is."""
    values = np.array([[0.1, -2.5, 1e-9, 3.0], [65504.0, 65519.0, np.inf, 0.0]])
    entry = save(tmp_path, {"w": values.astype(source)})["w"]
    found, _ = transformed(reader, entry, Transform(source=entry), target)
    with np.errstate(over="ignore"):
        expected = values.astype(source).astype(np.float32).astype(NUMPY_DTYPES[target])
    assert np.array_equal(found, expected)
    assert np.isinf(found[1, 2])


@pytest.mark.parametrize("options", [{}, {"scale": 1e4}])
def test_weights_that_float16_can_not_hold(reader: SourceReader, tmp_path: Path, options: dict[str, float]) -> None:
    values = np.array([[1.0, 7e4 if not options else 7.0], [np.nan, -np.inf]], np.float32)
    entry = save(tmp_path, {"w": values})["w"]
    with pytest.raises(MergeFailed, match=r"^out: its weights are as large as 7e\+04, and float16 ends at 65504"):
        transformed(reader, entry, Transform(source=entry, **options), "F16")
    transformed(reader, entry, Transform(source=entry, **options), "BF16")


def test_scale_and_noise_in_blocks(reader: SourceReader, tmp_path: Path) -> None:
    """(weight + noise) * scale, and noise of the deviation asked for, in every block."""
    weight = np.full((ROWS, WIDTH), 3.0, np.float32)
    entry = save(tmp_path, {"w": weight})["w"]
    what = Transform(source=entry, noise_scale=0.25, scale=2.0, seed=4)
    found, pieces = transformed(reader, entry, what, "F32")
    assert pieces == 2
    noise = found / 2.0 - 3.0
    for block in (noise[: ROWS - 100], noise[ROWS - 100 :]):
        assert abs(block.mean()) < 0.01
        assert block.std() == pytest.approx(0.25, rel=0.02)
    assert not np.array_equal(noise[:100], noise[ROWS - 100 :]), "two blocks with the same noise"
    scaled, _ = transformed(reader, entry, Transform(source=entry, scale=-0.5), "F32")
    assert np.array_equal(scaled, weight * np.float32(-0.5))


def test_noise_depends_on_seed_and_name_alone(reader: SourceReader, tmp_path: Path) -> None:
    entries = save(tmp_path, {"w": np.zeros((8, 8), np.float32), "v": np.zeros((8, 8), np.float32)})

    def noise(source: str, seed: int, name: str) -> bytes:
        what = Transform(source=entries[source], noise_scale=1.0, seed=seed)
        values: bytes = transformed(reader, entries[source], what, "F32", name)[0].tobytes()
        return values

    assert noise("w", 1, "x") == noise("w", 1, "x") == noise("v", 1, "x")
    assert len({noise("w", 1, "x"), noise("w", 2, "x"), noise("w", 1, "y")}) == 3


def test_lora_in_blocks(reader: SourceReader, tmp_path: Path) -> None:
    """W + scaling * B A, rows of B with their own rows of W, in the source's dtype at last."""
    numbers = np.random.default_rng(3)
    weight = numbers.standard_normal((ROWS, WIDTH), np.float32).astype(BF16)
    shapes = {"a": (2, WIDTH), "b": (ROWS, 2)}
    factors = {name: numbers.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    entries = save(tmp_path, {"w": weight, **factors})
    pair = LoraPair(a=entries["a"], b=entries["b"], scaling=0.75)
    found, pieces = transformed(reader, entries["w"], Transform(source=entries["w"], lora=pair), "F32")
    assert pieces == 2
    expected = weight.astype(np.float64) + 0.75 * (factors["b"].astype(np.float64) @ factors["a"].astype(np.float64))
    assert np.abs(found - expected).max() < 1e-5
    rounded, _ = transformed(reader, entries["w"], Transform(source=entries["w"], lora=pair), "BF16")
    assert np.array_equal(rounded, found.astype(BF16))


def test_order_of_steps(reader: SourceReader, tmp_path: Path) -> None:
    """LoRA, then noise, then scale: each seen in the result of all."""
    entries = save(
        tmp_path,
        {"w": np.ones((4, 4), np.float32), "a": np.ones((1, 4), np.float32), "b": np.ones((4, 1), np.float32)},
    )
    pair = LoraPair(a=entries["a"], b=entries["b"], scaling=10.0)
    w = entries["w"]
    all_steps, _ = transformed(reader, w, Transform(source=w, lora=pair, noise_scale=1.0, scale=100.0, seed=1), "F32")
    noise_only, _ = transformed(reader, w, Transform(source=w, noise_scale=1.0, seed=1), "F32")
    assert np.allclose(all_steps, 100.0 * (noise_only + 10.0), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("head_dim", [64, 1500])
def test_rows_change_places_within_heads(reader: SourceReader, tmp_path: Path, head_dim: int, dtype: str) -> None:
    """Whatever the blocks, and from whatever byte on: a head is never cut."""
    heads = HeadPermutation(head_dim=head_dim, rotary_dim=24)
    weight = np.random.default_rng(5).standard_normal((4 * head_dim, 300), np.float32)
    entries = save(tmp_path, {"w": weight, "bias": weight[:, 0].copy()})
    order = [*range(0, 24, 2), *range(1, 24, 2), *range(24, head_dim)]
    for name, whole in (("w", weight), ("bias", weight[:, 0])):
        what = Transform(source=entries[name], heads=heads)
        found, _ = transformed(reader, entries[name], what, dtype)
        expected = np.concatenate([head[order] for head in np.split(whole, 4)]).astype(NUMPY_DTYPES[dtype])
        assert np.array_equal(found, expected)
        part = one_shard([tensor(entries[name], what, dtype=dtype)]).parts[0]
        start, end = part.nbytes // 3 + 1, part.nbytes - 7
        some = b"".join(bytes(chunk) for chunk in transformed_bytes(reader, part, what, start, end))
        assert some == expected.tobytes()[start:end]


def test_rows_go_back(reader: SourceReader) -> None:
    heads = HeadPermutation(head_dim=10, rotary_dim=6)
    assert heads.to_half_split == [0, 2, 4, 1, 3, 5, 6, 7, 8, 9]
    assert [heads.to_half_split[row] for row in heads.to_interleaved] == list(range(10))


def test_rows_change_places_after_the_adapter(reader: SourceReader, tmp_path: Path) -> None:
    numbers = np.random.default_rng(6)
    arrays = {name: numbers.standard_normal(shape, np.float32) for name, shape in (("w", (8, 5)), ("b", (8, 2)))}
    entries = save(tmp_path, {**arrays, "a": numbers.standard_normal((2, 5), np.float32)})
    pair = LoraPair(a=entries["a"], b=entries["b"], scaling=0.5)
    plain, _ = transformed(reader, entries["w"], Transform(source=entries["w"], lora=pair), "F32")
    heads = HeadPermutation(head_dim=4, rotary_dim=4)
    found, _ = transformed(reader, entries["w"], Transform(source=entries["w"], lora=pair, heads=heads), "F32")
    assert np.array_equal(found, plain[[0, 2, 1, 3, 4, 6, 5, 7]])


def test_vector(reader: SourceReader, tmp_path: Path) -> None:
    values = np.arange(7, dtype=np.float32)
    entry = save(tmp_path, {"v": values})["v"]
    found, _ = transformed(reader, entry, Transform(source=entry, scale=0.5), "F16")
    assert np.array_equal(found, (values / 2).astype(np.float16))


def test_load_array(reader: SourceReader, tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4).astype(BF16)
    entry = save(tmp_path, {"w": values})["w"]
    found = load_array(reader, entry)
    assert found.dtype == BF16
    assert np.array_equal(found, values)


@pytest.mark.parametrize("how", [{}, {"noise_scale": 0.5}])
def test_any_range_is_a_piece_of_the_whole(reader: SourceReader, tmp_path: Path, how: dict[str, float]) -> None:
    """Of a tensor of six blocks of noise, or many of a cast; threads work ahead, and bytes still come in order."""
    rows = 5 * BLOCK_ELEMENTS // 65536 + 1
    values = np.random.default_rng(1).standard_normal((rows, 65536), np.float32)
    entry = save(tmp_path, {"w": values})["w"]
    part = one_shard([tensor(entry, Transform(source=entry, **how), name="out", dtype="F16")]).parts[0]

    def read(start: int, end: int) -> bytes:
        return b"".join(bytes(chunk) for chunk in transformed_bytes(reader, part, part.what, start, end))

    whole = read(0, part.nbytes)
    assert len(whole) == part.nbytes
    if not how:
        assert whole == values.astype(np.float16).tobytes()
    third = part.nbytes // 3
    for start, end in ((0, 10), (third, third), (third - 1, 2 * third + 1), (part.nbytes - 7, part.nbytes)):
        assert read(start, end) == whole[start:end]


def test_blocks_ahead_are_given_up(reader: SourceReader, tmp_path: Path) -> None:
    """A reader that stops early leaves nothing behind, and the next one starts from the beginning."""
    entry = save(tmp_path, {"w": np.zeros((5 * BLOCK_ELEMENTS // 65536, 65536), np.float32)})["w"]
    part = one_shard([tensor(entry, Transform(source=entry, noise_scale=1.0), dtype="F32")]).parts[0]
    first = []
    for _ in range(3):
        blocks = transformed_bytes(reader, part, part.what, 0, part.nbytes)
        first.append(bytes(next(blocks)))
        blocks.close()
    assert first[0] == first[1] == first[2]
    assert len(first[0]) < part.nbytes
