"""What a notebook shows: results as small tables, of escaped text, and one line of progress."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raymoe
from raymoe.html_repr import html_table
from raymoe.progress_line import ProgressLine
from raymoe.results import MergeResult, PushResult, Verification
from raymoe.storage.file_names import FileRecord
from tests.pico import merge_config
from tests.report.synthetic import synthetic_evaluation

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e" + "x" * 1000


def result_of(**changes: Any) -> MergeResult:
    files = (FileRecord(name="a.safetensors", size=1500, checksum="xxh3:0"),)
    values: dict[str, Any] = {
        "model_type": "mixtral",
        "output": "out",
        "files": files,
        "warnings": (),
        "bytes_written": 1500,
        "bytes_copied_by_store": 0,
        "bytes_kept": 0,
        "peak_driver_bytes": 2_000_000,
        "peak_actor_bytes": (3_000_000, 4_000_000),
        "peak_gpu_bytes": (),
        "seconds": 1.0,
        "run_seconds": 2.0,
    }
    return MergeResult(**values | changes)


def shown() -> list[Any]:
    """Results whose text is hostile, and long."""
    lines = tuple(f"{number} {HOSTILE}" for number in range(500))
    pushed = PushResult(url=HOSTILE, commit="c", commit_url=HOSTILE, sent=("a",), unchanged=(), removed=lines)
    of_texts = raymoe.Evaluation(synthetic_evaluation(experts=30) | {"model": HOSTILE, "warnings": list(lines)})
    metrics = {HOSTILE: {"value": 0.5, "stderr": None}}
    of_tasks = raymoe.Evaluation({"model": HOSTILE, "tasks": {name: {"metrics": metrics} for name in lines}})
    return [
        result_of(output=HOSTILE, warnings=lines, router_lines=lines, pushed=pushed),
        Verification(tensors=3, differences=lines, notes=lines),
        pushed,
        of_texts,
        of_tasks,
    ]


@pytest.mark.parametrize("value", shown(), ids=lambda value: type(value).__name__)
def test_html_is_escaped_and_bounded(value: Any) -> None:
    html = value._repr_html_()
    assert len(html) < 100_000
    assert "<script" not in html and "\x1b" not in html and "\u202e" not in html
    assert "more</td>" in html
    # Colors are the page's: it is light or dark.
    assert set(re.findall(r"(?:color|background):([^;\"]+)", html)) <= {"inherit", "transparent"}


def test_a_plan(zoo: Callable[..., Path]) -> None:
    plan = raymoe.plan(**merge_config(zoo("llama"), [zoo("llama", seed=1), zoo("llama", seed=2)], mode="random"))
    assert repr(plan).startswith("MergePlan(mixtral, 2 experts, ") and len(repr(plan)) < 200
    assert plan.digest[:12] in repr(plan)
    html = plan._repr_html_()
    assert "Plan of a mixtral merge" in html and str(zoo("llama", seed=2)) in html and len(html) < 10_000


def test_text_of_results_is_short() -> None:
    assert repr(result_of()) == "MergeResult('out', 1 file, 1.5 kB, 2 s)"
    assert repr(result_of(warnings=("a",), was_complete=True)) == (
        "MergeResult('out', 1 file, 1.5 kB, complete before, 1 warning)"
    )
    verified = Verification(tensors=3, differences=())
    assert repr(verified) == "Verification('verified: 3 tensors equal to what the sources give, byte for byte')"
    assert repr(Verification(tensors=3, differences=("a", "b"))) == "Verification('NOT verified: 2 differences')"
    found = raymoe.Evaluation(synthetic_evaluation())
    assert repr(found).startswith("Evaluation(") and len(repr(found)) < 200
    assert found == synthetic_evaluation()
    assert "mean</th>" in found._repr_html_()


def test_a_table_says_how_much_it_leaves_out() -> None:
    html = html_table("t", [("a", *range(30))] * 25)
    assert "and 5 more" in html and "...</td>" in html and html.count("<tr>") == 21


class Handle:
    def __init__(self, outputs: list[str], bundle: dict[str, str]) -> None:
        self._outputs = outputs
        outputs.append(bundle["text/plain"])

    def update(self, bundle: dict[str, str], *, raw: bool) -> None:
        self._outputs[-1] = bundle["text/plain"]


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_in_a_notebook_is_one_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], quiet: bool
) -> None:
    outputs: list[str] = []
    display = types.SimpleNamespace(display=lambda bundle, raw, display_id: Handle(outputs, bundle))
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "IPython.display", display)  # type: ignore[arg-type]
    with ProgressLine(str, total=20, quiet=quiet) as line:
        line.stage("writing", 20)
        for _ in range(20):
            line.add(1)
    assert [text.rpartition("| ")[2].partition(", ")[0] for text in outputs] == ([] if quiet else ["100% (20 of 20"])
    assert capfd.readouterr().err == ""
