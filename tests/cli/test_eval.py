"""`raymoe eval`: what it prints and writes, and how it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import raymoe
from tests.pico import merge_config, merge_here

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def merged(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of two experts, `code` and `law`, and texts for them beside it."""
    folder = tmp_path_factory.mktemp("eval")
    for number, name in enumerate(("base", "code", "law")):
        shutil.copytree(zoo("llama", seed=number), folder / name)
    merge_here(merge_config(folder / "base", [folder / "code", folder / "law"], mode="hidden"), folder / "out")
    merge_here(merge_config(folder / "base", [folder / "code", folder / "law"], mode="hidden_avg"), folder / "avg")
    texts = [("code", "def area(radius): return 3"), ("law", "You may reproduce the Work"), ("law", "The licensor")]
    lines = [json.dumps({"label": label, "text": text}) + "\n" for label, text in texts]
    (folder / "texts.jsonl").write_text("".join(lines))
    return folder


def test_a_table_a_page_and_numbers(merged: Path, tmp_path: Path) -> None:
    html, numbers = tmp_path / "page.html", tmp_path / "eval.json"
    arguments = ("--data", "texts.jsonl", "--json", numbers, "--html", html, "--device", "cpu", "--limit", 1)
    done = raymoe("eval", "avg", *arguments, cwd=merged)
    assert done.returncode == 0, done.stderr
    result = json.loads(numbers.read_text())
    assert result["model"] == "avg" and result["data"]["file"] == "texts.jsonl" and result["data"]["texts"] == 2
    experts = {"experts", "expert code", "expert law"}
    assert set(result["loss"]) == {"merged", "base", "average", "oracle", "hidden"} | experts
    for word in (
        "merged",
        "average",
        "oracle",
        "experts",
        "The best single expert (",
        "A plain average of the experts",
        "hidden",
        "code",
        "law",
        f"{result['loss']['base']['mean']:.3f}",
    ):
        assert word in done.stdout
    page = html.read_text()
    assert page.lstrip().lower().startswith("<!doctype html>") and "code" in page and "law" in page


def test_only_what_is_asked_for(merged: Path, cli: Cli, tmp_path: Path) -> None:
    numbers = tmp_path / "eval.json"
    asked = ("--against", "oracle", "--quiet", "--device", "cpu", "--label", "code=law", "--label", "law=1")
    answer = cli("eval", merged / "out", "--data", merged / "texts.jsonl", "--json", numbers, *asked)
    assert answer.code == 0 and answer.out == ""
    assert answer.err.startswith("warning: no text is for code") and answer.err.count("\n") == 1
    result = json.loads(numbers.read_text())
    assert [name for name, loss in result["loss"].items() if loss] == ["merged", "oracle"]
    assert [label["expert"] for label in result["data"]["per_label"].values()] == [1, 1]


def test_mistakes_are_told_together(merged: Path, cli: Cli, tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"label": "rust", "text": "fn main"}\nnot json\n')
    answer = cli("eval", merged / "out", "--data", data, "--against", "bse", "--max-tokens", 1)
    assert answer.code == 2 and answer.out == ""
    for part in ("did you mean base?", "--max-tokens: 1", "line 1: unknown label 'rust'", "line 2: not JSON"):
        assert part in answer.err


def test_files_that_can_not_be_written_are_refused_first(merged: Path, cli: Cli, tmp_path: Path) -> None:
    files = ("--json", tmp_path, "--html", tmp_path / "gone/page.html")
    answer = cli("eval", merged / "out", "--data", merged / "texts.jsonl", *files)
    assert answer.code == 2
    assert "this is a folder" in answer.err and "there is no such folder" in answer.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "texts.jsonl", "--device", "tpu"), "--device: there is no device 'tpu'"),
        (("--data", "texts.jsonl", "--device", "cuda"), "--device cuda: torch sees no GPU here"),
        (("--data", "texts.jsonl", "--device", "cuda:x"), "--device: there is no device 'cuda:x'"),
        (("--data", "texts.jsonl", "--device", "cuda:1"), "set CUDA_VISIBLE_DEVICES=1, and give cuda"),
        (("--data", "texts.jsonl", "--batch-size", "1"), "--batch-size: has no effect with --data"),
        (
            ("--tasks", "x", "--max-tokens", "9", "--text-field", "t"),
            "--max-tokens, --text-field: has no effect with",
        ),
    ],
)
def test_options_that_can_not_be(arguments: tuple[str, ...], message: str, merged: Path, cli: Cli) -> None:
    answer = cli("eval", merged / "out", *(merged / a if a.endswith("jsonl") else a for a in arguments))
    assert answer.code == 2 and message in answer.err, answer.err


def test_a_label_that_no_text_has(merged: Path, cli: Cli) -> None:
    answer = cli(
        *("eval", merged / "out", "--data", merged / "texts.jsonl", "--label", "rust=0", "--against", "none", "--quiet")
    )
    assert answer.code == 0 and "warning: --label rust=0: no text has the label 'rust'" in answer.err


def test_hidden_is_not_compared_with_itself(merged: Path) -> None:
    import raymoe as package

    texts = merged / "texts.jsonl"
    result = package.evaluate(merged / "out", texts, device="cpu", limit=1, max_tokens=16)
    assert result["loss"]["hidden"] is None and result["gap_closed"] is None
    assert package.evaluate(merged / "out", texts, against="none", device="cpu", limit=1)["loss"]["base"] is None
    with pytest.raises(package.errors.ProblemReport, match="'tpu'"):
        package.evaluate(merged / "out", texts, device="tpu")


def test_what_is_no_model(merged: Path, cli: Cli) -> None:
    for place in ("gone", "texts.jsonl"):
        assert cli("eval", merged / place, "--data", merged / "texts.jsonl").code == 2


def test_dense_models(merged: Path, cli: Cli, tmp_path: Path) -> None:
    numbers, page = tmp_path / "eval.json", tmp_path / "page.html"
    arguments = ("--data", merged / "texts.jsonl", "--device", "cpu", "--json", numbers, "--html", page)
    further = ("--against", f"law={merged / 'law'}", "--against", f"out={merged / 'out'}")
    answer = cli("eval", merged / "base", *arguments, *further)
    assert answer.code == 0, answer.err
    result = json.loads(numbers.read_text())
    assert list(result["loss"]) == ["model", "law", "out"] and list(result["data"]["per_label"]) == ["code", "law"]
    for name, loss in result["loss"].items():
        assert name in answer.out and all(f"{value:.3f} (" in answer.out for value in loss.values())
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")
    of_merge = cli("eval", merged / "out", *arguments, "--against", "base", *further, "--against", "average")
    assert of_merge.code == 0, of_merge.err
    found = json.loads(numbers.read_text())["loss"]
    assert {name for name, loss in found.items() if loss} == {"merged", "base", "average", "law", "out"}
    assert found["base"] == result["loss"]["model"] and found["out"] == found["merged"] == result["loss"]["out"]


def test_dense_models_have_no_experts(merged: Path, cli: Cli) -> None:
    asked = ("--against", "experts", "--against", "oracle,x=y", "--label", "code=0")
    answer = cli("eval", merged / "base", "--data", merged / "texts.jsonl", *asked)
    assert answer.code == 2 and answer.out == ""
    for part in ("experts: ", "is no merge", "--against oracle,x=y: the name has other", "--label: has no effect"):
        assert part in answer.err
