"""Starts for training as `raymoe merge` writes them: with the record, the card, and what `raymoe verify` finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import raymoe
from raymoe.report.start_lines import start_lines
from tests.pico import merge_config, merge_here, merge_without_ray, tensors_of
from tests.runtime.in_process import in_this_process


def test_a_start_with_everything(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base, *experts = (zoo("qwen3", seed=seed) for seed in range(3))
    keys = {"moe_layers": [0, 1], "granularity": 2, "reinit": 0.25}
    config = merge_config(base, experts, mode="ridge", **keys)

    merge_here(config, tmp_path / "out")

    merge_without_ray(config, tmp_path / "again")
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "again")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    with in_this_process():
        assert raymoe.verify(tmp_path / "out").ok
    record = json.loads((tmp_path / "out" / "raymoe.json").read_text())
    assert {key: record["config"][key] for key in keys} == keys
    assert record["routers"] is not None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "(4 of 4 experts)" in card
    assert "Experts are in 2 of 3 layers (layers 0-1). The others have the base's FFN." in card
    assert "Each FFN is cut into 2 experts with equal router rows, so 2 sources are 4 experts." in card
    assert "25% of the channels of experts are random numbers: the merge has to be trained." in card


@pytest.mark.parametrize(
    ("family", "whole", "shares", "said"),
    [
        ("qwen3", 0.5, [None, None], "50% of the channels of experts are"),
        ("qwen3", 0.5, [None, 0], "50% of the channels of expert 0 are"),
        ("granite", 0, [0.25, 0.5], "25% of the channels of expert 0 and 50% of those of expert 1 are"),
    ],
)
@pytest.mark.parametrize("granularity", [1, 2])
def test_the_plan_names_the_experts_with_channels_drawn_anew(
    family: str, whole: float, shares: list[float | None], said: str, granularity: int, zoo: Callable[..., Path]
) -> None:
    base = zoo(family)
    config = merge_config(base, [base, base], mode="random", reinit=whole, granularity=granularity)
    for expert, share in zip(config["experts"], shares, strict=True):
        expert["reinit"] = share
    plan = raymoe.plan(config, allow_all_same=True)
    assert [line for line in start_lines(plan) if line.startswith(said)]
