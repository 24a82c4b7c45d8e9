"""Merges by `raymoe.merge` on Ray have the bytes that this process writes, and the routers that it computes.

For architectures that differ in how a router and experts are stored: separate tensors, a gated shared expert, fused
experts and layers of two kinds, a bias beside the router.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raymoe.planning.plan import Router
from tests.architectures.pairs import MAMBA, MAX_DIFFERENCE, Pair, load_merged
from tests.pico import load_dense, logits_of, merge_without_ray, tensors_of, token_ids

CASES = [
    (Pair("llama", "mixtral"), "hidden"),
    pytest.param(Pair("qwen2", "qwen2_moe", shared=True), "ridge", marks=pytest.mark.soak),
    pytest.param(
        Pair("granitemoehybrid", "granitemoehybrid", shared=True, options=MAMBA), "hidden", marks=pytest.mark.soak
    ),
    (Pair("youtu", "deepseek_v3", shared=True), "ridge"),
    pytest.param(Pair("granite_swa", "granitemoe_swa"), "random", marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("pair", "mode"), CASES, ids=str)
def test_merges_on_ray(
    pair: Pair, mode: str, zoo: Callable[..., Path], ray_merge: Callable[..., Any], tmp_path: Path
) -> None:
    dense, ids = zoo(pair.family, **pair.options), token_ids(40)
    off = {"shared_options": {"residual_scale": 0.0}} if pair.shared else {}
    config = pair.config(dense, [dense] * 3, dense, mode=mode, **off)

    result = ray_merge(config, tmp_path / "merged")

    expected = logits_of(load_dense(dense), ids)
    assert (logits_of(load_merged(tmp_path / "merged"), ids) - expected).abs().max() < MAX_DIFFERENCE
    assert result.output == str(tmp_path / "merged")
    plan = merge_without_ray(config, tmp_path / "again")
    routers = {part.name for shard in plan.shards for part in shard.parts if isinstance(part.what, Router)}
    assert json.loads((tmp_path / "merged/config.json").read_text()) == plan.config
    assert json.loads((tmp_path / "merged/model.safetensors.index.json").read_text()) == plan.index
    there, here = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "again")
    assert there.keys() == here.keys()
    for name, tensor in here.items():
        if name in routers:  # another number of threads may round a sum differently
            assert tensor.abs().max() > 0
            torch.testing.assert_close(there[name], tensor, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(there[name], tensor)
