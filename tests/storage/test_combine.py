"""Combined tensors against the formulas of their methods, written out in float64; any range gives the same bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from raymoe.planning.plan import Combination, Combine, HeadPermutation, Shard, WeightRef
from raymoe.sources.facts import LoraPair
from raymoe.sources.hub import HubOptions
from raymoe.storage import combine
from raymoe.storage.combine import load_combined, measure, weight_rows
from raymoe.storage.shard_stream import shard_chunks, shard_range
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transform import NUMPY_DTYPES, permute_heads
from raymoe.storage.value_checks import WeightFindings
from tests.storage.plans import one_shard, save, tensor

SHAPE = (60, 16)
Array = np.ndarray[Any, Any]


@pytest.fixture
def reader() -> Iterator[SourceReader]:
    with SourceReader(HubOptions()) as opened:
        yield opened


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of about seven rows: every tensor has several, and none ends where a part does. Windows are of three."""
    monkeypatch.setattr(combine, "_BLOCK_ELEMENTS", 21 * SHAPE[1])
    monkeypatch.setattr(combine, "_WINDOW_ELEMENTS", 3 * SHAPE[1])


def values(seed: int, rows: int = SHAPE[0], scale: float = 1.0) -> Array:
    return scale * np.random.default_rng(seed).standard_normal((rows, SHAPE[1]))


@pytest.fixture
def combination(tmp_path: Path) -> Callable[..., Combination]:
    """combination(method, base, experts): of arrays, which are stored in their dtypes."""

    folders = map(str, itertools.count())  # a reader keeps its files open

    def stored(array: Array, name: str) -> WeightRef:
        return WeightRef(entry=save(tmp_path / next(folders) / name, {"w": array})["w"])

    def make(method: str, base: Array, experts: Sequence[Array], **fields: Any) -> Combination:
        refs = tuple(stored(array, f"expert{number}") for number, array in enumerate(experts))
        given = {"weights": (1.0,) * len(refs), "scale": 1.0, "density": 1.0, "dtype": "F32", **fields}
        return Combination(method=method, base=stored(base, "base"), experts=refs, **given)

    return make


def shard_of(what: Combination, **options: Any) -> Shard:
    entry = replace(what.base.entry, dtype=what.dtype)
    return one_shard([tensor(entry, Combine(combination=what, **options), name="out", dtype=what.dtype)])


def content(reader: SourceReader, shard: Shard) -> bytes:
    return b"".join(bytes(chunk) for chunk in shard_chunks(shard, reader))


def combined(reader: SourceReader, what: Combination, **options: Any) -> Array:
    shard = shard_of(what, **options)
    part = shard.parts[0]
    return np.frombuffer(content(reader, shard)[part.start :], NUMPY_DTYPES[part.dtype]).reshape(part.shape)


# --- the formulas


def mean(experts: Sequence[Array], weights: Sequence[float]) -> Array:
    return np.average(np.stack([x.astype(np.float64) for x in experts]), axis=0, weights=weights)


