"""`raymoe edit`: what it says, what it shows before, and how it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pico import PROMPTS, merge_config, merge_here
from tests.runtime.in_process import in_this_process

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def old(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edit") / "old"
    base, *models = (zoo("llama", seed=seed) for seed in range(4))
    merge_here(merge_config(base, models, mode="hidden"), folder)
    return folder


def test_an_edit_says_what_it_does(old: Path, cli: Cli, zoo: Callable[..., Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[3]))
    changes = ("--add", zoo("llama", seed=5), "--prompts", prompts, "--remove", "1", "--replace", f"0={zoo('llama')}")
    shown = cli("edit", old, tmp_path / "new", *changes, "--dry-run")
    assert shown.code == 0, shown.err
    assert "old#2" in shown.out and "No errors found." in shown.out and not (tmp_path / "new").exists()
    assert "expert 2 is kept; expert 0 is replaced; expert 2 is added" in shown.err
    plain = cli("edit", old, tmp_path / "new", *changes, "--dry-run", "--json")
    assert plain.code == 0 and json.loads(plain.out)["architecture"] == "mixtral"
    with in_this_process():
        done = cli("edit", old, tmp_path / "new", *changes)
    assert done.code == 0, done.err
    assert "expert 2 is added; expert 1 is removed; router rows are computed anew" in done.err
    edit = json.loads((tmp_path / "new" / "raymoe.json").read_text())["edit"]
    assert [each["how"] for each in edit["experts"]] == ["replaced", "kept", "added"]
    assert (tmp_path / "new" / "result.json").exists()
    with in_this_process():
        assert cli("edit", tmp_path / "new", tmp_path / "kept", "--remove", "0", "--keep-routers", "--quiet").code == 0


def test_mistakes_are_told_at_once(old: Path, cli: Cli, tmp_path: Path) -> None:
    answer = cli("edit", old, tmp_path / "new", "--remove", "x", "--replace", "model", "--prompts", "a.txt")
    assert answer.code == 2 and not (tmp_path / "new").exists()
    for part in ("'x' is not the number of an expert", "'model' is not NUMBER=MODEL", "1 file is for an added model"):
        assert part in answer.err
    plan = cli("edit", old, tmp_path / "new", "--remove", "0", "--json")
    assert plan.code == 2 and "give --dry-run too" in plan.err and not (tmp_path / "new").exists()
    same = cli("edit", old, old, "--remove", "0", "--overwrite")
    assert same.code == 2 and "choose another output" in same.err


def test_experts_with_the_fewest_tokens_are_dropped(
    old: Path, cli: Cli, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "texts.jsonl"
    lines = [{"label": str(number), "text": text} for number, texts in enumerate(PROMPTS[:3]) for text in texts]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with in_this_process():
        answer = cli("prune", old, tmp_path / "new", "--data", data, "--drop", 1, "--device", "cpu", "--json")
    assert answer.code == 0, answer.err
    pruned = json.loads(answer.out)
    assert pruned["removed"] == [min(range(3), key=pruned["load"].__getitem__)] and len(pruned["load"]) == 3
    assert pruned["loss"]["before"].keys() == pruned["loss"]["after"].keys() == {"0", "1", "2", "mean"}
    record = json.loads((tmp_path / "new" / "raymoe.json").read_text())
    assert record["edit"]["routers"] == "kept" and len(record["config"]["experts"]) == 2
    with in_this_process():
        again = cli("prune", old, tmp_path / "new", "--data", data, "--keep", 2, "--device", "cpu")
    assert again.code == 0 and "removed" in again.out and "after" in again.out
    for wrong, what in (
        (("--keep", 3), "3 of 3 experts"),
        ((), "one of them is needed"),
        (("--drop", 3), "0 of 3 experts"),
        (("--keep", 1), "1 of 3 experts would stay, and 2 work on each token\n    -> let 2 of them stay"),
    ):
        answer = cli("prune", old, tmp_path / "none", "--data", data, "--device", "cpu", *wrong)
        assert answer.code == 2 and what in answer.err and not (tmp_path / "none").exists()
        assert "texts read" not in answer.err, "before any text is read"
    dense = cli("prune", zoo("llama"), tmp_path / "none", "--data", data, "--drop", 1)
    assert dense.code == 2 and "not a mixture that raymoe writes" in dense.err, dense.err
