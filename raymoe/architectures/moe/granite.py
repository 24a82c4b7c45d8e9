"""Granite's MoE: multipliers on embeddings, residuals, scores and logits, and the experts of a layer in two tensors.

Sources: transformers' `models/granitemoe`, `models/granitemoeshared`, `models/granitemoehybrid` and
`models/granitemoe_swa`, each read next to its dense sibling.
"""

from __future__ import annotations

from typing import Any

from raymoe.architectures.dense_spec import DenseSpec
from raymoe.architectures.families import FAMILIES
from raymoe.architectures.moe_architecture import (
    BACKBONE,
    EMPTY_SHARED_WIDTH,
    O_BIAS,
    QKV_BIAS,
    ConstantRow,
    MoeArchitecture,
    MoeShape,
    common_reasons,
    fused_experts,
    head_dim_reason,
    no_shared_reasons,
    ungated_shared_reasons,
)
from raymoe.architectures.tensor_tables import ATTENTION, GRANITE4_ROWS, LINEAR
from raymoe.tensor_names import LAYER

# The experts of a layer are two tensors, (experts, 2 * intermediate, hidden) with gate above up, and down.
_MOE = LAYER + "block_sparse_moe."
_EXPERTS = {
    "ffn.gate": _MOE + "input_linear.weight",
    "ffn.up": _MOE + "input_linear.weight",
    "ffn.down": _MOE + "output_linear.weight",
}
_SHARED = {
    "ffn.gate": LAYER + "shared_mlp.input_linear.weight",
    "ffn.up": LAYER + "shared_mlp.input_linear.weight",
    "ffn.down": LAYER + "shared_mlp.output_linear.weight",
}


def _moe_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    # For a family without Granite's multipliers: with these values they have no effect.
    multipliers: dict[str, Any] = {
        "attention_multiplier": spec.head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }
    return {
        **{key: value for key, value in multipliers.items() if key not in spec.extra},
        "intermediate_size": moe.width(spec),
        "num_local_experts": moe.experts,
        "attention_bias": spec.qkv_bias or spec.o_bias,
        "shared_intermediate_size": 0,
        "output_router_logits": False,
    }


def _moe_unsupported(spec: DenseSpec, moe: MoeShape) -> list[str]:
    return _attention_reasons(spec) + no_shared_reasons(moe)


def _bias_constants(spec: DenseSpec, moe: MoeShape) -> tuple[ConstantRow, ...]:
    """`attention_bias` is one key for q, k, v and the output projection. A family with only the former gets zeros."""
    bias = ConstantRow(name=O_BIAS["attn.o.bias"], shape=("hidden",), is_of_attention=True)
    return (bias,) if spec.qkv_bias and not spec.o_bias else ()


def _attention_reasons(spec: DenseSpec) -> list[str]:
    reasons = common_reasons(spec) + head_dim_reason(spec)
    if spec.sliding_window:
        reasons.append(f"sliding_window {spec.sliding_window}: its attention has none")
    if spec.layers_of(LINEAR):
        reasons.append(f"{len(spec.layers_of(LINEAR))} layers with Mamba: all of its layers have attention")
    if spec.extra.get("position_embedding_type", "rope") != "rope":
        reasons.append(f"position_embedding_type {spec.extra['position_embedding_type']!r}: it has RoPE in every layer")
    return reasons


def _shared_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    return {**_moe_config(spec, moe), "shared_intermediate_size": spec.intermediate * moe.shared}


def _shared_unsupported(spec: DenseSpec, moe: MoeShape) -> list[str]:
    return _attention_reasons(spec) + ungated_shared_reasons(moe)


_NO_MAMBA: dict[str, Any] = {
    key: FAMILIES["granitemoehybrid"].defaults[key]
    for key in FAMILIES["granitemoehybrid"].carried
    if key.startswith(("mamba_", "time_step_"))
}


