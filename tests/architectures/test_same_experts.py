"""A merge of copies of one model computes what that model computes, whatever the routers say."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load

import raymoe
from raymoe.planning.owner import ROUTER
from raymoe.planning.plan import MergePlan, Router
from raymoe.routers.in_process import compute_routers_locally
from raymoe.routers.router_matrices import router_bytes
from raymoe.sources.hub import HubOptions
from raymoe.storage.shard_stream import shard_chunks
from raymoe.storage.source_reader import SourceReader
from tests.architectures.pairs import (
    MAX_DIFFERENCE,
    PAIRS,
    WINDOW,
    Pair,
    load_grafted,
    load_merged,
    moe_blocks,
    router_of,
)
from tests.pico import Tensors, load_dense, logits_of, merge_without_ray, token_ids

pytestmark = pytest.mark.engines

TOKENS = 40
assert TOKENS > 3 * WINDOW

CASES = [pytest.param(pair, mode, id=f"{pair}-{mode}") for pair in PAIRS for mode in pair.modes]
SHARED = [pair for pair in PAIRS if pair.shared]
# With transformers 4 one mode per pair: what loads differs, gate modes don't.
IS_OLDER = Version(transformers.__version__).major < 5


def assert_same_logits(pair: Pair, actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference."""
    assert expected.std() > 0.5, "logits of no size prove nothing"
    difference = (actual - expected).abs().max().item()
    assert difference < MAX_DIFFERENCE
    return difference


class Copies:
    """A merge of copies of one model, and what the model computes of `ids`."""

    def __init__(self, pair: Pair, zoo: Callable[..., Path], folder: Path) -> None:
        self.pair, self.folder, self.ids = pair, folder, token_ids(TOKENS, rows=2)
        self.dense = zoo(pair.family, **pair.options)
        self.expected = logits_of(load_dense(self.dense), self.ids)
        merge_without_ray(self.config("random"), folder)

    def config(self, mode: str, per_token: int = 2) -> dict[str, Any]:
        off = {"shared_options": {"residual_scale": 0.0}} if self.pair.shared else {}
        dense = self.dense
        return self.pair.config(dense, [dense] * 3, dense, mode=mode, experts_per_token=per_token, **off)

    @functools.cached_property
    def model(self) -> Any:
        """The merge for inference. Tests change its routers."""
        return load_merged(self.folder)


@pytest.fixture(scope="module")
def copies(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Pair], Copies]:
    """copies(pair) is made once for the gate modes of a pair, which come one after the other."""

    @functools.lru_cache(maxsize=1)
    def made(number: int) -> Copies:
        return Copies(PAIRS[number], zoo, tmp_path_factory.mktemp("copies") / "merged")

    return lambda pair: made(PAIRS.index(pair))


@pytest.mark.parametrize(("pair", "mode"), CASES)
def test_copies_of_one_model_compute_what_it_computes(
    pair: Pair, mode: str, copies: Callable[[Pair], Copies], record_property: Callable[[str, object], None]
) -> None:
    """With each number of experts per token: the weights are the same, and only config.json tells.

    Gate modes change the routers, and nothing else: theirs are put into the merge with random ones.
    """
    pair.skip_where_unknown()
    made, differences = copies(pair), []

    if mode == "random":
        for per_token in pair.experts_per_token:
            plan = raymoe.plan(made.config(mode, per_token), allow_all_same=True)
            (made.folder / "config.json").write_text(json.dumps(plan.config))
            logits = logits_of(load_merged(made.folder), made.ids)
            differences.append(assert_same_logits(pair, logits, made.expected))
    else:
        routers = written_routers(raymoe.plan(made.config(mode), allow_all_same=True))
        for block, router in zip(moe_blocks(made.model), routers, strict=True):
            assert router.any() and router.isfinite().all()
            router_of(block).data.copy_(router)
        differences.append(assert_same_logits(pair, logits_of(made.model, made.ids), made.expected))

    record_property("pair", str(pair))  # for the table in docs/families.md
    record_property("difference", max(differences))


def written_routers(plan: MergePlan) -> list[torch.Tensor]:
    """The router of each layer, as it is in the shards."""
    tensors: Tensors = {}
    with SourceReader(HubOptions()) as reader:
        rows, _ = compute_routers_locally(plan.gates, reader, device="cpu")
        for shard in plan.shards:
            if shard.owner == ROUTER:
                tensors |= load(b"".join(shard_chunks(shard, reader, router_bytes(plan.gates, rows))))
    names = [part.name for shard in plan.shards for part in shard.parts if isinstance(part.what, Router)]
    return [tensors[name] for name in sorted(names, key=lambda name: int(name.partition(".layers.")[2].split(".")[0]))]


@pytest.mark.parametrize("mode", ["uniform_random"] if IS_OLDER else ["hidden", "uniform_random"])
@pytest.mark.parametrize("pair", [p for p in SHARED if p.host == "deepseek"], ids=str)
def test_half_a_routed_and_half_a_shared_expert_make_the_model(
    pair: Pair, mode: str, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    dense, ids, half = zoo(pair.family), token_ids(TOKENS), {"residual_scale": 0.5}
    config = pair.config(dense, [dense] * 2, dense, mode=mode, expert_options=half, shared_options=half)

    merge_without_ray(config, tmp_path / "merged")

    assert_same_logits(pair, logits_of(load_merged(tmp_path / "merged"), ids), logits_of(load_dense(dense), ids))


@pytest.mark.parametrize("mode", ["random"] if IS_OLDER else ["hidden", "hidden_avg", "ridge", "cheap_embed", "random"])
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
