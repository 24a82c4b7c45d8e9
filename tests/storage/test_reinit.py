"""Channels that are drawn anew (`reinit`): which ones, from what, and that nothing but the plan decides it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import raymoe
from raymoe.planning import MergeOptions
from raymoe.planning.plan import Reinit
from raymoe.sources.hub import HubOptions
from raymoe.storage.shard_stream import shard_range
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transform import chosen_channels
from tests.pico import Tensors, merge_config, merge_without_ray, tensors_of

SHARE = 0.5


@pytest.fixture
def merged(zoo: Callable[..., Path], tmp_path: Path) -> Callable[..., Tensors]:
    made: list[Path] = []

    def merge(*, seed: int = 0, **keys: object) -> Tensors:
        dense = zoo("llama", intermediate_size=160)
        made.append(tmp_path / str(len(made)))
        config = merge_config(dense, [dense] * 2, mode="random", **{"reinit": SHARE, **keys})
        merge_without_ray(config, made[-1], MergeOptions(seed=seed))
        return tensors_of(made[-1])

    return merge


def changed(merged: Tensors, dense: Tensors, layer: int, expert: int) -> list[torch.Tensor]:
    """For gate, up and down of an expert, which channels differ from the model's."""
    found = []
    for own, name in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        a = merged[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{own}.weight"]
        b = dense[f"model.layers.{layer}.mlp.{name}_proj.weight"]
        different = a != b
        each = different.all(dim=0) if name == "down" else different.all(dim=1)
        assert torch.equal(each, different.any(dim=0) if name == "down" else different.any(dim=1))
        found.append(each)
    return found


def test_the_same_channels_of_each_matrix(merged: Callable[..., Tensors], zoo: Callable[..., Path]) -> None:
    result, dense = merged(), tensors_of(zoo("llama", intermediate_size=160))
    sets = []
    for layer in range(2):
        for expert in range(2):
            gate, up, down = changed(result, dense, layer, expert)
            assert torch.equal(gate, up)
            assert torch.equal(gate, down)
            assert int(gate.sum()) == 80
            sets.append(tuple(gate.tolist()))
    assert len(set(sets)) == 4  # each expert of each layer has its own


def test_numbers_have_the_mean_and_deviation_of_the_channels(
    merged: Callable[..., Tensors], zoo: Callable[..., Path]
) -> None:
    result, dense = merged(), tensors_of(zoo("llama", intermediate_size=160))
    (drawn, _, _) = changed(result, dense, 0, 0)
    new = result["model.layers.0.block_sparse_moe.experts.0.w1.weight"][drawn]
    old = dense["model.layers.0.mlp.gate_proj.weight"][drawn]
    count = new.numel() ** 0.5
    assert abs(new.mean() - old.mean()) < 5 * old.std() / count
    assert abs(new.std() / old.std() - 1) < 5 / count


def test_seed_and_expert_decide(merged: Callable[..., Tensors]) -> None:
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    first, again, other = merged(), merged(), merged(seed=1)
    assert all(torch.equal(first[each], again[each]) for each in first)
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("experts.0", "experts.1")])


def test_any_range_of_a_shard_is_the_same(zoo: Callable[..., Path]) -> None:
    """A resumed or divided shard has the bytes of a whole one."""
    dense = zoo("qwen2", tie_word_embeddings=True)
    options = {"expert_options": {"noise_scale": 0.01}, "granularity": 2, "reinit": 0.25, "architecture": "qwen2_moe"}
    plan = raymoe.plan(merge_config(dense, [dense] * 2, mode="random", **options), allow_all_same=True)
    for shard in plan.worker_shards:
        with SourceReader(HubOptions()) as reader:
            whole = b"".join(shard_range(shard, 0, shard.nbytes, reader))
        with SourceReader(HubOptions()) as reader:
            cuts = [0, shard.nbytes // 3 + 1, shard.nbytes // 2 + 3, shard.nbytes]
            pieces = [b"".join(shard_range(shard, a, b, reader)) for a, b in reversed(list(pairwise(cuts)))]
        assert b"".join(reversed(pieces)) == whole


def test_an_expert_may_keep_its_weights(merged: Callable[..., Tensors], zoo: Callable[..., Path]) -> None:
    result, dense = merged(expert_options={"reinit": 0}), tensors_of(zoo("llama", intermediate_size=160))
    assert not any(each.any() for each in changed(result, dense, 0, 0))


@pytest.mark.parametrize(
    ("share", "width", "count"), [(0.5, 7, 3), (0.3, 10, 3), (1.0, 5, 5), (0.0, 5, 0), (0.1, 9, 0)]
)
def test_channels_are_rounded_down(share: float, width: int, count: int) -> None:
    chosen = chosen_channels(3, Reinit(share=share, channels="layer 0 expert 0", of_columns=False), width)
    assert len(chosen) == count
    assert np.array_equal(chosen, np.unique(chosen))
