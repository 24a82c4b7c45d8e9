"""docs/config.md shows what the code does: its examples load, and its report is the real one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from raymoe.config import ExpertConfig, MergeConfig, parse_config
from raymoe.errors import ProblemReport

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


def test_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "merge.yaml").write_text(blocks("yaml")[0])
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[0], "config.md", "exec"), {})
