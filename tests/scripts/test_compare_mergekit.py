"""scripts/compare_mergekit.py: what it does without mergekit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import compare_mergekit  # noqa: E402


def refuse(*_: Any) -> None:
    raise AssertionError("mergekit is not needed")


def test_experts_only_makes_the_experts_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare_mergekit, "mergekit_program", refuse)
    Path("config.yaml").write_text("base_model: base\nexperts:\n  - source_model: base+adapters/go\n")
    made = Path("experts/go")
    made.mkdir(parents=True)
    (made / "tokenizer_config.json").touch()  # an expert that is there stays
    monkeypatch.setattr(sys, "argv", ["compare_mergekit.py", "--config", "config.yaml", "--experts-only", "experts"])
    assert compare_mergekit.main() == 0
    assert capsys.readouterr().out == "experts/go is ready\n"
    assert sorted(path.name for path in Path().iterdir()) == ["config.yaml", "experts"]
