"""Quantised checkpoints are refused by the name of their method."""

from __future__ import annotations

from typing import Any

import pytest

from raymoe.sources.quantised import quantisation_problems
from raymoe.sources.types import CheckpointIndex, SourceFile, TensorEntry

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
        ({"quantization_config": {"quant_method": "awq"}}, "quantised with awq"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised with bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised with fp8"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            "quantised with compressed-tensors",
        ),
        ({"quantization_config": {"x": 1}}, "quantised with an unknown method"),
        ({"compression_config": {"quant_method": "x"}}, "config.json: compression_config"),
        (
            {"text_config": {"quantization_config": {"quant_method": "awq"}}},
            "text_config.quantization_config",
        ),
    ],
)
def test_config(config: dict[str, Any], message: str) -> None:
    (problem,) = quantisation_problems("/m", config, None)
    assert all(part in str(problem) for part in message.split(" ."))
    assert "use the unquantised checkpoint" in problem.remedy


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
    (problem,) = quantisation_problems("/m", {}, index(name, dtype))
    assert f"the checkpoint is quantised ({method}): tensor '{name}' of dtype {dtype}" in problem.what


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
    assert quantisation_problems("/m", {"quantization_config": None, "text_config": None}, index(name, dtype)) == []
