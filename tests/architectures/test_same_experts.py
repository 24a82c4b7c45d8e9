"""A merge of copies of one model computes what that model computes, whatever the routers say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import raymoe
from tests.architectures.pairs import MAX_DIFFERENCE, PAIRS, WINDOW, Pair, load_grafted, load_merged
from tests.pico import load_dense, logits_of, merge_without_ray, token_ids

pytestmark = pytest.mark.engines

TOKENS = 40
assert TOKENS > 3 * WINDOW

CASES = [pytest.param(pair, mode, id=f"{pair}-{mode}") for pair in PAIRS for mode in pair.modes]
SHARED = [pair for pair in PAIRS if pair.shared]


def assert_same_logits(pair: Pair, actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference."""
    assert expected.std() > 0.5, "logits of no size prove nothing"
    difference = (actual - expected).abs().max().item()
    assert difference < MAX_DIFFERENCE
    return difference


@pytest.mark.parametrize(("pair", "mode"), CASES)
def test_copies_of_one_model_compute_what_it_computes(
    pair: Pair,
    mode: str,
    zoo: Callable[..., Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """With each number of experts per token: the weights are the same, and only config.json tells."""
    pair.skip_where_unknown()
    dense, ids = zoo(pair.family, **pair.options), token_ids(TOKENS, rows=2)
    off = {"shared_options": {"residual_scale": 0.0}} if pair.shared else {}
    config = pair.config(dense, [dense] * 3, dense, mode=mode, **off)
    expected, folder, differences = logits_of(load_dense(dense), ids), tmp_path / "merged", []

    merge_without_ray({**config, "experts_per_token": pair.experts_per_token[0]}, folder)
    for per_token in pair.experts_per_token:
        plan = raymoe.plan({**config, "experts_per_token": per_token}, allow_all_same=True)
        (folder / "config.json").write_text(json.dumps(plan.config))
        differences.append(assert_same_logits(pair, logits_of(load_merged(folder), ids), expected))

    record_property("pair", str(pair))  # for the table in docs/families.md
    record_property("difference", max(differences))


@pytest.mark.parametrize("mode", ["hidden", "uniform_random"])
@pytest.mark.parametrize("pair", [p for p in SHARED if p.host == "deepseek"], ids=str)
def test_half_a_routed_and_half_a_shared_expert_make_the_model(
    pair: Pair, mode: str, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    dense, ids, half = zoo(pair.family), token_ids(TOKENS), {"residual_scale": 0.5}
    config = pair.config(dense, [dense] * 2, dense, mode=mode, expert_options=half, shared_options=half)

    merge_without_ray(config, tmp_path / "merged")

    assert_same_logits(pair, logits_of(load_merged(tmp_path / "merged"), ids), logits_of(load_dense(dense), ids))


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "ridge", "cheap_embed", "random"])
@pytest.mark.parametrize("pair", [p for p in SHARED if p.host == "qwen2_moe"], ids=str)
def test_a_gated_shared_expert_adds_its_sigmoid_share(
    pair: Pair, mode: str, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    pair.skip_where_unknown()
    dense, other = zoo(pair.family, **pair.options), zoo(pair.family, seed=4, **pair.options)
    ids = token_ids(TOKENS)

    plan = merge_without_ray(pair.config(dense, [dense] * 2, other, mode=mode), tmp_path / "merged")

    merged = load_merged(tmp_path / "merged")
    gates = [layer.mlp.shared_expert_gate.weight.detach() for layer in merged.model.layers]
    assert [tuple(gate.shape) for gate in gates] == [(1, plan.gates.hidden)] * plan.gates.layers
    if mode == "ridge":  # as long as the fit makes it
        assert all(gate.norm().item() > 0.1 for gate in gates)
    else:
        assert all(gate.norm().item() == pytest.approx(1.0, abs=1e-5) for gate in gates)
    expected = logits_of(load_grafted(dense, dense, other, gates), ids)
    assert_same_logits(pair, logits_of(merged, ids), expected)
    assert (expected - logits_of(load_dense(dense), ids)).abs().max() > 0.1
