"""Models that are kept from run to run are those that transformers makes, whatever tests do to them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests import kept_models
from tests.cli.commands import hashes
from tests.kept_models import make_model
from tests.pico import save_model

OPTIONS: dict[str, Any] = {"seed": 3, "dtype": "bfloat16", "rope_parameters": {"rope_type": "linear", "factor": 2.0}}


def test_a_kept_model_is_the_same_and_cannot_be_spoilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    made = hashes(save_model(tmp_path / "made", "llama", **OPTIONS))
    assert hashes(make_model(tmp_path / "first", kept, "llama", OPTIONS)) == made
    (tmp_path / "first/config.json").write_text("{}")
    monkeypatch.setattr(kept_models, "_save", None)  # it is not made again
    for name in ("second", "third"):
        assert hashes(make_model(tmp_path / name, kept, "llama", OPTIONS)) == made
        (tmp_path / name / "config.json").write_text("{}")


def test_other_options_are_another_model(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    models = [make_model(tmp_path / str(seed), kept, "llama", {**OPTIONS, "seed": seed}) for seed in (1, 2)]
    assert hashes(models[0])["model.safetensors"] != hashes(models[1])["model.safetensors"]
    assert hashes(models[0])["config.json"] == hashes(models[1])["config.json"]


def test_a_few_versions_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        monkeypatch.setattr(kept_models, "_version", lambda number=number: f"version {number}")
        folder = kept_models._of_this_version(tmp_path)
        os.utime(folder, (number, number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version 3", "version 4", "version 5"]
