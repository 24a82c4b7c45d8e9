"""Quantized checkpoints are refused by the name of their method; a config.json that only says so is a leftover."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raymoe
from raymoe.export.gguf import GgufOptions, write_gguf
from raymoe.sources.facts import CheckpointIndex, SourceFile, TensorEntry
from raymoe.sources.quantization_check import leftover_warning, quantization_problems
from tests.pico import copy_model, merge_config, merge_without_ray

FILE = SourceFile(location="/m/model.safetensors", size=100)


def index(name: str, dtype: str) -> CheckpointIndex:
    entry = TensorEntry(name=name, dtype=dtype, shape=(2, 2), file=FILE, start=0, end=4)
    return CheckpointIndex(files=(FILE,), tensors={name: entry})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "gptq, 4 bits .config.json: quantization_config",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized with awq"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantized with bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized with fp8"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            "quantized with compressed-tensors",
        ),
        ({"quantization_config": {"x": 1}}, "quantized with an unknown method"),
        ({"compression_config": {"quant_method": "x"}}, "config.json: compression_config"),
        (
            {"text_config": {"quantization_config": {"quant_method": "awq"}}},
            "text_config.quantization_config",
        ),
    ],
)
def test_config(config: dict[str, Any], message: str) -> None:
    (problem,) = quantization_problems("/m", config, None)
    assert all(part in str(problem) for part in message.split(" ."))
    assert "use the unquantized checkpoint" in problem.remedy


@pytest.mark.parametrize(
    ("name", "dtype", "method"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "I32", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.qzeros", "I32", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.scales", "F16", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.weight_scale", "F32", "FP8 or compressed-tensors"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "F32", "FP8"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "U8", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "U8", "bitsandbytes 4-bit"),
        ("model.layers.0.mlp.up_proj.SCB", "F32", "bitsandbytes 8-bit"),
        ("model.layers.0.mlp.up_proj.weight", "F8_E4M3", "8-bit floats"),
        ("model.layers.0.mlp.up_proj.weight", "F4", "4-bit floats"),
        ("model.layers.0.mlp.up_proj.weight", "U8", "integer weights"),
        ("model.layers.0.mlp.up_proj.weight", "I8", "integer weights"),
    ],
)
def test_tensors(name: str, dtype: str, method: str) -> None:
    (problem,) = quantization_problems("/m", {}, index(name, dtype))
    assert f"the checkpoint is quantized ({method}): tensor '{name}' of dtype {dtype}" in problem.what


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.mlp.up_proj.weight", "BF16"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "F32"),
        ("model.embeddings.position_ids", "I64"),
        ("model.layers.0.attn.masked_bias", "U8"),
    ],
)
def test_plain_checkpoints_pass(name: str, dtype: str) -> None:
    assert quantization_problems("/m", {"quantization_config": None, "text_config": None}, index(name, dtype)) == []


# --- a leftover: the config names a method, and the weights are plain

DECLARED = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


@pytest.mark.parametrize(
    "config",
    [
        DECLARED,
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
        {"quantization_config": {"x": 1}},
    ],
)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_leftover_is_warned_of(config: dict[str, Any], dtype: str) -> None:
    plain = index("model.layers.0.mlp.up_proj.weight", dtype)
    assert quantization_problems("/m", config, plain) == []
    warning = leftover_warning("/m", config, plain) or ""
    assert warning.startswith("/m: config.json says that the checkpoint is quantized with ")
    assert f"({next(iter(config))}), but its tensors are plain {dtype}: " in warning


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "I32"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "F32"),
        ("model.layers.0.mlp.up_proj.weight", "U8"),
        ("model.layers.0.mlp.up_proj.weight", "F8_E4M3"),
        ("model.layers.0.mlp.up_proj.W_q", "U8"),  # HQQ
        ("model.layers.0.mlp.up_proj.codes", "I16"),  # AQLM
    ],
)
def test_what_tensors_show_is_no_leftover(name: str, dtype: str) -> None:
    (problem,) = quantization_problems("/m", DECLARED, index(name, dtype))
    assert "bitsandbytes (config.json: quantization_config)" in problem.what
    assert leftover_warning("/m", DECLARED, index(name, dtype)) is None


@pytest.mark.parametrize("method", ["bitnet", "fp_quant"])
def test_weights_that_are_quantized_as_the_model_runs_are_no_leftover(method: str) -> None:
    config = {"quantization_config": {"quant_method": method}}
    plain = index("model.layers.0.mlp.up_proj.weight", "BF16")
    assert len(quantization_problems("/m", config, plain)) == 1
    assert leftover_warning("/m", config, plain) is None


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_leftover_of_a_base_is_not_in_the_merge(key: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    left = copy_model(zoo("llama"), tmp_path / "left", config={key: DECLARED["quantization_config"]})
    plan = merge_without_ray(merge_config(left, [left, zoo("llama", seed=1)]), tmp_path / "merged")
    assert plan.config == raymoe.plan(merge_config(zoo("llama"), [left] * 2), allow_all_same=True).config
    (warning,) = (w for w in plan.warnings if "leftover" in w)
    assert warning.startswith(f"{left}: config.json says that the checkpoint is quantized with bitsandbytes ({key})")


def test_a_dense_model_with_a_leftover_becomes_gguf(zoo: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    left = copy_model(zoo("llama"), tmp_path / "left", config=DECLARED)
    files = [
        write_gguf(model, tmp_path / f"{number}.gguf", GgufOptions(type="f32", name="same"))
        for number, model in enumerate((zoo("llama"), left))
    ]
    assert files[0].path.read_bytes() == files[1].path.read_bytes()
    assert any("leftover" in warning for warning in files[1].warnings)
