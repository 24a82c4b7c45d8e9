"""Different experts: each expert alone gives the base with its FFN. And the names that tensors have."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.architectures.pairs import (
    MAX_DIFFERENCE,
    PAIRS,
    Mixture,
    Pair,
    force_router,
    graft,
    load_merged,
    moe_blocks,
)
from tests.pico import load_dense, logits_of, tensors_of, token_ids

pytestmark = pytest.mark.engines

GRANITE_NAMES = {
    "block_sparse_moe.router.layer.weight",
    "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.output_linear.weight",
}


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_each_expert_alone_is_the_base_with_its_ffn(
    pair: Pair, mixture: Callable[..., Mixture], record_property: Callable[[str, object], None]
) -> None:
    merged = mixture(pair)
    model, reference, ids = load_merged(merged.folder), load_dense(merged.base), token_ids(12, rows=2)
    gates = None
    if pair.gates_shared:
        gates = [block.shared_expert_gate.weight.detach() for block in moe_blocks(model)]
    results, worst = [], 0.0
    for number, expert in enumerate(merged.experts):
        graft(reference, expert, merged.shared_or_none, gates)
        force_router(model, reference, ids, number)
        expected = logits_of(reference, ids)
        worst = max(worst, (logits_of(model, ids) - expected).abs().max().item())
        assert worst < MAX_DIFFERENCE
        results.append(expected)
    assert (results[0] - results[1]).abs().max() > 0.1, "experts that agree prove nothing"
    record_property("pair", str(pair))  # for the table in docs/families.md
    record_property("difference", worst)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_tensors_have_the_names_of_the_hub_layout(pair: Pair, mixture: Callable[..., Mixture]) -> None:
    names = set(tensors_of(mixture(pair).folder))
    layer = "model.layers.0."
    expected = {
        "mixtral": {
            "block_sparse_moe.gate.weight",
            "block_sparse_moe.experts.2.w1.weight",
            "block_sparse_moe.experts.2.w2.weight",
            "block_sparse_moe.experts.2.w3.weight",
        },
        "qwen2_moe": {
            "mlp.gate.weight",
            "mlp.experts.2.gate_proj.weight",
            "mlp.shared_expert.down_proj.weight",
            "mlp.shared_expert_gate.weight",
            "self_attn.q_proj.bias",
        },
        "qwen3_moe": {"mlp.gate.weight", "mlp.experts.2.up_proj.weight", "self_attn.q_norm.weight"},
        "deepseek": {"mlp.gate.weight", "mlp.experts.2.down_proj.weight"},
        "flex_olmo": {"mlp.gate.weight", "mlp.experts.2.up_proj.weight", "post_feedforward_layernorm.weight"},
        "granitemoe": GRANITE_NAMES,
        "granitemoeshared": GRANITE_NAMES | {"shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight"},
        "granitemoehybrid": GRANITE_NAMES | {"shared_mlp.input_linear.weight"},
        "granitemoe_swa": {
            "block_sparse_moe.experts.gate_up_proj",
            "block_sparse_moe.experts.down_proj",
            "block_sparse_moe.router.weight",
            "self_attn.sinks",
        },
        "ernie4_5_moe": {
            "mlp.gate.weight",
            "mlp.moe_statics.e_score_correction_bias",
            "mlp.experts.2.gate_proj.weight",
        },
        "hunyuan_v1_moe": {
            "mlp.gate.wg.weight",
            "mlp.shared_mlp.up_proj.weight",
            "mlp.experts.2.up_proj.weight",
            "self_attn.query_layernorm.weight",
        },
        "cohere2_moe": {"mlp.gate.weight", "mlp.experts.2.up_proj.weight"},
        "qwen3_5_moe": {
            "mlp.gate.weight",
            "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj",
            "mlp.shared_expert_gate.weight",
        },
        "glm4_moe": {
            "mlp.gate.e_score_correction_bias",
            "mlp.experts.2.up_proj.weight",
            "mlp.shared_experts.up_proj.weight",
        },
        "deepseek_v3": {
            "mlp.gate.e_score_correction_bias",
            "mlp.experts.2.up_proj.weight",
            "self_attn.q_a_proj.weight",
        },
        "gemma4_moe": {
            "experts.gate_up_proj",
            "experts.down_proj",
            "router.proj.weight",
            "router.per_expert_scale",
            "router.scale",
            "pre_feedforward_layernorm_2.weight",
            "layer_scalar",
        },
        "lfm2_moe": {"feed_forward.gate.weight", "feed_forward.experts.2.w1.weight", "conv.conv.weight"},
    }[pair.host]
    if "mamba" in pair.options.get("layer_types", ()):
        expected = expected | {"mamba.in_proj.weight", "mamba.A_log"}
    if pair.shared and pair.host in ("deepseek", "ernie4_5_moe", "cohere2_moe"):
        expected = expected | {"mlp.shared_experts.up_proj.weight"}
    assert {layer + name for name in expected} <= names
    assert not any("experts.3." in name or name.startswith("model.layers.3.") for name in names)