def slerp(one: Array, other: Array, share: float) -> Array:
    """Shoemake 1985, of whole tensors as vectors."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    angle = np.arccos((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))
    return np.sin((1 - share) * angle) / np.sin(angle) * one + np.sin(share * angle) / np.sin(angle) * other


def ties(base: Array, experts: Sequence[Array], weights: Sequence[float], density: float, scale: float) -> Array:
    """Yadav et al. 2023: trim, elect the sign with the larger total, mean of the differences that have it."""
    trimmed = []
    for expert in experts:
        difference = expert.astype(np.float64) - base.astype(np.float64)
        kept = max(1, int(density * difference.size))
        threshold = np.sort(np.abs(difference), axis=None)[-kept]
        trimmed.append(np.where(np.abs(difference) >= threshold, difference, 0))
    weighted = np.stack([w * d for w, d in zip(weights, trimmed, strict=True)])
    elected = np.where(weighted.sum(axis=0) >= 0, 1, -1)
    agrees = np.sign(weighted) == elected
    shares = (np.array(weights)[:, None, None] * agrees).sum(axis=0)
    merged = (weighted * agrees).sum(axis=0) / np.where(shares == 0, 1, shares)
    return base.astype(np.float64) + scale * merged


WEIGHTS = [(1.0, 1.0, 1.0), (0.5, 3.0, 0.25)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("scale", [1.0, 0.3, -2.0])
def test_linear(
    reader: SourceReader, combination: Callable[..., Combination], weights: tuple[float, ...], scale: float
) -> None:
    """Also of tensors of several dtypes."""
    dtypes = (np.float32, ml_dtypes.bfloat16, np.float16)
    base, experts = values(9), [values(seed).astype(dtype) for seed, dtype in enumerate(dtypes)]
    base = base.astype(ml_dtypes.bfloat16)
    found = combined(reader, combination("linear", base, experts, weights=weights, scale=scale))
    start = base.astype(np.float64)
    assert np.allclose(found, start + scale * (mean(experts, weights) - start), rtol=0, atol=2e-6)


def test_experts_are_added_in_their_order(reader: SourceReader, combination: Callable[..., Combination]) -> None:
    """Another order gives other last bits, and so another merge of the same plan."""
    experts = [values(seed).astype(np.float32) for seed in range(6)]
    weights = (1.0, 0.3, 2.0, 0.7, 5.0, 0.1)

    def added(order: Sequence[int]) -> bytes:
        changes = np.zeros_like(experts[0])
        for number in order:
            changes += (experts[number] - experts[0]) * np.float32(weights[number])
        return (experts[0] + changes / np.float32(math.fsum(weights))).tobytes()

    found = combined(reader, combination("linear", values(9), experts, weights=weights)).tobytes()
    assert found == added(range(1, 6)) != added(range(5, 0, -1))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 4.0)])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_slerp(
    reader: SourceReader, combination: Callable[..., Combination], weights: tuple[float, float], scale: float
) -> None:
    base, one, other = (values(seed).astype(np.float32) for seed in range(3))
    found = combined(reader, combination("slerp", base, [one, other], weights=weights, scale=scale))
    expected = slerp(one, other, weights[1] / sum(weights))
    assert not np.allclose(expected, mean([one, other], weights), atol=0.1), "the mean would do"
    assert np.allclose(found, base + scale * (expected - base), rtol=0, atol=1e-6)


@pytest.mark.parametrize("other", [1.0, 0.0, -1.0], ids=["equal", "zero", "opposite"])
def test_slerp_of_tensors_without_an_angle_is_linear(
    reader: SourceReader, combination: Callable[..., Combination], other: float
) -> None:
    one = values(1).astype(np.float32)
    found = combined(reader, combination("slerp", values(2).astype(np.float32), [one, other * one]))
    assert np.allclose(found, (1 + other) / 2 * one, rtol=0, atol=1e-6)
    assert other != 1.0 or np.array_equal(found, one)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", [1.0, 0.5, 0.2, 1e-6])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_ties(
    reader: SourceReader,
    combination: Callable[..., Combination],
    weights: tuple[float, ...],
    density: float,
    scale: float,
) -> None:
    base = values(9).astype(np.float32)
    experts = [(base + values(seed, scale=0.1)).astype(np.float32) for seed in range(3)]
    what = combination("ties", base, experts, weights=weights, density=density, scale=scale)
    found = combined(reader, what)
    assert np.allclose(found, ties(base, experts, weights, density, scale), rtol=0, atol=1e-6)
    changed = np.count_nonzero(found != base)
    assert 0 < changed <= sum(max(1, int(density * base.size)) for _ in experts)


@pytest.mark.parametrize("held", [1 << 24, 0], ids=["selected", "counted"])
def test_thresholds_are_exact(
    reader: SourceReader, combination: Callable[..., Combination], monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    """The k-th largest difference by sorting, also where many are equal or in one half of the histogram."""
    monkeypatch.setattr(combine, "_SELECT_ELEMENTS", held)
    base = np.zeros(SHAPE, np.float32)
    spread = values(1).astype(np.float32)
    near = (1 + 1e-6 * values(2)).astype(np.float32)
    coarse = np.round(values(3)).astype(np.float32)
    sparse = np.where(values(4) > 2, spread, 0).astype(np.float32)
    for density in (0.001, 0.2, 0.5, 0.999):
        what = combination("ties", base, [spread, near, coarse, sparse], density=density)
        rank = max(1, int(density * base.size))
        expected = [np.sort(np.abs(each), axis=None)[-rank] for each in (spread, near, coarse, sparse)]
        assert measure(reader, what) == tuple(map(float, expected))


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_equal_experts_keep_every_bit(
    reader: SourceReader, combination: Callable[..., Combination], method: str
) -> None:
    """Of float32 numbers, whose thirds do not add up; of zeros with a sign; of the smallest numbers."""
    expert = values(1).astype(np.float32)
    expert[0, :3] = (-0.0, 0.0, np.float32(1e-45))
    count = 2 if method == "slerp" else 3
    found = combined(reader, combination(method, expert, [expert] * count, density=0.2))
    assert found.tobytes() == expert.tobytes()


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_any_range_gives_the_same_bytes(
    reader: SourceReader, combination: Callable[..., Combination], method: str
) -> None:
    """As several workers ask for it, each with a reader of its own."""
    experts = [values(seed).astype(ml_dtypes.bfloat16) for seed in range(2)]
    what = combination(method, values(9).astype(np.float16), experts, density=0.3, scale=0.9, dtype="BF16")
    shard = shard_of(what)
    whole = content(reader, shard)
    for step in (1 + shard.nbytes // 3, 101):
        pieces = []
        for start in range(0, shard.nbytes, step):
            combine._measured.clear()
            with SourceReader(HubOptions()) as own:
                chunks = shard_range(shard, start, min(start + step, shard.nbytes), own)
                pieces.append(b"".join(bytes(chunk) for chunk in chunks))
        assert b"".join(pieces) == whole


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_prompts_are_read_with_the_bytes_of_the_output(
    reader: SourceReader, combination: Callable[..., Combination], method: str
) -> None:
    experts = [values(seed).astype(np.float32) for seed in range(2)]
    what = combination(method, values(9).astype(np.float32), experts, density=0.3, dtype="BF16")
    written = combined(reader, what)
    assert load_combined(reader, what).tobytes() == written.tobytes()
    tokens = np.array([0, 6, 7, 41, 59])
    ref = WeightRef(entry=what.base.entry, combined=what)
    assert np.array_equal(weight_rows(reader, ref, tokens), written[tokens].astype(np.float32))
    assert np.array_equal(weight_rows(reader, ref, slice(5, 30)), written[5:30].astype(np.float32))


def test_rows_that_experts_lack(reader: SourceReader, combination: Callable[..., Combination]) -> None:
    """Each row is the mean of the experts that have it; where none has, the base's. Their further rows are not read."""
    base, short, long, shorter = (values(seed, rows).astype(np.float32) for seed, rows in enumerate((60, 50, 70, 31)))
    found = combined(reader, combination("linear", base, [short, shorter]))
    assert np.allclose(found[:31], (short[:31] + shorter) / 2, atol=1e-6)
    assert np.array_equal(found[31:50], short[31:]) and np.array_equal(found[50:], base[50:])
    assert np.allclose(combined(reader, combination("linear", base, [long, base])), (long[:60] + base) / 2, atol=1e-6)
    found = combined(reader, combination("ties", base, [short, long], density=0.4))
    expected = ties(base[:50], [short], [1.0], 0.4, 1.0)
    thresholds = measure(reader, combination("ties", base, [short, long], density=0.4))
    assert thresholds[0] == np.sort(np.abs(short - base[:50]), axis=None)[-int(0.4 * short.size)]
    alone = combined(reader, combination("ties", base, [short], density=0.4))
    assert np.allclose(alone[:50], expected, atol=1e-6) and np.array_equal(alone[50:], base[50:])
    assert found[50:].tobytes() != base[50:].tobytes()
    turned = combined(reader, combination("slerp", base, [short, long]))
    assert np.allclose(turned[:50], slerp(short, long[:50], 0.5), atol=1e-6)
    assert np.array_equal(turned[50:], long[50:60])


