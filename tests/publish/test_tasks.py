"""`raymoe eval --tasks`: tasks of one's own, from local files, run by lm-evaluation-harness on a merge, offline."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.cli.commands import raymoe as command
from tests.cli.conftest import Answer

Cli = Callable[..., Answer]
has_harness = importlib.util.find_spec("lm_eval") is not None
pytestmark = pytest.mark.engines

needs_harness = pytest.mark.skipif(not has_harness, reason="the extra lm-eval is not installed")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task of three questions with two answers each."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": "The licensor grants you a", "choices": ["copyright licence", "pinch of salt"], "gold": 0},
        {"question": "Add two eggs, stir, and", "choices": ["reproduce", "bake for an hour"], "gold": 1},
        {"question": "for i in range(10):", "choices": ["print(i)", "the river"], "gold": 0},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "two_ways",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 2.0},
    }
    (folder / "two_ways.yaml").write_text(yaml.safe_dump(task))
    return folder


def environment(home: Path) -> dict[str, str]:
    import os

    return {**os.environ, **OFFLINE, "HF_HOME": str(home)}


@needs_harness
@pytest.mark.parametrize("by", ["name", "file"])
def test_a_task_of_ones_own(merged: Path, tasks: Path, tmp_path: Path, by: str) -> None:
    named = ["two_ways", "--include-path", tasks] if by == "name" else [tasks / "two_ways.yaml"]
    numbers = tmp_path / "scores.json"
    done = command(
        "eval", merged, "--tasks", *named, "--json", numbers, "--limit", 2, "--device", "cpu", env=environment(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    task = json.loads(numbers.read_text())["tasks"]["two_ways"]
    assert (task["version"], task["samples"], task["fewshot"]) == (2.0, 2, 0)
    assert task["metrics"]["acc"]["value"] == expected_accuracy(merged, tasks, 2)
    assert "two_ways" in done.stdout and f"{task['metrics']['acc']['value']:.4f}" in done.stdout


def expected_accuracy(model: Path, tasks: Path, count: int) -> float:
    """The same, computed with transformers alone: the answer with the higher log-likelihood after the question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    right = 0
    for line in (tasks / "questions.jsonl").read_text().splitlines()[:count]:
        row = json.loads(line)
        scores = []
        for choice in row["choices"]:
            start = tokenizer(row["question"], return_tensors="pt").input_ids
            whole = tokenizer(f"{row['question']} {choice}", return_tensors="pt").input_ids
            with torch.inference_mode():
                logs = network(whole).logits[0].float().log_softmax(-1)
            places = range(start.shape[1], whole.shape[1])
            scores.append(math.fsum(logs[n - 1, whole[0, n]].item() for n in places))
        if scores.index(max(scores)) == row["gold"]:
            right += 1
    return right / count


@needs_harness
def test_a_task_that_fails(merged: Path, tasks: Path, tmp_path: Path) -> None:
    (tasks / "questions.jsonl").write_text('{"question": "no choices"}\n')
    done = command("eval", merged, "--tasks", "two_ways", "--include-path", tasks, env=environment(tmp_path))
    assert done.returncode == 1
    assert "error: the harness stopped at tasks two_ways: " in done.stderr


@needs_harness
def test_unknown_tasks(merged: Path, tasks: Path, cli: Cli) -> None:
    refused = cli("eval", merged, "--tasks", "two_way,hellaswagg", "--include-path", tasks)
    assert refused.code == 2
    assert "there is no task 'two_way'\n      -> did you mean two_ways?" in refused.err
    assert "there is no task 'hellaswagg'\n      -> did you mean hellaswag?" in refused.err


def test_refused(merged: Path, zoo: Callable[..., Path], cli: Cli, tmp_path: Path) -> None:
    for arguments, said in (
        ([], "nothing to evaluate on"),
        (["--tasks", "x", "--data", "y"], "--data and --tasks are two evaluations"),
        (["--tasks", "x", "--html", "page.html"], "--html: has no effect with --tasks"),
        (["--data", "x", "--fewshot", "2"], "--fewshot: has no effect with --data"),
        (["--tasks", "x", "--include-path", tmp_path / "no"], "there is no such folder"),
        (["--tasks", "no.yaml"], "there is no file no.yaml"),
        (["--tasks", "x", "--limit", "-1"], "--limit: -1 is too small"),
        (["--tasks", " , "], "no task is named"),
    ):
        refused = cli("eval", merged, *arguments)
        assert (refused.code, refused.out) == (2, ""), arguments
        assert said in refused.err and " -> " in refused.err
    assert "there is no such folder" in cli("eval", tmp_path / "no", "--tasks", "x").err


def test_without_the_harness(merged: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is where the extra was not installed."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused = cli("eval", merged, "--tasks", "hellaswag")
    assert refused.code == 2
    assert "not installed\n    -> pip install 'lm-eval>=" in refused.err
