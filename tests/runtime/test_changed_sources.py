"""Sources that are written after their headers were read, at any time until the merge is over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import raymoe
from raymoe.config import make_config
from raymoe.errors import MergeFailed, ProblemReport
from raymoe.planning import MergePlan
from raymoe.report.merge_description import MergeDescription
from raymoe.runtime.coordinator import _invalidate_on_source_change, open_target, output_problems, run_merge
from raymoe.runtime.placement import FileRequirements, Node, Placement, view_files
from raymoe.runtime.settings import RuntimeSettings
from raymoe.runtime.source_files import SourceFiles, SourcesChanged
from tests.pico import merge_config

SETTINGS = RuntimeSettings(verbosity=-1)


@pytest.fixture
def models(zoo: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """A base and two experts that may be written to."""
    return [Path(shutil.copytree(zoo("llama", seed=seed), tmp_path / f"m{seed}")) for seed in range(3)]


def config_of(models: list[Path]) -> Any:
    return merge_config(models[0], models[1:], mode="random")


def plan_of(models: list[Path]) -> MergePlan:
    return raymoe.plan(config_of(models), allow_all_same=True)


def save_again(file: Path, source: Path | None = None) -> None:
    """The same size, as a save of the same model has it; with the old file's time, as a copy may set it."""
    status, new = file.stat(), file.with_name("new")
    new.write_bytes((source or file).read_bytes())
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(new, file)


def whats(plan: MergePlan, output: Path) -> list[str]:
    return [problem.what for problem in output_problems(plan, open_target(output, SETTINGS), SETTINGS)]


def test_written_before_the_merge_begins(models: list[Path], tmp_path: Path) -> None:
    """Between planning and the start Ray comes up, which takes a while: the header that was read is of the old file."""
    plan = plan_of(models)
    assert whats(plan, tmp_path / "out") == []
    save_again(models[1] / "model.safetensors", models[2] / "model.safetensors")
    expected = f"files were written after the merge was planned with them: {models[1]}/model.safetensors"
    assert whats(plan, tmp_path / "out") == [expected]
    config = make_config(config_of(models), allow_all_same=True)
    description = MergeDescription(plan=plan, config=config, hub=SETTINGS.hub)
    with pytest.raises(ProblemReport, match="written after the merge was planned"):
        run_merge(plan, description, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_small_files_count_by_their_content(models: list[Path], tmp_path: Path) -> None:
    """A tokenizer that is mended makes another merge, whatever its time; one that is only touched does not."""
    plan, tokenizer = plan_of(models), models[0] / "tokenizer.json"
    os.utime(tokenizer, ns=(5, 5))
    save_again(tokenizer)
    assert whats(plan, tmp_path / "out") == []
    assert plan_of(models).digest == plan.digest
    mended = tokenizer.read_bytes().replace(b"</s>", b"</t>")
    status = tokenizer.stat()
    tokenizer.write_bytes(mended)
    os.utime(tokenizer, ns=(status.st_atime_ns, status.st_mtime_ns - 1))
    assert whats(plan, tmp_path / "out") == [f"files were written after the merge was planned with them: {tokenizer}"]
    assert plan_of(models).digest != plan.digest


def test_times_are_no_part_of_the_digest(models: list[Path]) -> None:
    """A merge goes on after its models were copied to another disk and back: the journal has its own word on times."""
    plan = plan_of(models)
    os.utime(models[0] / "model.safetensors", ns=(5, 5))
    again = plan_of(models)
    assert again.digest == plan.digest
    assert again == plan


def test_written_while_it_is_merged(models: list[Path]) -> None:
    sources = SourceFiles(plan_of(models), None)
    sources.check_unchanged()
    save_again(models[2] / "model.safetensors")
    with pytest.raises(MergeFailed, match=r"source files changed while they were merged: .*m2/model.safetensors\. The"):
        sources.check_unchanged()


def test_written_on_another_node(models: list[Path]) -> None:
    """A node's own copy has its own time. It is compared with what that node said before."""
    plan = plan_of(models)
    needs = FileRequirements(plan)
    file = models[2] / "model.safetensors"

    def ask(*, copied: bool) -> Placement:
        views = view_files(needs.files)
        other = {loc: replace(v, mtime_ns=v.mtime_ns + 1 if copied else v.mtime_ns) for loc, v in views.items()}
        nodes = [
            Node(node_id=name, name=name, cpus=1, gpus=0, free={}, files=files)
            for name, files in {"here": views, "there": other}.items()
        ]
        return Placement(needs, nodes, "here")

    before = ask(copied=True)
    assert before.changed() == [] and ask(copied=True).changed(before) == []
    assert ask(copied=False).changed(before) == sorted(f.location for f in needs.files)
    save_again(file)
    assert ask(copied=True).changed() == [str(file)]  # the node that planned has another file now


def test_a_failure_is_put_down_to_it(models: list[Path]) -> None:
    """The file is named, whatever an actor ends with when a file is written under it. Other failures are left alone."""
    sources = SourceFiles(plan_of(models), None)
    with pytest.raises(MergeFailed, match="its actor died"), sources.explain_failures():
        raise MergeFailed("its actor died")
    os.truncate(models[1] / "model.safetensors", 100)
    with (
        pytest.raises(MergeFailed, match=r"changed while they were merged: .*m1/model.safetensors"),
        sources.explain_failures(),
    ):
        raise MergeFailed("its actor died")


def test_what_a_spoilt_merge_has_written_is_not_gone_on_with(tmp_path: Path) -> None:
    target = open_target(tmp_path / "out", SETTINGS)
    target.lock()
    target.begin("plan", {}, fresh=False)
    with pytest.raises(SourcesChanged), _invalidate_on_source_change(target):
        raise SourcesChanged("source files changed")
    target.write_small("config.json", b"{}")
    target.release()
    again = open_target(tmp_path / "out", SETTINGS)
    again.lock()
    again.begin("plan", {}, fresh=False)
    assert again.finished("config.json", 2) is None  # type: ignore[attr-defined]
    again.release()
