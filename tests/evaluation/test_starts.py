"""What `raymoe eval` and `raymoe try` compute of merges with plain layers and with cut FFNs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raymoe.checkpoints.weight_table import CheckpointModel
from raymoe.evaluation.scoring import Variant
from raymoe.evaluation.token_routing import TokenRouting
from raymoe.report.eval_page import evaluation_page
from tests.architectures.pairs import MAX_DIFFERENCE, load_grafted, load_merged
from tests.evaluation.streamed import LENGTHS, assert_close, open_mixture, resident, streamed, texts_of
from tests.pico import HIDDEN, merge_config, merge_here, merge_without_ray

pytestmark = pytest.mark.engines

EXPERTS, LAYERS, PARTS = 3, 3, 4


@pytest.fixture
def merged(zoo: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, list[Path]]]:
    def merge(family: str, **keys: Any) -> tuple[Path, list[Path]]:
        base, *experts = (zoo(family, seed=seed) for seed in range(EXPERTS + 1))
        merge_without_ray(merge_config(base, experts, mode="random", **keys), tmp_path / "merged")
        return tmp_path / "merged", [base, *experts]

    return merge


def cut(folder: Path) -> CheckpointModel:
    """The mixture, with what its record says of its experts."""
    model = open_mixture(folder)
    assert model.rule is not None
    return replace(model, rule=replace(model.rule, granularity=PARTS))


@pytest.mark.parametrize(
    ("family", "layers"), [("qwen3", [1]), ("cohere2", "even"), ("lfm2", "1-2"), ("ernie4_5", "odd"), ("youtu", "1-2")]
)
def test_plain_layers(family: str, layers: Any, merged: Callable[..., tuple[Path, list[Path]]]) -> None:
    (folder, _), texts = merged(family, moe_layers=layers), texts_of()
    seen: set[int] = set()
    own = Variant(name="own", on_routing=lambda layer, text, experts, weights: seen.add(layer))
    found = streamed(model := open_mixture(folder), texts, own)["own"]
    assert model.rule is not None
    assert sorted(seen) == model.rule.moe_layers(LAYERS)
    assert_close(found, resident(load_merged(folder), texts), tolerance=MAX_DIFFERENCE)


def test_cut_experts_are_counted_by_source(merged: Callable[..., tuple[Path, list[Path]]]) -> None:
    (folder, (base, *experts)), texts = merged("qwen3", granularity=PARTS), texts_of()
    chosen = []

    def see(layer: int, text: int, sources: Any, weights: Any) -> None:
        assert sources.shape == weights.shape == (LENGTHS[text], 2)
        assert weights.sum(axis=1) == pytest.approx(1, abs=1e-5)
        assert (sources[:, 0] != sources[:, 1]).all()
        chosen.append(sources.max())

    own = [number % EXPERTS for number in range(len(LENGTHS))]
    variants = Variant(name="own", on_routing=see), Variant(name="oracle", forced=own)
    found = streamed(cut(folder), texts, *variants)
    assert max(chosen) == EXPERTS - 1
    assert_close(found["own"], resident(load_merged(folder), texts), tolerance=MAX_DIFFERENCE)
    models = [load_grafted(base, expert) for expert in experts]
    expected = [resident(models[number], [text])[0] for number, text in zip(own, texts, strict=True)]
    assert_close(found["oracle"], expected, tolerance=MAX_DIFFERENCE)


def test_a_step_begins_with_the_first_layer_that_has_experts() -> None:
    routing = TokenRouting(2, first_layer=1)
    for layer in (1, 2, 1, 2):
        routing.add(layer, np.array([[1], [1]]), np.ones((2, 1), np.float32))
    assert len(routing.shares_per_token(0)) == 4
    assert routing.shares(0) == ([0.0, 1.0], [0.0, 1.0])


def test_a_whole_evaluation_counts_experts_as_the_config_does(zoo: Callable[..., Path], tmp_path: Path) -> None:
    import raymoe

    base, *experts = (zoo("qwen3", seed=seed) for seed in range(EXPERTS + 1))
    keys = {"moe_layers": [1, 2], "experts_per_token": 1}
    texts = [{"label": str(number), "text": f"def area(radius): return {number} * radius"} for number in range(EXPERTS)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    found = []
    for parts in (1, PARTS):
        merge_here(merge_config(base, experts, granularity=parts, **keys), folder := tmp_path / str(parts))
        options: dict[str, Any] = {"against": "oracle,hidden", "experts_per_token": "1,2", "device": "cpu"}
        found.append(raymoe.evaluate(folder, tmp_path / "texts.jsonl", **options))
    whole, cut = found
    assert (cut["granularity"], cut["moe_layers"], cut["experts_per_token"]) == (PARTS, [1, 2], 1)
    assert np.shape(cut["routing"]["load"]) == (2, EXPERTS)
    for name in ("merged", "oracle"):
        assert cut["loss"][name] == pytest.approx(whole["loss"][name], abs=2e-5)
    for one, other in zip(whole["by_experts_per_token"], cut["by_experts_per_token"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5)
        # Its routers have as many rows as experts.
        rows = 2 * (PARTS - 1) * EXPERTS * HIDDEN
        assert other["active_parameters"] == one["active_parameters"] + rows
    assert "layer 2, " in evaluation_page(cut)
