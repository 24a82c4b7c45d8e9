"""A finished merge is complete only as long as its local models are those that it was made of, wherever it lies."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raymoe.object_store.location import Location
from raymoe.sources.local_folder import recorded_sample, stat_file
from raymoe.storage.file_names import INDEX_NAME, RECORD_NAME, FinishedMerge
from raymoe.storage.outputs.output_checks import _newer_source_problems, rewritten_sources


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A link to one of two models of the same size, which are older than the merge."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode() * 10)
        os.utime(tmp_path / name / "model.safetensors", (1, 1))
    (tmp_path / "current").symlink_to("one")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RECORD_NAME).write_text("{}")
    return tmp_path


def said(models: Path, finished: FinishedMerge, location: str) -> list[str]:
    plan: Any = SimpleNamespace(side_files=(), sources=(SimpleNamespace(files=(file_of(models),)),))
    return [problem.what for problem in _newer_source_problems(plan, Location.of(location), finished)]


def file_of(models: Path) -> Any:
    return stat_file(str(models / "current/model.safetensors"))


def finished_of(**keys: Any) -> FinishedMerge:
    found = FinishedMerge.of({"plan_digest": "plan", "files": {INDEX_NAME: {"size": 2}}, **keys})
    assert found is not None
    return found


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_a_link_that_leads_to_an_older_model(models: Path, place: str) -> None:
    location = str(models / "out") if place == "folder" else "s3://bucket/out"
    file = file_of(models)
    finished = finished_of(local_files={file.location: recorded_sample(file)})
    os.utime(models / "one/model.safetensors")
    assert said(models, finished, location) == [], "only touched"
    (models / "current").unlink()
    (models / "current").symlink_to("two")
    (what,) = said(models, finished, location)
    assert what == f"the merge here was made of other sources than are there now: {file.location}"


def test_a_rewritten_file_of_the_same_sample_is_named(models: Path) -> None:
    """A change between the sampled blocks: what is said of it is not that it is complete, without more."""
    file = file_of(models)
    finished = finished_of(local_files={file.location: recorded_sample(file)})
    plan: Any = SimpleNamespace(side_files=(), sources=(SimpleNamespace(files=(file,)),))
    assert rewritten_sources(plan, Location.parse(models / "out"), finished) == []
    os.utime(models / "one/model.safetensors", (1 << 33, 1 << 33))
    assert rewritten_sources(plan, Location.parse(models / "out"), finished) == [file.location]
    assert rewritten_sources(plan, Location.of("s3://bucket/out"), finished) == []


@pytest.mark.parametrize("samples", [None, [], {"/elsewhere": 1}])
def test_a_record_without_samples_is_judged_by_times(models: Path, samples: Any) -> None:
    finished = finished_of(local_files=samples)
    assert said(models, finished, str(models / "out")) == []
    os.utime(models / "one/model.safetensors", (1 << 33, 1 << 33))
    assert len(said(models, finished, str(models / "out"))) == 1
    assert said(models, finished, "s3://bucket/out") == []
