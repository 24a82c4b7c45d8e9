"""Several shared experts are one that is as wide as all of them, and their sum."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import raymoe
from raymoe.planning import MergeOptions
from raymoe.planning.owner import ALL_SHARED
from raymoe.report.inspect import inspect_checkpoint
from raymoe.routers.in_process import compute_routers_locally
from raymoe.routers.router_matrices import router_bytes
from raymoe.runtime.settings import RuntimeSettings
from raymoe.runtime.verify import verify_merge
from raymoe.sources.hub import HubOptions
from raymoe.storage.shard_stream import shard_range
from raymoe.storage.source_reader import SourceReader
from tests.architectures.pairs import MAX_DIFFERENCE, PAIRS, Pair, force_router, load_grafted, load_merged, moe_blocks
from tests.pico import (
    LAYERS,
    MODES,
    PROMPTS,
    load_dense,
    logits_of,
    merge_config,
    merge_without_ray,
    save_lora,
    tensors_of,
    token_ids,
)

pytestmark = pytest.mark.engines

WIDTH = 96
# One family a host; Hunyuan's shared expert is always as wide as the others.
HOSTS = list({pair.host: pair for pair in PAIRS if pair.shared and pair.host != "hunyuan_v1_moe"}.values())


def several(pair: Pair, base: Path, experts: list[Path], shared: list[Path], **options: Any) -> dict[str, Any]:
    """A config with all of `shared`; where there are prompts, each has its own."""
    config = pair.config(base, experts, shared[0], **options)
    (first,) = config["shared_experts"]
    config["shared_experts"] = [{**first, "source_model": str(folder)} for folder in shared]
    if "positive_prompts" in first:
        for number, entry in enumerate(config["shared_experts"]):
            entry["positive_prompts"] = list(PROMPTS[3 - number])
    return config


@pytest.mark.parametrize("pair", HOSTS, ids=str)
def test_an_expert_and_two_shared_ones_are_their_sum(pair: Pair, zoo: Callable[..., Path], tmp_path: Path) -> None:
    base, *experts = (zoo(pair.family, seed=seed, **pair.options) for seed in range(3))
    shared = [zoo(pair.family, seed=seed, **pair.options) for seed in (4, 5)]

    merge_without_ray(several(pair, base, experts, shared, mode="random"), tmp_path / "merged")

    model, ids = load_merged(tmp_path / "merged"), token_ids(12, rows=2)
    gates = None
    if pair.gates_shared:
        gates = [block.shared_expert_gate.weight.detach() for block in moe_blocks(model)]
    reference = load_grafted(base, experts[1], shared, gates)
    force_router(model, reference, ids, 1)
    expected = logits_of(reference, ids)
    assert (logits_of(model, ids) - expected).abs().max() < MAX_DIFFERENCE
    for without in shared:
        assert (expected - logits_of(load_grafted(base, experts[1], [without], gates), ids)).abs().max() > 0.1


@pytest.mark.parametrize("pair", HOSTS, ids=str)
def test_copies_with_shared_experts_that_add_nothing(pair: Pair, zoo: Callable[..., Path], tmp_path: Path) -> None:
    dense, ids = zoo(pair.family, **pair.options), token_ids(40, rows=2)
    config = several(pair, dense, [dense] * 3, [dense] * 3, mode="random", shared_options={"residual_scale": 0.0})

    merge_without_ray(config, tmp_path / "merged")

    found = logits_of(load_merged(tmp_path / "merged"), ids)
    assert (found - logits_of(load_dense(dense), ids)).abs().max() < MAX_DIFFERENCE


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "random"])
def test_one_gate_for_all_of_them(mode: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    (pair,) = (pair for pair in HOSTS if pair.host == "qwen2_moe")
    dense, shared = zoo(pair.family, **pair.options), [zoo(pair.family, seed=s, **pair.options) for s in (4, 5)]
    ids = token_ids(40)

    def merged(name: str, sharers: list[Path]) -> Any:
        merge_without_ray(several(pair, dense, [dense] * 2, sharers, mode=mode), tmp_path / name)
        return load_merged(tmp_path / name)

    model = merged("both", shared)
    gates = [layer.mlp.shared_expert_gate.weight.detach() for layer in model.model.layers]
    assert {tuple(gate.shape) for gate in gates} == {(1, 64)}
    expected = logits_of(load_grafted(dense, dense, shared, gates), ids)
    assert (logits_of(model, ids) - expected).abs().max() < MAX_DIFFERENCE
    alone = [layer.mlp.shared_expert_gate.weight.detach() for layer in merged("alone", shared[:1]).model.layers]
    differ = [(gate - other).abs().max().item() > 1e-3 for gate, other in zip(gates, alone, strict=True)]
    assert all(differ) if mode != "uniform_random" else not any(differ)


def test_every_matrix_is_in_its_place(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Copied, cast, with an adapter, scaled and with noise, beside each other."""
    base, expert, plain = (zoo("llama", seed=seed) for seed in range(3))
    adapter = save_lora(tmp_path / "adapter", plain, ["mlp.down_proj", "mlp.up_proj"])
    config = merge_config(base, [expert] * 2, mode="random", architecture="deepseek", shared=plain)
    (first,) = config["shared_experts"]
    config["shared_experts"] = [
        first,
        {"source_model": f"{plain}+{adapter}"},
        {**first, "residual_scale": 0.25},
        {**first, "noise_scale": 0.5},
    ]
    plan = merge_without_ray(config, tmp_path / "merged")
    alone = merge_config(base, [str(plain), f"{plain}+{adapter}"], mode="random")
    merge_without_ray(alone, tmp_path / "alone")

    merged, source, experts = tensors_of(tmp_path / "merged"), tensors_of(plain), tensors_of(tmp_path / "alone")
    assert plan.config["n_shared_experts"] == 4
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp."
        for proj, w, axis in (("gate", "w1", 0), ("up", "w3", 0), ("down", "w2", 1)):
            blocks = merged[f"{prefix}shared_experts.{proj}_proj.weight"].chunk(4, dim=axis)
            assert [tuple(block.shape) for block in blocks] == [(WIDTH, 64) if axis == 0 else (64, WIDTH)] * 4
            dense = source[f"{prefix}{proj}_proj.weight"]
            assert torch.equal(blocks[0], dense)
            with_lora = experts[f"model.layers.{layer}.block_sparse_moe.experts.1.{w}.weight"]
            assert torch.equal(blocks[1], with_lora) and torch.equal(with_lora, dense) is (proj == "gate")
            assert torch.equal(blocks[2], dense * 0.25 if proj == "down" else dense)
            assert abs((blocks[3] - dense).std() / 0.5 - 1) < 0.05
    summary = inspect_checkpoint(tmp_path / "merged")
    assert summary["active_parameters"] == plan.totals.active_parameters
    assert {str(shard.owner) for shard in plan.shards} == {"base", "expert 0", "expert 1", "shared experts", "router"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_range_of_a_shard_can_be_asked_for_by_itself(
    dtype: str, zoo: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As parts of an upload are; blocks are made small, so that a matrix is several."""
    monkeypatch.setattr("raymoe.storage.transform.BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr("raymoe.storage.transform.row_blocks.__defaults__", (1000, 1))
    base, expert, other = (zoo("llama", seed=seed) for seed in range(3))
    config = merge_config(base, [expert] * 2, mode="random", architecture="deepseek", shared=other, dtype=dtype)
    config["shared_experts"].append({"source_model": str(expert), "noise_scale": 0.1})
    plan = merge_without_ray(config, tmp_path / "merged", MergeOptions(max_shard_bytes=200_000))
    numbers = random.Random(0)
    with SourceReader(HubOptions()) as reader:
        rows = router_bytes(plan.gates, compute_routers_locally(plan.gates, reader, device="cpu")[0])
        for shard in plan.shards:
            whole = (tmp_path / "merged" / shard.file_name).read_bytes()
            for _ in range(20):
                start, end = sorted(numbers.randrange(shard.nbytes + 1) for _ in range(2))
                assert b"".join(shard_range(shard, start, end, reader, rows)) == whole[start:end]


def test_a_merge_is_verified_and_a_changed_byte_found(
    zoo: Callable[..., Path], merge_in_process: Callable[..., Any], tmp_path: Path
) -> None:
    base, *experts = (zoo("qwen2", seed=seed) for seed in range(3))
    (pair,) = (pair for pair in HOSTS if pair.host == "qwen2_moe")
    config = several(pair, base, experts, [zoo("qwen2", seed=s) for s in (4, 5)], mode="cheap_embed")
    merged = tmp_path / "merged"
    merge_in_process(config, merged)
    settings = RuntimeSettings(verbosity=-1, actors=1)
    assert verify_merge(merged, settings).ok
    plan = raymoe.plan(config)
    (shard,) = (s for s in plan.shards if s.owner == ALL_SHARED)
    part = next(p for p in shard.parts if p.name.endswith("1.mlp.shared_expert.down_proj.weight"))
    with open(merged / shard.file_name, "r+b") as file:
        file.seek(part.start + 7)
        file.write(bytes([file.read(1)[0] ^ 1]))
    assert verify_merge(merged, settings).differences == (f"{part.name}: differs",)
