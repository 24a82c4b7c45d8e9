"""docs/python.md: its code runs, in order, on models of a megabyte."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raymoe

PAGE = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")


def test_the_code_runs(
    zoo: Callable[..., Path],
    without_ray: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names: dict[str, Any] = {"BASE": str(zoo("llama"))}
    for seed, kind in enumerate(("law", "code"), 1):
        (tmp_path / kind).symlink_to(zoo("llama", seed=seed))
        names[kind.upper()] = str(tmp_path / kind)
    texts = [{"label": kind, "text": f"A text about {kind}."} for kind in ("law", "code")]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert "gate_mode | " in capsys.readouterr().out
    assert json.loads((tmp_path / "out/raymoe.json").read_text())["options"]["seed"] == 1


def test_every_function_and_exception_has_a_row() -> None:
    shown = set(re.findall(r"`(?:raymoe\.)?(\w+)`", "\n".join(re.findall(r"^\|.*", PAGE, flags=re.MULTILINE))))
    functions = {name for name in raymoe.__all__ if callable(value := getattr(raymoe, name)) and value.__name__ == name}
    results = {"Evaluation", "MergePlan", "MergeResult", "PushResult", "Verification"}
    others = {
        "EvaluationOptions",
        "GenerationOptions",
        "MergeConfig",
        "MergeOptions",
        "Problem",
        "RuntimeSettings",
        "load_config",
    }
    assert functions - others <= shown and results <= shown
