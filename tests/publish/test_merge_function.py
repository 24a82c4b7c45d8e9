"""`raymoe.merge` with `push_to_hub` and `result`: what the command does, as one call with keyword arguments."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raymoe
from raymoe import workflows
from tests.pico import merge_config
from tests.publish.hub import WritableHub


@pytest.fixture
def arguments(zoo: Callable[..., Path], without_ray: None, tmp_path: Path) -> dict[str, Any]:
    config = merge_config(zoo("llama"), [zoo("llama", seed=1), zoo("llama", seed=2)], mode="random")
    return {**config, "out": tmp_path / "out", "out_shard_size": 300_000, "actors": 1}


def test_merge_and_push_in_one_call(hub: WritableHub, arguments: dict[str, Any], tmp_path: Path) -> None:
    report = str(tmp_path / "result.json")
    merged = raymoe.merge(**arguments, push_to_hub="org/name", private=True, message="First", result=report)
    assert merged.pushed is not None and "README.md" in merged.pushed.sent
    assert hub.written["org/name"].private and hub.history("org/name")[-1] == "First"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    told = json.loads(Path(report).read_text())
    assert told["exit_reason"] == "done" and not (tmp_path / "out/result.json").exists()
    again = raymoe.merge(**arguments, push_to_hub="org/name", private=True)
    assert again.was_complete and again.pushed is not None and again.pushed.sent == ()


def test_a_result_file_tells_of_a_refusal(arguments: dict[str, Any], tmp_path: Path) -> None:
    report = str(tmp_path / "result.json")
    with pytest.raises(raymoe.ProblemReport):
        raymoe.merge(**arguments | {"gate_mode": "ridge", "experts": []}, result=report)
    assert json.loads(Path(report).read_text())["exit_reason"] == "refused"
    with pytest.raises(TypeError, match="result or report"):
        raymoe.merge(**arguments, result=report, report=object())


def test_a_merge_that_another_one_replaced_is_not_pushed(
    hub: WritableHub, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the end of the merge and its push, another merge is written to the same folder."""
    real = workflows.run_merge

    def then_replaced(*given: Any, **options: Any) -> Any:
        result = real(*given, **options)
        raymoe.merge(**arguments | {"random_seed": 5}, overwrite=True)
        return result

    monkeypatch.setattr(workflows, "run_merge", then_replaced)

    with pytest.raises(raymoe.PushFailed, match="another merge has replaced this one"):
        raymoe.merge(**arguments, push_to_hub="org/name")

    assert [name for name in hub.files("org/name") if name.endswith(".safetensors")] == []