def _hybrid_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    # transformers 4 knows only these names of layer kinds, and transformers 5 accepts them.
    kinds = {LINEAR: "mamba", ATTENTION: "attention"}
    # For a family without Mamba layers: sizes that are checked all the same.
    inner = _NO_MAMBA["mamba_expand"] * spec.hidden
    mamba = {**_NO_MAMBA, "mamba_n_heads": spec.heads, "mamba_d_head": inner // spec.heads}
    return {
        **_moe_config(spec, moe),
        **{key: value for key, value in mamba.items() if key not in spec.extra},
        "layer_types": [kinds[kind] for kind in spec.kinds or [ATTENTION] * spec.layers],
        # Without RoPE, configs have null here, which engines take for the default, RoPE, or refuse.
        "position_embedding_type": "rope" if spec.extra.get("position_embedding_type", "rope") == "rope" else "nope",
        "shared_intermediate_size": spec.intermediate * moe.shared or EMPTY_SHARED_WIDTH,
    }


def _hybrid_unsupported(spec: DenseSpec, moe: MoeShape) -> list[str]:
    return common_reasons(spec) + head_dim_reason(spec) + ungated_shared_reasons(moe)


def _hybrid_constants(spec: DenseSpec, moe: MoeShape) -> tuple[ConstantRow, ...]:
    if moe.shared:
        return ()
    width = EMPTY_SHARED_WIDTH
    return (
        ConstantRow(name=_SHARED["ffn.gate"], shape=(2 * width, "hidden")),
        ConstantRow(name=_SHARED["ffn.down"], shape=("hidden", width)),
    )


# --- With windows: RoPE and windows per layer, a sink per head

# A head's output is multiplied by sigmoid(logsumexp(its scores) - sink). A family without sinks gets this value, with
# which the factor is exactly 1. bfloat16 and float16 can represent it.
_NO_SINK = -9984.0
_SINKS = LAYER + "self_attn.sinks"


def _swa_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    keys = {
        "layer_rope_theta": None,  # of a family that has no such key: one RoPE for all layers
        **_moe_config(spec, moe),
        "head_dim": spec.head_dim,
        "shared_intermediate_size": spec.intermediate * moe.shared,
        "layer_types": spec.window_types,
        "sliding_window": spec.sliding_window or spec.max_positions,
    }
    if "no_rope_layers" in spec.extra:
        keys["layer_rope_theta"] = [spec.rope_theta if rope else 0 for rope in spec.extra["no_rope_layers"]]
    return {key: value for key, value in keys.items() if key not in spec.extra}


def _swa_unsupported(spec: DenseSpec, moe: MoeShape) -> list[str]:
    return common_reasons(spec, mixed_windows=True) + ungated_shared_reasons(moe)


def _swa_constants(spec: DenseSpec, moe: MoeShape) -> tuple[ConstantRow, ...]:
    if spec.family.has_sinks:
        return ()
    return (ConstantRow(name=_SINKS, shape=("heads",), value=_NO_SINK, is_of_attention=True),)


# granitemoehybrid comes before granitemoeshared, for which mlx-lm has no class. RoPE scaling it leaves out there.
GRANITE_ARCHITECTURES = (
    MoeArchitecture(
        name="granitemoe",
        title="Granite MoE",
        model_type="granitemoe",
        class_name="GraniteMoeForCausalLM",
        accepts=("granite", "granitemoehybrid", "llama", "mistral", "qwen2"),
        backbone={**BACKBONE, **QKV_BIAS, **O_BIAS},
        expert=_EXPERTS,
        router=_MOE + "router.layer.weight",
        constants=_bias_constants,
        config=_moe_config,
        unsupported_reasons=_moe_unsupported,
        dense_family="granite",
        experts_key="num_local_experts",
        min_transformers="4.57",
        reads_tokenizer_as_is=True,
    ),
    MoeArchitecture(
        name="granitemoehybrid",
        title="Granite MoE with Mamba",
        model_type="granitemoehybrid",
        class_name="GraniteMoeHybridForCausalLM",
        accepts=("granitemoehybrid", "granite"),
        backbone={row.role: row.name for row in GRANITE4_ROWS if not row.is_ffn},
        expert=_EXPERTS,
        router=_MOE + "router.layer.weight",
        shared=_SHARED,
        constants=_hybrid_constants,
        config=_hybrid_config,
        unsupported_reasons=_hybrid_unsupported,
        dense_family="granitemoehybrid",
        dense_keys={"num_local_experts": 0},
        experts_key="num_local_experts",
        min_transformers="4.57",
        note="without a shared expert there is one of zeros",
        second_choice_for=("scales_rope",),
        written_for={'position_embedding_type: "nope"': "mlx-lm 0.32.2 and mistral.rs 0.9.5"},
        reads_tokenizer_as_is=True,
    ),
    MoeArchitecture(
        name="granitemoeshared",
        title="Granite MoE with a shared expert",
        model_type="granitemoeshared",
        class_name="GraniteMoeSharedForCausalLM",
        accepts=("granite", "granitemoehybrid"),
        backbone={**BACKBONE, **QKV_BIAS, **O_BIAS},
        expert=_EXPERTS,
        router=_MOE + "router.layer.weight",
        shared=_SHARED,
        config=_shared_config,
        unsupported_reasons=_shared_unsupported,
        dense_family="granite",
        experts_key="num_local_experts",
        shared_key="shared_intermediate_size",
        min_transformers="4.57",
        reads_tokenizer_as_is=True,
    ),
    MoeArchitecture(
        name="granitemoe_swa",
        title="Granite MoE with windows",
        model_type="granitemoe_swa",
        class_name="GraniteMoeSWAForCausalLM",
        accepts=("granite_swa", "smollm3", "ministral", "cwm"),
        backbone={**BACKBONE, **QKV_BIAS, **O_BIAS, "attn.sinks": _SINKS},
        expert=fused_experts("block_sparse_moe."),
        router=_MOE + "router.weight",
        shared=_SHARED,
        constants=_swa_constants,
        config=_swa_config,
        unsupported_reasons=_swa_unsupported,
        dense_family="granite_swa",
        experts_key="num_local_experts",
        shared_key="shared_intermediate_size",
        min_transformers="5.23",
        note="transformers runs its attention, as that of Granite with windows, without SDPA, which is slower",
    ),
)
