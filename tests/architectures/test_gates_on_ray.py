"""One merge a host through Ray with gates computed from prompts: the actors' rows are those of this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raymoe.planning.types import Router
from tests.architectures.hosts import MAX_DIFFERENCE, PAIRS, Pair, load_merged
from tests.pico import load_dense, logits_of, merge_without_ray, tensors_of, token_ids

ONE_A_HOST = {pair.host: pair for pair in PAIRS}


@pytest.mark.parametrize("mode", ["hidden", "ridge"])
@pytest.mark.parametrize("pair", ONE_A_HOST.values(), ids=str)
def test_gates_from_actors(
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
    there, here = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "again")
    assert there.keys() == here.keys()
    for name, tensor in here.items():
        if name in routers:  # another number of threads may round a sum differently
            assert tensor.abs().max() > 0
            torch.testing.assert_close(there[name], tensor, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(there[name], tensor)
