"""Names that Ray, a terminal or UTF-8 can't take as they are: of folders, models, adapters and files of prompts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymoe.runtime.ray_metrics import METRICS, MergeMetrics, ray_text
from raymoe.storage.file_names import RECORD_NAME
from tests.cli.commands import write_config
from tests.pico import copy_model, merge_config, save_lora
from tests.runtime.in_process import in_this_process

UMLAUT, HAN = "ausgabe-ü", "用户 😀"
NOT_UTF8 = os.fsdecode(b"out-\xff")


@pytest.fixture
def config(zoo: Callable[..., Path], tmp_path: Path) -> Path:
    """Of a base, an expert, an adapter and a file of prompts with such names."""
    models = [copy_model(zoo("llama", seed=seed), tmp_path / HAN / f"mödel {seed}") for seed in (0, 1)]
    lora = save_lora(tmp_path / HAN / "адаптер", models[0], ["down_proj"])
    content = merge_config(models[0], [models[1], f"{models[0]}+{lora}"], mode="cheap_embed")
    prompts = tmp_path / HAN / "prömpts.txt"
    prompts.write_text("func main() {\npackage main\n", encoding="utf-8")
    content["experts"][0]["positive_prompts"] = {"file": str(prompts)}
    return write_config(tmp_path / HAN / "cönfig.yaml", content)


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.soak) for name in (UMLAUT, NOT_UTF8)), f"{HAN}/out"]
)
def test_outputs_and_sources_of_any_name(
    cli: Callable[..., Any], ray_merge: Callable[..., Any], config: Path, tmp_path: Path, name: str
) -> None:
    out, result = tmp_path / name, tmp_path / "läuft.json"
    assert cli("plan", config, out).code == 0
    done = cli("merge", config, out, "--actors", "1", "--result", result)
    assert done.code == 0, done.err
    assert "no metrics" not in done.err
    assert json.loads(result.read_text(encoding="utf-8"))["exit_reason"] == "done"
    assert (out / RECORD_NAME).is_file() and not (out / ".raymoe").exists()
    with in_this_process():
        assert cli("verify", out).code == 0
    assert cli("inspect", out).code == 0
    assert cli("try", out, "ü用户", "--max-new-tokens", "1", "--device", "cpu").code == 0


def test_tags() -> None:
    assert ray_text("out") == "out" and ray_text("ü用\udcff") == "\\xfc\\u7528\\udcff"


def test_no_metric_ends_a_merge(
    zoo: Callable[..., Path], local_ray: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever Ray objects to, when they are made or later: told once."""
    import raymoe

    plan = raymoe.plan(merge_config(zoo("llama"), [zoo("llama", seed=1), zoo("llama", seed=2)], mode="random"))

    class Outcome:
        shard_results = away = ()

    metrics = MergeMetrics(plan, "out")
    assert metrics._metrics.keys() == METRICS.keys()

    def refuse(*_: object, **__: object) -> None:
        raise UnicodeEncodeError("ascii", "ü", 0, 1, "ordinal not in range(128)")

    monkeypatch.setattr("ray.util.metrics.Gauge.set", refuse)
    metrics.record([], Outcome())  # type: ignore[arg-type]
    metrics.record([], Outcome())  # type: ignore[arg-type]
    assert caplog.text.count("no metrics of this merge") == 1
    MergeMetrics(plan, "out").record([], Outcome())  # type: ignore[arg-type]
    assert caplog.text.count("no metrics of this merge") == 2
