"""docs/config.md shows what the code does: its examples load, and its report is the real one."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from raymoe.config import ExpertConfig, MergeConfig, parse_config
from raymoe.config.storage_block import _TYPES
from raymoe.errors import ProblemReport
from raymoe.object_store.options import StorageOptions
from tests.pico import merge_config

PAGE = (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")


def blocks(info: str) -> list[str]:
    return re.findall(rf"^```{re.escape(info)}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_examples_load() -> None:
    assert len(blocks("yaml")) >= 5
    for text in blocks("yaml"):
        parse_config(text, name="example.yaml", allow_all_same=True)


def test_report_is_the_real_one() -> None:
    (text,), (report,) = blocks("yaml broken.yaml"), blocks("text report")
    with pytest.raises(ProblemReport) as caught:
        parse_config(text, name="broken.yaml")
    assert str(caught.value) == report.rstrip("\n")


def test_every_key_has_a_row() -> None:
    for key in {*MergeConfig.model_fields, *ExpertConfig.model_fields}:
        assert re.search(rf"^\| \[`{key}`\]", PAGE, flags=re.MULTILINE), key


def test_every_storage_setting_has_a_type_and_two_rows() -> None:
    names = {field.name for field in dataclasses.fields(StorageOptions)}
    assert set(_TYPES) == names
    for page in (PAGE, (Path(__file__).parents[2] / "docs" / "object-storage.md").read_text(encoding="utf-8")):
        first_cells = "".join(re.findall(r"^\| (`[^|]*) \|", page, flags=re.MULTILINE))
        assert [name for name in names if f"`{name}`" not in first_cells] == []


def test_python_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zoo: Callable[..., Path], without_ray: None
) -> None:
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"label": label, "text": f"some text of {label}"}) + "\n" for label in ("0", "1"))
    )
    config = merge_config(zoo("llama"), [zoo("llama", seed=1), zoo("llama", seed=2)], mode="cheap_embed")
    (tmp_path / "merge.yaml").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    merges, of_configs = blocks("python")
    for text in (merges, of_configs):
        exec(compile(text, "config.md", "exec"), {})
    assert (tmp_path / "out/raymoe.json").is_file()
