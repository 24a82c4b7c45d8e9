"""Every tensor that a merge writes, value by value: copied, cast, scaled, noised, with a LoRA delta; and the shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from raymoe.planning import MergeOptions
from tests.pico import (
    HIDDEN,
    LAYERS,
    TORCH_DTYPES,
    Tensors,
    copy_model,
    merge_config,
    merge_without_ray,
    save_lora,
    tensors_of,
)

MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
FFN = [f"model.layers.{layer}.mlp.{proj}.weight" for layer in range(LAYERS) for proj in MIXTRAL]
# Halfway between two bfloat16 numbers, beyond float16, below its smallest number, and what is no number.
SPECIAL = [1.00390625, 1.01171875, 65504.0, 65520.0, 1e6, -1e6, 3e38, 6e-8, 1e-8, -1e-8, -0.0]
SPECIAL += [float("inf"), float("-inf"), float("nan")]


def output_name(name: str, expert: int) -> str:
    """Mixtral's name of an FFN tensor of an expert."""
    _, _, layer, _, proj, _ = name.split(".")
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{MIXTRAL[proj]}.weight"


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    bits = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    missing = expected.isnan()
    assert torch.equal(actual.isnan(), missing)
    assert torch.equal(actual[~missing].view(bits), expected[~missing].view(bits))


def merge(config: dict[str, Any], folder: Path, options: MergeOptions | None = None) -> Tensors:
    merge_without_ray(config, folder, options)
    return tensors_of(folder)


