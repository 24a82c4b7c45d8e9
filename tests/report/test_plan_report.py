"""A plan on a terminal: nothing of it is cut, whatever the width."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import raymoe
from raymoe.report.plan_report import print_plan
from tests.pico import merge_config
from tests.report.terminals import Terminal

NAME = "a-model-with-a-name-that-does-not-fit-into-a-narrow-terminal-and-not-into-a-usual-one-either"


@pytest.fixture
def plan(zoo: Callable[..., Path], tmp_path: Path) -> raymoe.MergePlan:
    experts = [tmp_path / f"{NAME}-{number}" for number in range(2)]
    for seed, expert in enumerate(experts, 1):
        expert.symlink_to(zoo("llama", seed=seed))
    return raymoe.plan(merge_config(zoo("llama"), experts, mode="random"))


@pytest.mark.parametrize("width", [40, 80, 160])
def test_names_are_whole(plan: raymoe.MergePlan, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal.install(monkeypatch, "stdout", width)
    print_plan(plan, as_json=False)
    text = re.sub("\x1b\\[[0-9;]*m", "", screen.getvalue())
    rows = [line for line in text.splitlines() if not line.startswith("  ")]
    assert all(len(line) <= width for line in rows) and "\N{HORIZONTAL ELLIPSIS}" not in text
    models = text.partition("writes")[2].partition("router")[0]
    names = "".join(re.sub(r"expert \d|base|[\d.]+ [kM]B", "", models).split())
    assert f"{NAME}-0" in names and f"{NAME}-1" in names


def test_folders_below_the_current_one_are_relative(
    plan: raymoe.MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    print_plan(plan, as_json=False)
    said = capsys.readouterr().out
    assert f"expert 1  {NAME}-1 " in said and str(tmp_path) not in said
