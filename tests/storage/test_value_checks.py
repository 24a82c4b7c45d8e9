"""NaN and infinity in weights: named where they are computed with, and with `strict` wherever they pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import raymoe
from raymoe.errors import MergeFailed, ProblemReport
from raymoe.planning import MergeOptions
from raymoe.planning.plan import Columns, Transform
from raymoe.sources.facts import LoraPair
from raymoe.sources.hub import HubOptions
from raymoe.storage.shard_stream import shard_range
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.value_checks import WeightFindings, has_non_finite, scan_non_finite
from tests.pico import copy_model, merge_config
from tests.storage.plans import one_shard, save, tensor

BF16 = ml_dtypes.bfloat16
CODES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": BF16, "F8_E5M2": ml_dtypes.float8_e5m2}


@pytest.fixture
def reader() -> Iterator[SourceReader]:
    with SourceReader(HubOptions()) as opened:
        yield opened


@pytest.fixture
def strict() -> Iterator[SourceReader]:
    with SourceReader(HubOptions(), findings=WeightFindings(strict=True)) as opened:
        yield opened


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("code", CODES)
def test_the_bits_of_each_dtype(code: str, value: float) -> None:
    kind: Any = CODES[code]
    numbers = np.array([0, -0.0, 1, -2.5, ml_dtypes.finfo(kind).max, ml_dtypes.finfo(kind).min], np.float64).astype(
        kind
    )
    assert not has_non_finite(memoryview(numbers.tobytes()), code)
    numbers[3] = value
    assert has_non_finite(memoryview(numbers.tobytes()), code)


def test_dtypes_of_their_own() -> None:
    assert has_non_finite(memoryview(b"\x00\xff"), "F8_E4M3") and not has_non_finite(memoryview(b"\x7e"), "F8_E4M3")
    assert not has_non_finite(memoryview(b"\xff" * 8), "I64")
    assert not has_non_finite(memoryview(b""), "F32")


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("cut", range(1, 17))
def test_pieces_that_end_within_a_number(cut: int, place: int) -> None:
    """No number is missed, whatever the pieces; and none is made up."""
    numbers = np.arange(6, dtype=np.float32)
    numbers[place] = np.nan
    content = numbers.tobytes()
    for start in range(len(content)):
        found: list[int] = []
        pieces = [memoryview(content)[at : min(at + cut, 24)] for at in range(start, 24, cut)]
        passed = scan_non_finite(
            iter(pieces), "F32", lambda found=found: found.append(1), before=content[start // 4 * 4 : start]
        )
        assert b"".join(map(bytes, passed)) == content[start:]
        assert bool(found) is (start < place * 4 + 4)


def lora(folder: Path, rows: int, width: int, **changes: Any) -> LoraPair:
    """An adapter of ones; `changes` are (index, value) of a factor."""
    shapes = {"a": (2, width), "b": (rows, 2), "magnitude": (rows,)}
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    for name, (index, value) in changes.items():
        tensors[name][index] = value
    return LoraPair(**save(folder, tensors), scaling=1.0)


def read(reader: SourceReader, *tensors: Any) -> bytes:
    shard = one_shard(tensors)
    return b"".join(map(bytes, shard_range(shard, 0, shard.nbytes, reader)))


@pytest.mark.parametrize("factor", ["a", "b", "magnitude"])
def test_factors(reader: SourceReader, strict: SourceReader, tmp_path: Path, factor: str) -> None:
    entry = save(tmp_path, {"w": np.ones((4, 6), np.float32)})["w"]
    pair = lora(tmp_path / "adapter", 4, 6, **{factor: (0, np.nan)})
    part = tensor(entry, Transform(source=entry, lora=pair), name="out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's own words would go to an actor's log
        read(reader, part)
    (line,) = reader.findings.lines
    assert line == f"out: NaN or infinity in the LoRA factor {factor} of {tmp_path}/adapter/model.safetensors"
    with pytest.raises(MergeFailed, match=rf"^out: NaN or infinity in the LoRA factor {factor} .*--strict refuses"):
        read(strict, part)


def test_weights_that_are_computed_with(reader: SourceReader, tmp_path: Path) -> None:
    weights = {"nan": np.array([[1, np.nan]]), "large": np.array([[1, 3.4e38]]), "sound": np.array([[1.0, 2.0]])}
    entries = save(tmp_path, {name: value.astype(np.float32) for name, value in weights.items()})
    read(reader, *(tensor(e, Transform(source=e, scale=2.0), name=f"out.{name}") for name, e in entries.items()))
    assert sorted(reader.findings.lines) == [
        f"out.large: NaN or infinity where it is made of large of {tmp_path}/model.safetensors: its numbers are too "
        "large for the dtype",
        f"out.nan: NaN or infinity in nan of {tmp_path}/model.safetensors",
    ]


def test_rows_without_length_under_dora(reader: SourceReader, strict: SourceReader, tmp_path: Path) -> None:
    """No magnitude can give them a length: they stay zero, and are no NaN. One of magnitude 0 is meant so."""
    weight = np.ones((4, 6), np.float32)
    weight[1:3] = -2
    entry = save(tmp_path, {"w": weight})["w"]
    pair = lora(tmp_path / "adapter", 4, 6)
    part = tensor(entry, Transform(source=entry, lora=pair), name="out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        content = read(reader, part)[-weight.nbytes :]
    found = np.frombuffer(content, np.float32).reshape(4, 6)
    np.testing.assert_allclose(found, np.repeat([[6**-0.5], [0], [0], [6**-0.5]], 6, axis=1), rtol=1e-6)
    (line,) = reader.findings.lines
    assert line.startswith("out: rows of length 0, to which the lora_magnitude_vector of ")
    with pytest.raises(MergeFailed, match="rows of length 0"):
        read(strict, part)
    meant = lora(tmp_path / "meant", 4, 6, magnitude=(slice(1, 3), 0.0))
    read(strict, tensor(entry, Transform(source=entry, lora=meant), name="out"))


def test_copies_are_looked_at_where_a_merge_is_strict(
    reader: SourceReader, strict: SourceReader, tmp_path: Path
) -> None:
    values = {name: np.ones((3, 5), BF16) for name in ("a", "b", "c")}
    values["b"][2, 4] = np.inf
    entries = save(tmp_path, values)
    parts = [tensor(entry) for entry in entries.values()]
    content = read(reader, *parts)
    assert reader.findings.lines == ()
    with pytest.raises(MergeFailed, match=rf"^b: NaN or infinity in b of {tmp_path}/model.safetensors, which --strict"):
        read(strict, *parts)
    shard = one_shard(parts)
    start = next(part.start for part in shard.parts if part.name == "b")
    for low, high in ((0, start), (start, start + 29), (start + 30, shard.nbytes)):
        assert b"".join(map(bytes, shard_range(shard, low, high, strict))) == content[low:high]
    with pytest.raises(MergeFailed, match=r"^b:"):  # from the middle of the number on
        list(shard_range(shard, start + 29, start + 30, strict))


def test_copies_side_by_side(strict: SourceReader, tmp_path: Path) -> None:
    values = {"a": np.ones((4, 3), np.float32), "b": np.ones((4, 2), np.float32)}
    values["b"][3, 1] = np.nan
    entries = save(tmp_path, values)
    matrices = one_shard([tensor(entries["a"])]).parts + one_shard([tensor(entries["b"])]).parts
    whole = tensor(entries["a"], Columns(matrices=matrices), name="out")
    with pytest.raises(MergeFailed, match="NaN or infinity in b of"):
        read(strict, type(whole)(**{**{f: getattr(whole, f) for f in whole.__dataclass_fields__}, "shape": (4, 5)}))


def test_many_findings_are_bounded() -> None:
    found = WeightFindings()
    for number in range(150):
        found.note(f"t{number % 120}", "NaN")
    assert found.lines == tuple(f"t{number}: NaN" for number in range(100))
    assert found.omitted == 20


@pytest.fixture
def broken(zoo: Callable[..., Path], tmp_path: Path) -> Path:
    """A model with NaN in one weight that a merge copies."""
    import torch
    from safetensors.torch import load_file

    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(zoo("llama", seed=1) / "model.safetensors")[name]
    weight[3, 2] = torch.nan
    return copy_model(zoo("llama", seed=1), tmp_path / "broken", tensors={name: weight})


def test_a_merge_of_a_broken_model(
    broken: Path, merge_in_process: Callable[..., Any], zoo: Callable[..., Path], tmp_path: Path
) -> None:
    """Copied without a look; computed with a warning; and with strict neither, before there is an index."""
    config = merge_config(zoo("llama"), [broken, zoo("llama", seed=2)], mode="random")
    assert merge_in_process(config, tmp_path / "copied").warnings == ()
    noisy = merge_config(
        zoo("llama"), [broken, zoo("llama", seed=2)], mode="random", expert_options={"noise_scale": 0.1}
    )
    (warning,) = merge_in_process(noisy, tmp_path / "noisy").warnings
    name = "model.layers.1.block_sparse_moe.experts.0.w3.weight"
    assert warning == f"{name}: NaN or infinity in model.layers.1.mlp.up_proj.weight of {broken}/model.safetensors"
    for kind, each in (("copied", config), ("noisy", noisy)):
        with pytest.raises(MergeFailed, match=rf"{name}: NaN or infinity in .*, which --strict refuses"):
            merge_in_process(each, tmp_path / f"strict-{kind}", MergeOptions(strict=True))
        assert not (tmp_path / f"strict-{kind}" / "model.safetensors.index.json").exists()


def test_a_strict_merge_of_sound_models(
    merge_in_process: Callable[..., Any], zoo: Callable[..., Path], tmp_path: Path
) -> None:
    """The same bytes; but it does not go on from shards that were not looked at, and its record says so."""
    from raymoe.checkpoints.open_checkpoint import open_checkpoint, read_object
    from raymoe.object_store.options import StorageOptions

    config = merge_config(zoo("llama"), [zoo("llama", seed=seed) for seed in (1, 2)], mode="random")
    merge_in_process(config, tmp_path / "a")
    merge_in_process(config, tmp_path / "b", MergeOptions(strict=True))
    records = [read_object(open_checkpoint(tmp_path / n, StorageOptions()), "raymoe.json", "", "") for n in "ab"]
    assert [record["options"].get("strict") for record in records] == [None, True]
    weights = [{n: f for n, f in record["files"].items() if n.endswith(".safetensors")} for record in records]
    assert weights[0] == weights[1]
    assert records[0]["plan_digest"] != records[1]["plan_digest"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_of_configs(zoo: Callable[..., Path], tmp_path: Path, number: float) -> None:
    base = copy_model(zoo("llama"), tmp_path / "base", config={"initializer_range": number})
    expert = copy_model(zoo("llama", seed=1), tmp_path / "expert", config={"time_step_limit": [0.0, float("inf")]})
    config = merge_config(base, [expert, zoo("llama", seed=2)], mode="random")
    said = f"base_model ({base}): initializer_range in its config.json is {'NaN' if number != number else 'inf'}"
    assert raymoe.plan(config).warnings == (said,)
    with pytest.raises(ProblemReport) as refused:
        raymoe.plan(config, MergeOptions(strict=True))
    assert str(refused.value).startswith(f"{said}, which --strict refuses\n    -> correct the number")