@pytest.fixture
def special(zoo: Callable[..., Path], tmp_path: Path) -> Path:
    """A float32 model that holds the `SPECIAL` values in an attention and in an FFN tensor."""
    dense = zoo("llama")
    tensors = tensors_of(dense)
    changed = {}
    for name in ("model.layers.0.self_attn.q_proj.weight", FFN[1]):
        tensors[name].view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
        changed[name] = tensors[name]
    return copy_model(dense, tmp_path / "special", tensors=changed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_cast_is_torchs(dtype: str, special: Path, tmp_path: Path) -> None:
    source = tensors_of(special)
    if dtype == "float16":  # numbers that it can't have are refused: tests/storage/test_transform.py
        source = {
            name: torch.where(tensor.isfinite() & (tensor.abs() >= 65520), 0, tensor) for name, tensor in source.items()
        }
        special = copy_model(special, tmp_path / "in range", tensors=source)
    merged = merge(merge_config(special, [special] * 2, mode="random", dtype=dtype), tmp_path / "merged")
    for name, tensor in source.items():
        targets = [output_name(name, expert) for expert in (0, 1)] if ".mlp." in name else [name]
        for target in targets:
            assert_same_bits(merged.pop(target), tensor.to(TORCH_DTYPES[dtype]))
    assert set(merged) == {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(LAYERS)}
    assert {tensor.dtype for tensor in merged.values()} == {TORCH_DTYPES[dtype]}
    assert {tuple(tensor.shape) for tensor in merged.values()} == {(2, HIDDEN)}


@pytest.mark.parametrize(
    ("dtype", "target"), [("bfloat16", "float32"), ("bfloat16", "float16"), ("float16", "bfloat16")]
)
def test_casts_between_half_precisions(dtype: str, target: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    dense = zoo("llama", dtype=dtype)
    merged = merge(merge_config(dense, [dense] * 2, mode="random", dtype=target), tmp_path / "merged")
    for name, tensor in tensors_of(dense).items():
        assert_same_bits(merged[output_name(name, 1) if ".mlp." in name else name], tensor.to(TORCH_DTYPES[target]))


def test_without_dtype_all_get_the_bases(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base, expert = zoo("llama", dtype="bfloat16"), zoo("llama", seed=1)
    plan = merge_without_ray(merge_config(base, [base, expert], mode="random"), tmp_path / "merged")
    merged = tensors_of(tmp_path / "merged")
    assert plan.config["torch_dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    source = tensors_of(expert)
    for name in FFN:
        assert_same_bits(merged[output_name(name, 1)], source[name].bfloat16())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scale", [0.0, 0.1, 0.5, 1.0, -3.0])
def test_residual_scale_is_on_the_last_matrix_only(
    scale: float, dtype: str, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    dense = zoo("llama", dtype=dtype)
    config = merge_config(dense, [dense] * 2, mode="random")
    config["experts"][1]["residual_scale"] = scale
    merged = merge(config, tmp_path / "merged")
    source = tensors_of(dense)
    for name in FFN:
        assert_same_bits(merged[output_name(name, 0)], source[name])
        expected = source[name] * scale if "down_proj" in name else source[name]
        assert_same_bits(merged[output_name(name, 1)], expected)


def test_scale_comes_before_the_cast(zoo: Callable[..., Path], tmp_path: Path) -> None:
    dense = zoo("llama")
    config = merge_config(dense, [dense] * 2, mode="random", dtype="bfloat16", expert_options={"residual_scale": 0.3})
    merged, source = merge(config, tmp_path / "merged"), tensors_of(dense)
    for name in FFN:
        expected = source[name] * 0.3 if "down_proj" in name else source[name]
        assert_same_bits(merged[output_name(name, 0)], expected.bfloat16())


# --- noise


def noisy(zoo: Callable[..., Path], scale: float | None = None) -> dict[str, Any]:
    dense = zoo("llama")
    extra = {"noise_scale": 0.25} | ({} if scale is None else {"residual_scale": scale})
    return merge_config(dense, [dense] * 2, mode="random", expert_options=extra)


def noise_of(merged: Tensors, source: Tensors, expert: int) -> dict[str, torch.Tensor]:
    return {name: merged[output_name(name, expert)] - source[name] for name in FFN}


def test_noise_is_gaussian_and_different_everywhere(zoo: Callable[..., Path], tmp_path: Path) -> None:
    merged, source = merge(noisy(zoo), tmp_path / "merged"), tensors_of(zoo("llama"))
    drawn = [noise for expert in (0, 1) for noise in noise_of(merged, source, expert).values()]
    for noise in drawn:  # 6144 numbers each: the bounds are five standard errors wide
        assert abs(noise.mean()) < 5 * 0.25 / noise.numel() ** 0.5
        assert abs(noise.std() / 0.25 - 1) < 5 / (2 * noise.numel()) ** 0.5
        within = (noise.abs() < 0.25).float().mean()
        assert abs(within - 0.6827) < 0.03
    flat = torch.stack([noise.flatten() for noise in drawn])
    correlations = torch.corrcoef(flat).fill_diagonal_(0)
    assert correlations.abs().max() < 0.08
    for name, tensor in source.items():
        if ".mlp." not in name:
            assert torch.equal(merged[name], tensor)


def test_noise_depends_on_the_seed_and_on_nothing_else(zoo: Callable[..., Path], tmp_path: Path) -> None:
    config = noisy(zoo)
    first = merge(config, tmp_path / "first", MergeOptions(seed=7))
    again = merge(config, tmp_path / "again", MergeOptions(seed=7, max_shard_bytes=30_000))
    other = merge(config, tmp_path / "other", MergeOptions(seed=8))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        is_drawn = "block_sparse_moe" in name
        assert torch.equal(tensor, other[name]) is not is_drawn


def test_noise_is_scaled_with_the_weight_it_is_added_to(zoo: Callable[..., Path], tmp_path: Path) -> None:
    plain = merge(noisy(zoo), tmp_path / "plain")
    scaled = merge(noisy(zoo, scale=0.5), tmp_path / "scaled")
    for name in FFN:
        output = output_name(name, 1)
        assert torch.equal(scaled[output], plain[output] * (0.5 if "down_proj" in name else 1.0))


def test_noise_of_zero_leaves_the_bytes_alone(zoo: Callable[..., Path], tmp_path: Path) -> None:
    dense = zoo("llama")
    config = merge_config(dense, [dense] * 2, mode="random", expert_options={"noise_scale": 0.0})
    plan = merge_without_ray(config, tmp_path / "merged")
    assert set(plan.totals.bytes_by_kind) == {"copy", "router"}


# --- LoRA


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lora_delta_is_added_in_float32_and_rounded_once(
    dtype: str, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    base = zoo("llama", dtype=dtype)
    adapter = save_lora(tmp_path / "adapter", base, ["mlp.up_proj", "mlp.down_proj", "q_proj"], rank=4, alpha=6.0)
    config = merge_config(base, [base, f"{base}+{adapter}"], mode="random")
    merged, source = merge(config, tmp_path / "merged"), tensors_of(base)
    factors = tensors_of_adapter(adapter)
    digits = {"float32": 24, "bfloat16": 8}[dtype]
    for name in FFN:
        assert_same_bits(merged[output_name(name, 0)], source[name])
        written = merged[output_name(name, 1)]
        if "gate_proj" in name:
            assert_same_bits(written, source[name])
            continue
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = factors[f"{prefix}.lora_A.weight"].double(), factors[f"{prefix}.lora_B.weight"].double()
        exact = source[name].double() + 1.5 * (b @ a)
        # At most half a step of the output's dtype, and what float32 sums lose.
        _, exponent = torch.frexp(exact)
        bound = 0.5 * 2.0 ** (exponent - digits).double() + 1e-6
        assert ((written.double() - exact).abs() <= bound).all()
        assert (written.double() - source[name].double()).abs().max() > 0.01
    # What the adapter changes outside the FFN stays with the expert: attention is the base's.
    assert torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"], source["model.layers.0.self_attn.q_proj.weight"]
    )


def test_a_base_with_an_adapter_keeps_its_attention_delta(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base = zoo("llama")
    adapter = save_lora(tmp_path / "adapter", base, ["q_proj"])
    merged = merge(merge_config(f"{base}+{adapter}", [base, base], mode="random"), tmp_path / "merged")
    name = "model.layers.2.self_attn.q_proj"
    factors = tensors_of_adapter(adapter)
    delta = factors[f"base_model.model.{name}.lora_B.weight"] @ factors[f"base_model.model.{name}.lora_A.weight"]
    expected = tensors_of(base)[f"{name}.weight"] + 1.5 * delta
    torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=0, atol=1e-6)


def tensors_of_adapter(folder: Path) -> Tensors:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


# --- shards


@pytest.mark.parametrize("limit", [10_000, 40_000, 100_000, 5_000_000_000])
def test_shards_keep_their_limit_and_one_owner(limit: int, zoo: Callable[..., Path], tmp_path: Path) -> None:
    dense = zoo("llama")
    config = merge_config(dense, [dense, zoo("llama", seed=1)], mode="random")
    plan = merge_without_ray(config, tmp_path / "merged", MergeOptions(max_shard_bytes=limit))
    whole = merge(config, tmp_path / "whole")
    count = len(plan.shards)
    assert [shard.file_name for shard in plan.shards] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    assert sum(1 for _ in (tmp_path / "merged").glob("*.safetensors")) == count
    seen: Tensors = {}
    for shard in plan.shards:
        with safe_open(tmp_path / "merged" / shard.file_name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert sum(t.nbytes for t in tensors.values()) <= limit or len(tensors) == 1
        assert (tmp_path / "merged" / shard.file_name).stat().st_size == shard.nbytes
        assert not seen.keys() & tensors.keys()
        seen |= tensors
    assert seen.keys() == whole.keys()
    assert all(torch.equal(seen[name], whole[name]) for name in whole)
    owners = [str(shard.owner) for shard in plan.shards]
    assert list(dict.fromkeys(owners)) == ["base", "expert 0", "expert 1", "router"]
    assert owners == sorted(owners, key=["base", "expert 0", "expert 1", "router"].index)


def test_the_index_names_every_tensor_and_the_total(zoo: Callable[..., Path], tmp_path: Path) -> None:
    dense = zoo("qwen2")
    plan = merge_without_ray(
        merge_config(dense, [dense] * 2, mode="random"), tmp_path / "merged", MergeOptions(max_shard_bytes=50_000)
    )
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    tensors = tensors_of(tmp_path / "merged")
    assert (
        index["metadata"]["total_size"]
        == sum(t.nbytes for t in tensors.values())
        == plan.totals.output_bytes - sum(len(shard.header) for shard in plan.shards)
    )
    assert plan.totals.parameters == sum(t.numel() for t in tensors.values())
    idle = sum(t.numel() for name, t in tensors.items() if ".experts.0." in name)
    one_a_token = merge_config(dense, [dense] * 2, mode="random", experts_per_token=1)
    plan = merge_without_ray(one_a_token, tmp_path / "one")
    assert plan.totals.active_parameters == plan.totals.parameters - idle