def test_adapters_are_averaged(reader: SourceReader, combination: Callable[..., Combination], tmp_path: Path) -> None:
    """Two adapters on the base's own tensor, which is read once per block."""
    base, rng = values(9).astype(np.float32), np.random.default_rng(3)
    what = combination("linear", base, [base])
    factors = save(
        tmp_path / "lora", {f"{k}{n}": rng.random(s) for n in "01" for k, s in (("a", (4, 16)), ("b", (60, 4)))}
    )
    refs = [
        WeightRef(entry=what.base.entry, lora=LoraPair(a=factors[f"a{n}"], b=factors[f"b{n}"], scaling=0.5))
        for n in "01"
    ]
    found = combined(reader, replace(what, experts=tuple(refs), weights=(1.0, 1.0)))
    content = {name: np.frombuffer(reader.view(entry)).reshape(entry.shape) for name, entry in factors.items()}
    delta = sum(content[f"b{n}"] @ content[f"a{n}"] for n in "01") * 0.5 / 2
    assert np.allclose(found, base + delta, atol=1e-5)


def test_rows_of_fused_tensors_in_the_order_of_heads(
    reader: SourceReader, combination: Callable[..., Combination]
) -> None:
    """Rows 12 to 35, in heads of 4 that no block cuts."""
    base, experts = values(9).astype(np.float32), [values(seed).astype(np.float32) for seed in range(2)]
    what, heads = combination("linear", base, experts, together=4), HeadPermutation(head_dim=4, rotary_dim=4)
    entry = replace(what.base.entry, shape=(24, 16), start=0, end=24 * 16 * 4)
    shard = one_shard([tensor(entry, Combine(combination=what, first_row=12, heads=heads), name="out")])
    found = np.frombuffer(content(reader, shard)[shard.parts[0].start :], np.float32).reshape(24, 16)
    whole = combined(reader, what)
    assert np.array_equal(found, permute_heads(whole[12:36], 4, heads.to_half_split))


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_what_is_not_finite_is_told(combination: Callable[..., Combination], method: str) -> None:
    """By the file that it comes from, and it stays in the output."""
    base, broken = values(9).astype(np.float32), values(1).astype(np.float32)
    broken[3, 4] = np.nan
    findings = WeightFindings()
    with SourceReader(HubOptions(), findings=findings) as reader:
        found = combined(reader, combination(method, base, [base, broken], density=0.5))
    assert np.isnan(found[3, 4]) and np.count_nonzero(np.isnan(found)) == 1
    (line,) = findings.lines
    assert "NaN or infinity in w of" in line and "expert1" in line


def test_a_file_that_was_written_again_is_measured_again(tmp_path: Path) -> None:
    """In a process that goes on, with another plan: both files compare equal."""
    base, found = WeightRef(entry=save(tmp_path / "base", {"w": np.zeros(SHAPE, np.float32)})["w"]), []
    for size in (1, 2):
        (tmp_path / "expert/model.safetensors").unlink(missing_ok=True)
        expert = WeightRef(entry=save(tmp_path / "expert", {"w": np.full(SHAPE, size, np.float32)})["w"])
        what = Combination(
            method="ties", base=base, experts=(expert,), weights=(1.0,), scale=1.0, density=0.5, dtype="F32"
        )
        with SourceReader(HubOptions()) as reader:
            found.append((what, measure(reader, what)))
    assert found[0][0] == found[1][0] and [measured for _, measured in found] == [(1.0,), (2.0,)]
