"""An evaluation on a terminal: all figures, the best marked, never wider than 100 columns."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from rich.cells import cell_len

from raymoe.report.eval_table import print_evaluation
from tests.report.synthetic import synthetic_evaluation


def printed(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    print_evaluation(result)
    return capsys.readouterr().out


@pytest.mark.parametrize("experts", [2, 4, pytest.param(16, marks=pytest.mark.slow)])
def test_fits_and_names_everything(experts: int, capsys: pytest.CaptureFixture[str]) -> None:
    result = synthetic_evaluation(experts, 12)
    text = printed(result, capsys)
    assert max(cell_len(line) for line in text.splitlines()) <= 100
    for label, own in result["data"]["per_label"].items():
        assert f"{result['routing']['confusion'][label][own['expert']]:.0%}*" in text
        for model in result["loss"]:
            assert f"{result['loss'][model][label]:.3f} (" in text
    assert f"{result['gap_closed']:.0%} of the gap from hidden to oracle is closed" in text


def test_a_narrow_terminal_has_the_mean_in_the_first_block(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymoe.report.eval_table._WIDTH", 60)
    heads = re.findall(r"^model +(\S.*)$", printed(synthetic_evaluation(4, 8), capsys), re.MULTILINE)
    assert [head.split()[0] for head in heads] == ["mean", "metamath", "dictionary"], heads


def test_lowest_of_a_column_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    result = synthetic_evaluation(2, 8)
    result["loss"]["merged"]["go"] = 0.5
    lines = printed(result, capsys).splitlines()
    marked = {line.split("  ")[0]: re.findall(r"[\d.]+ \([\d.]+\)\*", line) for line in lines if ")*" in line}
    assert marked["merged"] == ["0.500 (1.65)*"]
    assert set(marked) == {"merged", "expert metamath", "experts", "2 (config)"}, "metamath's own, the mean; by top-k"


def test_experts_alone_are_a_reference(capsys: pytest.CaptureFixture[str]) -> None:
    result = synthetic_evaluation(2, 8)
    loss = result["loss"]
    del loss["experts"]  # as in files of older versions
    loss["expert go"] |= {"go": 1.5, "metamath": 9.0}
    loss["expert metamath"] |= {"go": 9.0, "metamath": 2.0}
    loss["merged"]["mean"] = 2.0
    assert "Each expert alone, on its own label: mean 1.750; the merge: 2.000 (+0.250)" in printed(result, capsys)
    del loss["expert go"]
    assert "Each expert alone" not in printed(result, capsys), "one of two says nothing of the mean"


def test_references_that_a_merge_has_to_beat(capsys: pytest.CaptureFixture[str]) -> None:
    result = synthetic_evaluation(2, 8)
    loss = result["loss"]
    loss["merged"]["mean"], loss["average"]["mean"] = 2.0, 1.875
    loss["expert go"]["mean"], loss["expert metamath"]["mean"] = 2.5, 2.75
    said = printed(result, capsys)
    assert "The best single expert (go): mean 2.500; the merge: 2.000 (-0.500)" in said
    assert "A plain average of the experts: mean 1.875; the merge: 2.000 (+0.125)" in said
    loss["expert go"], loss["average"] = None, None
    said = printed(result, capsys)
    assert "best single" not in said and "average" not in said, "the best of all is not known"


def test_further_models_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    result = synthetic_evaluation(2, 8)
    result["loss"]["mine"] = {"go": 1.25, "metamath": 2.25, "mean": 1.75}
    result["compared"] = {"mine": "org/model"}
    said = printed(result, capsys)
    assert re.search(r"^mine +1\.750 \(5\.75\).? +1\.250 \(3\.49\).? +2\.250 \(9\.49\)", said, re.M)
    assert "mine: org/model" in said


def test_weakest_layers_and_load(capsys: pytest.CaptureFixture[str]) -> None:
    result = synthetic_evaluation(2, 4)
    result["routing"]["first_accuracy"] = [0.9, 0.25, 0.5, 0.75]
    result["routing"]["load"] = [[0.5, 0.5], [0.2, 0.8], [0.5, 0.5], [0.4, 0.6]]
    text = printed(result, capsys)
    assert "weakest layers, by first choice: 1 (25%), 2 (50%), 3 (75%)" in text
    assert re.search(r"^go +40\.0% +20\.0% +50\.0% +0$", text, re.M)
    assert re.search(r"^metamath +60\.0% +50\.0% +80\.0% +1$", text, re.M)


def test_what_was_not_asked_for_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    result = synthetic_evaluation(2, 8)
    result["loss"] = {
        "merged": result["loss"]["merged"],
        "base": {"go": 2.5, "metamath": None, "mean": None},
        "oracle": None,
    }
    result |= {"gap_closed": None, "warnings": ["[few] tokens"]}
    text = printed(result, capsys)
    assert "oracle" not in text
    assert "hidden" not in text
    assert re.search(r"^base +- +2\.500 \(12\.2\)\S? +-$", text, re.M)
    assert "warning: [few] tokens" in text


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    result = synthetic_evaluation(2, 4)
    print_evaluation(result, as_json=True)
    assert json.loads(capsys.readouterr().out) == result
