"""Mixtures as their training teams publish them: made tiny, and saved by the transformers that is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

import raymoe
from raymoe.architectures import find_moe_architecture
from raymoe.errors import CheckpointError
from tests.architectures.pairs import MAX_DIFFERENCE, force_router, load_merged
from tests.architectures.test_mixture_sources import facts_of
from tests.pico import load_dense, logits_of, plan_problems, randomise, token_ids
from tests.runtime.in_process import in_this_process

IS_5 = Version(transformers.__version__).major > 4
_SIZES = {
    "vocab_size": 416,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# Published shapes: experts narrower than `intermediate_size`, shared experts of a width of their own.
_DEEPSEEK = {"n_routed_experts": 4, "n_shared_experts": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
_QWEN = {"num_experts": 4, "moe_intermediate_size": 24}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral, window": ("mixtral", {"num_local_experts": 4, "sliding_window": 12}),
    "qwen2_moe": ("qwen2_moe", {**_QWEN, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("qwen3_moe", {**_QWEN, "head_dim": 16}),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "logits_scaling": 0.7, "residual_multiplier": 0.6}),
    "granitemoeshared": ("granitemoeshared", {"num_local_experts": 4, "shared_intermediate_size": 40}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            "num_local_experts": 4,
            "shared_intermediate_size": 40,
            "layer_types": ["attention", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "position_embedding_type": "rope",
        },
    ),
    "granitemoe_swa": (
        "granitemoe_swa",
        {"num_local_experts": 4, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_DEEPSEEK,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 1.0,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
        },
    ),
    "glm4_moe": (
        "glm4_moe",
        {**_DEEPSEEK, "first_k_dense_replace": 0, "head_dim": 16, "attention_bias": True, "partial_rotary_factor": 0.5},
    ),
    "glm4_moe, norms": (
        "glm4_moe",
        {**_DEEPSEEK, "first_k_dense_replace": 0, "head_dim": 16, "use_qk_norm": True, "partial_rotary_factor": 1.0},
    ),
    "flex_olmo": ("flex_olmo", {"num_experts": 4}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_num_shared_experts": 2,
            "moe_intermediate_size": 24,
            "moe_k": 2,
            "moe_layer_start_index": 0,
            "head_dim": 16,
        },
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"num_experts": 4, "head_dim": 16, "moe_topk": 2}),
    "cohere2_moe": (
        "cohere2_moe",
        {
            "num_experts": 4,
            "num_shared_experts": 1,
            "head_dim": 16,
            "shared_expert_combination_strategy": "sum",
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 12,
        },
    ),
    "lfm2_moe": (
        "lfm2_moe",
        {**_QWEN, "num_dense_layers": 0, "layer_types": ["conv", "full_attention"], "use_expert_bias": True},
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {
            **_QWEN,
            "shared_expert_intermediate_size": 40,
            "head_dim": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 48,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
}
SAVED = ("as published", "as in memory") if IS_5 else ("as published",)


def save_mixture(folder: Path, model_type: str, saved: str, **options: Any) -> Path:
    """A random mixture, saved in the layout of published ones or with the names that transformers 5 has in memory."""
    try:
        config = transformers.AutoConfig.for_model(model_type, **{**_SIZES, **options})
    except ValueError:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model, seed=7)
    architecture = find_moe_architecture({"model_type": model_type})
    assert architecture is not None
    for name, tensor in model.state_dict().items():
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            tensor.copy_(0.1 * torch.randn(tensor.shape))  # affects the choice of experts, and nothing else
        if architecture.shared_router and name.endswith("shared_expert.down_proj.weight"):
            tensor.zero_()  # with a gate, no dense model has it
    model.save_pretrained(folder, **({} if saved == "as published" else {"save_original_format": False}))
    return folder


@pytest.mark.engines
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_of_a_published_mixture_is_a_dense_model(name: str, saved: str, tmp_path: Path) -> None:
    model_type, options = MIXTURES[name]
    folder = save_mixture(tmp_path / "mixture", model_type, saved, **options)
    with in_this_process():
        result = raymoe.extract(folder, 2, tmp_path / "expert")
    assert not result.warnings
    if result.model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {result.model_type}")
    dense, ids = load_dense(tmp_path / "expert"), token_ids(12, rows=2)
    mixture = load_merged(folder)
    force_router(mixture, dense, ids, 2)
    expected = logits_of(mixture, ids)
    assert (logits_of(dense, ids) - expected).abs().max() < MAX_DIFFERENCE
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize(
    ("model_type", "options", "dense"),
    [
        ("deepseek_v3", {**MIXTURES["deepseek_v3"][1], "first_k_dense_replace": 1}, "layer 0"),
        ("glm4_moe", {**MIXTURES["glm4_moe"][1], "first_k_dense_replace": 1}, "layer 0"),
        ("ernie4_5_moe", {**MIXTURES["ernie4_5_moe"][1], "moe_layer_start_index": 1}, "layer 0"),
        ("lfm2_moe", {**MIXTURES["lfm2_moe"][1], "num_dense_layers": 1}, "layer 0"),
        ("qwen3_moe", {**MIXTURES["qwen3_moe"][1], "mlp_only_layers": [0]}, "layer 0"),
    ],
)
def test_mixtures_with_dense_layers_are_refused_with_both_widths(
    model_type: str, options: dict[str, Any], dense: str, tmp_path: Path
) -> None:
    folder = save_mixture(tmp_path / "mixture", model_type, "as published", **options)
    with pytest.raises(CheckpointError, match=rf"{dense} of this .* has no experts, but an FFN of width 96, .* 24"):
        facts_of(f"{folder}#2")


def test_attention_that_no_dense_model_has_is_refused(tmp_path: Path) -> None:
    """GLM-4.5: norms of q and k, and RoPE for a part of each head."""
    options = {**MIXTURES["glm4_moe"][1], "use_qk_norm": True}
    folder = save_mixture(tmp_path / "mixture", "glm4_moe", "as published", **options)
    with pytest.raises(
        CheckpointError, match=r"partial_rotary_factor is 0\.5: no dense model has the attention of this"
    ):
        facts_of(f"{folder}#0")


@pytest.mark.parametrize("saved", SAVED)
def test_experts_of_a_published_mixture_are_merged_with_a_dense_model(
    saved: str, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_mixture(tmp_path / "mixture", "mixtral", saved, num_local_experts=4, num_hidden_layers=3)
    experts = [{"source_model": str(folder), "expert": 3}, {"source_model": str(zoo("mistral", seed=1))}]
    plan = raymoe.plan(base_model=str(zoo("mistral")), experts=experts, gate_mode="random")
    assert plan.architecture == "mixtral"
    assert {type(part.what).__name__ for shard in plan.worker_shards for part in shard.parts} == {"Copy"}


def test_experts_of_another_width_are_refused_with_both_widths(zoo: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_mixture(tmp_path / "mixture", "mixtral", "as published", num_local_experts=4, intermediate_size=80)
    experts = [{"source_model": str(folder), "expert": 3}, {"source_model": str(zoo("mistral", seed=1))}]
    report = plan_problems({"base_model": str(zoo("mistral")), "experts": experts, "gate_mode": "random"})
    assert f"experts[0] ({folder}#3): intermediate_size is 80, but the base's is 96" in report
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 80
