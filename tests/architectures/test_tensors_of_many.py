"""Output tensors that hold several experts or matrices (Granite), and sources that do (Phi-3)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import raymoe
from raymoe.planning import MergeOptions
from raymoe.planning.owner import ALL_EXPERTS
from raymoe.report.inspect import inspect_checkpoint
from raymoe.report.plan_report import plan_summary, print_plan
from raymoe.routers.in_process import compute_routers_locally
from raymoe.routers.router_matrices import router_bytes
from raymoe.runtime.settings import RuntimeSettings
from raymoe.runtime.verify import verify_merge
from raymoe.sources.hub import HubOptions
from raymoe.storage.shard_stream import shard_chunks, shard_range
from raymoe.storage.source_reader import SourceReader
from tests.pico import LAYERS, Tensors, merge_config, merge_without_ray, save_lora, tensors_of

INPUT = "model.layers.{}.block_sparse_moe.input_linear.weight"
OUTPUT = "model.layers.{}.block_sparse_moe.output_linear.weight"
WIDTH = 96


def merge(config: dict[str, Any], folder: Path, options: MergeOptions | None = None) -> Tensors:
    merge_without_ray(config, folder, options)
    return tensors_of(folder)


def ffn(source: Tensors, layer: int, proj: str) -> torch.Tensor:
    return source[f"model.layers.{layer}.mlp.{proj}_proj.weight"]


def delta(adapter: Path, module: str) -> torch.Tensor:
    from safetensors.torch import load_file

    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    return 1.5 * (b @ a)  # alpha 6, rank 4


def test_every_expert_is_in_its_place(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base, *experts = (zoo("granite", seed=seed) for seed in range(4))
    merged = merge(merge_config(base, experts, mode="random"), tmp_path / "merged")
    for layer in range(LAYERS):
        stacked, down = merged[INPUT.format(layer)], merged[OUTPUT.format(layer)]
        assert stacked.shape == (3, 2 * WIDTH, 64) and down.shape == (3, 64, WIDTH)
        for number, expert in enumerate(experts):
            source = tensors_of(expert)
            assert torch.equal(stacked[number, :WIDTH], ffn(source, layer, "gate"))
            assert torch.equal(stacked[number, WIDTH:], ffn(source, layer, "up"))
            assert torch.equal(down[number], ffn(source, layer, "down"))
    assert not any(".mlp." in name for name in merged)


def test_adapters_scales_and_casts_reach_their_expert_alone(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base = zoo("granite")
    adapter = save_lora(tmp_path / "adapter", base, ["mlp.up_proj"])
    config = merge_config(base, [base, f"{base}+{adapter}", base], mode="random", dtype="bfloat16")
    config["experts"][2]["residual_scale"] = 0.3
    merged, source = merge(config, tmp_path / "merged"), tensors_of(base)
    for layer in range(LAYERS):
        stacked, down = merged[INPUT.format(layer)], merged[OUTPUT.format(layer)]
        up = ffn(source, layer, "up")
        assert torch.equal(stacked[0, WIDTH:], up.bfloat16())
        with_lora = up + delta(adapter, f"model.layers.{layer}.mlp.up_proj")
        torch.testing.assert_close(stacked[1, WIDTH:].float(), with_lora, rtol=8e-3, atol=1e-6)
        assert not torch.equal(stacked[1, WIDTH:], stacked[0, WIDTH:])
        assert torch.equal(stacked[1, :WIDTH], stacked[0, :WIDTH])
        assert torch.equal(down[2], (ffn(source, layer, "down") * 0.3).bfloat16())


def test_noise_differs_between_experts_and_not_between_shard_sizes(zoo: Callable[..., Path], tmp_path: Path) -> None:
    dense = zoo("granite")
    config = merge_config(dense, [dense] * 2, mode="random", expert_options={"noise_scale": 0.25})
    merged = merge(config, tmp_path / "merged")
    again = merge(config, tmp_path / "again", MergeOptions(max_shard_bytes=60_000))
    assert merged.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in merged.items())
    stacked, source = merged[INPUT.format(1)], tensors_of(dense)
    drawn = [stacked[number, :WIDTH] - ffn(source, 1, "gate") for number in (0, 1)]
    drawn.append(stacked[0, WIDTH:] - ffn(source, 1, "up"))
    assert all(abs(noise.std() / 0.25 - 1) < 0.05 for noise in drawn)
    correlations = torch.corrcoef(torch.stack([noise.flatten() for noise in drawn])).fill_diagonal_(0)
    assert correlations.abs().max() < 0.08


@pytest.mark.parametrize("limit", [10_000, 200_000])
def test_a_tensor_of_all_experts_stays_in_one_shard(limit: int, zoo: Callable[..., Path], tmp_path: Path) -> None:
    base, *experts = (zoo("granite", seed=seed) for seed in range(3))
    config = merge_config(base, experts, mode="random")
    plan = merge_without_ray(config, tmp_path / "merged", MergeOptions(max_shard_bytes=limit))
    whole = merge(config, tmp_path / "whole")
    found = tensors_of(tmp_path / "merged")
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    shards = [shard for shard in plan.shards if shard.owner == ALL_EXPERTS]
    assert [len({part.tensor.name for part in shard.parts}) for shard in shards] == [1] * 6 or limit > 100_000
    assert {part.tensor.name for shard in shards for part in shard.parts} == {
        name.format(layer) for layer in range(LAYERS) for name in (INPUT, OUTPUT)
    }
    assert plan.totals.parameters == sum(tensor.numel() for tensor in whole.values())
    assert plan.index["weight_map"].keys() == whole.keys()
    assert {str(s.owner) for s in plan.shards} == {"base", "experts", "router"}


def test_idle_experts_do_not_count_as_active(zoo: Callable[..., Path], tmp_path: Path) -> None:
    dense = zoo("granite")
    config = merge_config(dense, [dense] * 3, mode="random", experts_per_token=1)
    totals = merge_without_ray(config, tmp_path / "merged").totals
    assert totals.parameters - totals.active_parameters == 2 * LAYERS * 3 * 64 * WIDTH
    summary = inspect_checkpoint(tmp_path / "merged")
    assert (summary["experts"], summary["parameters_per_expert"]) == (3, LAYERS * 3 * 64 * WIDTH)
    assert summary["active_parameters"] == totals.active_parameters
    assert summary["routers"]["layers"] == LAYERS


def test_any_range_of_a_shard_can_be_asked_for_by_itself(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """As parts of an upload are."""
    base, *experts = (zoo("granite", seed=seed) for seed in range(3))
    config = merge_config(base, experts, mode="random", dtype="bfloat16")
    plan = merge_without_ray(config, tmp_path / "merged", MergeOptions(max_shard_bytes=300_000))
    numbers = random.Random(0)
    with SourceReader(HubOptions()) as reader:
        rows = router_bytes(plan.gates, compute_routers_locally(plan.gates, reader, device="cpu")[0])
        for shard in plan.shards:
            whole = (tmp_path / "merged" / shard.file_name).read_bytes()
            assert b"".join(shard_chunks(shard, reader, rows)) == whole
            for _ in range(10):
                start, end = sorted(numbers.randrange(shard.nbytes + 1) for _ in range(2))
                assert b"".join(shard_range(shard, start, end, reader, rows)) == whole[start:end]


def test_a_changed_byte_is_found_and_named_by_its_tensor(
    zoo: Callable[..., Path], merge_in_process: Callable[..., Any], tmp_path: Path
) -> None:
    base, *experts = (zoo("granite", seed=seed) for seed in range(3))
    merge_in_process(merge_config(base, experts, mode="random"), tmp_path / "merged")
    settings = RuntimeSettings(verbosity=-1, actors=1)
    assert verify_merge(tmp_path / "merged", settings).ok
    plan = merge_without_ray(merge_config(base, experts, mode="random"), tmp_path / "again")
    shard, part = next(
        (shard, part) for shard in plan.shards for part in shard.parts if part.name == f"{INPUT.format(1)}[1].up"
    )
    with open(tmp_path / "merged" / shard.file_name, "r+b") as file:
        file.seek(part.start + 5)
        file.write(bytes([file.read(1)[0] ^ 1]))
    found = verify_merge(tmp_path / "merged", settings)
    assert found.differences == (f"{INPUT.format(1)}: differs",)


# --- sources that hold several matrices


def test_rows_of_one_tensor_become_several(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base, expert = zoo("phi3"), zoo("phi3", seed=1)
    plan = merge_without_ray(merge_config(base, [expert, base], mode="random"), tmp_path / "merged")
    merged, sources = tensors_of(tmp_path / "merged"), (tensors_of(expert), tensors_of(base))
    assert set(plan.totals.bytes_by_kind) == {"copy", "router"}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        q, k, v = sources[1][f"{prefix}self_attn.qkv_proj.weight"].split([64, 32, 32])
        for name, expected in (("q", q), ("k", k), ("v", v)):
            assert torch.equal(merged[f"{prefix}self_attn.{name}_proj.weight"], expected)
        for number, source in enumerate(sources):
            gate, up = source[f"{prefix}mlp.gate_up_proj.weight"].chunk(2)
            assert torch.equal(merged[f"{prefix}block_sparse_moe.experts.{number}.w1.weight"], gate)
            assert torch.equal(merged[f"{prefix}block_sparse_moe.experts.{number}.w3.weight"], up)


def test_an_adapter_of_such_a_tensor_reaches_all_of_it(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base = zoo("phi3")
    adapter = save_lora(tmp_path / "adapter", base, ["qkv_proj", "gate_up_proj"])
    config = merge_config(f"{base}+{adapter}", [f"{base}+{adapter}", base], mode="random")  # type: ignore[arg-type]
    merged, source = merge(config, tmp_path / "merged"), tensors_of(base)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        qkv = source[f"{prefix}self_attn.qkv_proj.weight"] + delta(adapter, f"{prefix}self_attn.qkv_proj")
        for name, expected in zip("qkv", qkv.split([64, 32, 32]), strict=True):
            torch.testing.assert_close(merged[f"{prefix}self_attn.{name}_proj.weight"], expected, rtol=0, atol=1e-6)
        both = source[f"{prefix}mlp.gate_up_proj.weight"] + delta(adapter, f"{prefix}mlp.gate_up_proj")
        for name, expected in zip(("w1", "w3"), both.chunk(2), strict=True):
            written = merged[f"{prefix}block_sparse_moe.experts.0.{name}.weight"]
            torch.testing.assert_close(written, expected, rtol=0, atol=1e-6)


def test_rows_of_heads_whose_neighbours_are_turned(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """GLM-4's q and k in GLM-4.5's MoE: each head's pairs become halves; what is not turned, and v and o, stay."""
    base, expert = zoo("glm", dtype="bfloat16"), zoo("glm", seed=1, dtype="bfloat16")
    merged, source = merge(merge_config(base, [expert, base], mode="random"), tmp_path / "merged"), tensors_of(base)
    order = [*range(0, 16, 2), *range(1, 16, 2), *range(16, 32)]
    for layer in range(LAYERS):
        for name in (f"model.layers.{layer}.self_attn.{p}_proj.{part}" for p in "qk" for part in ("weight", "bias")):
            heads = source[name].unflatten(0, (-1, 32))
            assert torch.equal(merged[name], heads[:, order].flatten(0, 1))
            assert not torch.equal(merged[name], source[name])
        for name in ("v_proj.weight", "v_proj.bias", "o_proj.weight"):
            full = f"model.layers.{layer}.self_attn.{name}"
            assert torch.equal(merged[full], source[full])


def test_a_plan_says_what_all_experts_write_together(
    zoo: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    dense = zoo("granite")
    plan = raymoe.plan(merge_config(dense, [dense] * 2, mode="random"), allow_all_same=True)
    print_plan(plan, as_json=False)
    text = capsys.readouterr().out
    assert re.search(r"expert 1 .* in experts\nexperts +all of them, tensor by tensor +\d", text)
    (shard,) = [shard for shard in plan_summary(plan)["shards"] if shard["owner"] == "experts"]
    assert shard["tensors"] == 2 * LAYERS
