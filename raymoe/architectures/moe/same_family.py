"""Architectures that are the MoE of one family: its attention, norms and multipliers, with routers and experts.

Sources: transformers' `models/flex_olmo`, `models/ernie4_5_moe`, `models/hunyuan_v1_moe`, `models/cohere2_moe` and
`models/lfm2_moe`, each read next to its dense sibling.
"""

from __future__ import annotations

from typing import Any

from raymoe.architectures.dense_family import FFN_ROLES
from raymoe.architectures.dense_spec import DenseSpec
from raymoe.architectures.moe_architecture import (
    BACKBONE,
    EXPERTS,
    O_BIAS,
    PER_TOKEN_KEY,
    QK_NORM,
    QKV_BIAS,
    ConstantRow,
    MoeArchitecture,
    MoeShape,
    bias_reasons,
    common_reasons,
    head_dim_reason,
    no_shared_reasons,
    ungated_shared_reasons,
    zero_ffn,
)
from raymoe.architectures.moe_layers import MLP_LAYER_TYPES, MOE_LAYER_INTERVAL, layers_after_dense
from raymoe.architectures.tensor_tables import LFM2_ROWS
from raymoe.tensor_names import LAYER


def _flex_olmo_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    return {
        "intermediate_size": moe.width(spec),
        "num_experts": moe.experts,
        "norm_topk_prob": True,
        "attention_bias": spec.qkv_bias,
        "output_router_logits": False,
    }


def _flex_olmo_unsupported(spec: DenseSpec, moe: MoeShape) -> list[str]:
    return common_reasons(spec) + head_dim_reason(spec) + no_shared_reasons(moe)


# --- ERNIE 4.5: chooses by softmax plus a bias, which is zero here

_ERNIE_SHARED = {role: f"{LAYER}mlp.shared_experts.{role[4:]}_proj.weight" for role in FFN_ROLES}


def _ernie_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    return {
        "head_dim": spec.head_dim,
        "use_bias": False,
        "moe_num_experts": moe.experts,
        "moe_k": moe.experts_per_token,
        "moe_num_shared_experts": moe.shared_widths,
        "moe_intermediate_size": moe.width(spec),
        "moe_norm_min": 1e-12,
        "output_router_logits": False,
    }


def _ernie_unsupported(spec: DenseSpec, moe: MoeShape) -> list[str]:
    return common_reasons(spec) + bias_reasons(spec, qkv=False, o=False) + ungated_shared_reasons(moe)


def _ernie_constants(spec: DenseSpec, moe: MoeShape) -> tuple[ConstantRow, ...]:
    return (ConstantRow(name=LAYER + "mlp.moe_statics.e_score_correction_bias", shape=(1, moe.experts)),)


# --- Hunyuan v1: always has a shared expert, as wide as the others

_HUNYUAN_SHARED = {role: f"{LAYER}mlp.shared_mlp.{role[4:]}_proj.weight" for role in FFN_ROLES}
_HUNYUAN_NORMS = {
    "attn.q_norm": LAYER + "self_attn.query_layernorm.weight",
    "attn.k_norm": LAYER + "self_attn.key_layernorm.weight",
}


def _hunyuan_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    return {
        "head_dim": spec.head_dim,
        "attention_bias": spec.qkv_bias,
        "num_experts": moe.experts,
        "moe_topk": moe.experts_per_token,
        "intermediate_size": moe.width(spec),
        "moe_intermediate_size": moe.width(spec),
        # Keys of the published model's own code, which vLLM reads.
        "use_mixed_mlp_moe": True,
        "num_shared_expert": 1,
        "use_qk_norm": True,
        "output_router_logits": False,
    }


def _hunyuan_unsupported(spec: DenseSpec, moe: MoeShape) -> list[str]:
    reasons = common_reasons(spec) + ungated_shared_reasons(moe)
    if moe.shared > 1:
        reasons.append(f"{moe.shared} shared experts: it has one, as wide as an expert")
    if moe.shared and moe.granularity > 1:
        reasons.append(f"granularity {moe.granularity} with shared_experts: its shared expert is as wide as an expert")
    return reasons


def _hunyuan_constants(spec: DenseSpec, moe: MoeShape) -> tuple[ConstantRow, ...]:
    return () if moe.shared else zero_ffn(_HUNYUAN_SHARED, moe.width(spec))


# --- Cohere 2: layers with a window have RoPE, the others have none; one LayerNorm for attention and FFN


def _cohere2_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    return {
        "head_dim": spec.head_dim,
        "rms_norm_eps": None,  # a number there means RMSNorm in place of LayerNorm
        "layer_norm_eps": spec.rms_norm_eps,
        # This configuration has `rope_scaling` as a key, but transformers does not read it.
        **({"rope_parameters": {"rope_theta": spec.rope_theta, **spec.rope_scaling}} if spec.rope_scaling else {}),
        "attention_bias": spec.qkv_bias,
        "layer_types": spec.window_types,
        "intermediate_size": moe.width(spec),
        "num_experts": moe.experts,
        "num_shared_experts": moe.shared_widths,
        "shared_expert_combination_strategy": "sum",
        "expert_selection_fn": "softmax",
        "output_router_logits": False,
    }


def _cohere2_unsupported(spec: DenseSpec, moe: MoeShape) -> list[str]:
    return ungated_shared_reasons(moe)


# --- LFM2: some layers have a short convolution in place of attention

# transformers divides the scores of the chosen experts by their sum plus this number. Each score is between 0.5 and 1
# if it is the best of several. The factor that is exact for scores of 0.75 leaves at most a quarter of the error (see
# _lfm2_config).
_LFM2_EPSILON = 1e-6


def _lfm2_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    return {
        # Beside rope_theta: some engines read only the newer form.
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta, **(spec.rope_scaling or {})},
        "rms_norm_eps": None,
        "norm_eps": spec.rms_norm_eps,
        "layer_types": list(spec.kinds),
        "num_experts": moe.experts,
        "moe_intermediate_size": moe.width(spec),
        "use_expert_bias": False,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0 + _LFM2_EPSILON / (0.75 * moe.experts_per_token),
        "output_router_logits": False,
    }


def _lfm2_unsupported(spec: DenseSpec, moe: MoeShape) -> list[str]:
    return head_dim_reason(spec) + no_shared_reasons(moe)


_LFM2_EXPERT = {"ffn.gate": "w1", "ffn.down": "w2", "ffn.up": "w3"}
_LFM2_FFN = {role: f"{LAYER}feed_forward.{w}.weight" for role, w in _LFM2_EXPERT.items()}

SAME_FAMILY_ARCHITECTURES = (
    MoeArchitecture(
        name="flex_olmo",
        title="FlexOlmo",
        model_type="flex_olmo",
        class_name="FlexOlmoForCausalLM",
        accepts=("olmo2",),
        backbone={
            **{role: name for role, name in BACKBONE.items() if role != "norm.input"},
            "norm.post_ffn": LAYER + "post_feedforward_layernorm.weight",
            **QKV_BIAS,
            **O_BIAS,
            **QK_NORM,
        },
        expert=EXPERTS,
        router=LAYER + "mlp.gate.weight",
        config=_flex_olmo_config,
        unsupported_reasons=_flex_olmo_unsupported,
        dense_family="olmo2",
        renormalize_key="norm_topk_prob",
        aliases={"num_experts": "num_local_experts"},
        min_transformers="4.57",
        runs_in_llama_cpp=lambda moe: False,
    ),
    MoeArchitecture(
        name="ernie4_5_moe",
        title="ERNIE 4.5 MoE",
        model_type="ernie4_5_moe",
        class_name="Ernie4_5_MoeForCausalLM",
        accepts=("ernie4_5", "helium"),
        backbone=BACKBONE,
        expert=EXPERTS,
        router=LAYER + "mlp.gate.weight",
        shared=_ERNIE_SHARED,
        constants=_ernie_constants,
        config=_ernie_config,
        unsupported_reasons=_ernie_unsupported,
        layer_rule=MOE_LAYER_INTERVAL,
        dense_family="ernie4_5",
        experts_key="moe_num_experts",
        shared_key="moe_num_shared_experts",
        aliases={"moe_num_experts": "num_experts", PER_TOKEN_KEY: "moe_k"},
        min_transformers="4.57",
        reads_tokenizer_as_is=True,
    ),
    MoeArchitecture(
        name="hunyuan_v1_moe",
        title="Hunyuan MoE",
        model_type="hunyuan_v1_moe",
        class_name="HunYuanMoEV1ForCausalLM",
        accepts=("hunyuan_v1_dense",),
        backbone={**BACKBONE, **QKV_BIAS, **O_BIAS, **_HUNYUAN_NORMS},
        expert=EXPERTS,
        router=LAYER + "mlp.gate.wg.weight",
        shared=_HUNYUAN_SHARED,
        constants=_hunyuan_constants,
        config=_hunyuan_config,
        unsupported_reasons=_hunyuan_unsupported,
        dense_family="hunyuan_v1_dense",
        aliases={"num_experts": "num_local_experts", PER_TOKEN_KEY: "moe_topk"},
        min_transformers="4.57",
        note="without a shared expert there is one of zeros, as wide as the experts",
    ),
    MoeArchitecture(
        name="cohere2_moe",
        title="Cohere 2 MoE",
        model_type="cohere2_moe",
        class_name="Cohere2MoeForCausalLM",
        accepts=("cohere2", "cohere"),
        backbone={
            **{role: name for role, name in BACKBONE.items() if role != "norm.post"},
            **QKV_BIAS,
            **O_BIAS,
        },
        expert=EXPERTS,
        router=LAYER + "mlp.gate.weight",
        shared=_ERNIE_SHARED,
        config=_cohere2_config,
        unsupported_reasons=_cohere2_unsupported,
        layer_rule=MLP_LAYER_TYPES,
        dense_family="cohere2",
        shared_key="num_shared_experts",
        min_transformers="5.23",
        runs_in_llama_cpp=lambda moe: not moe.shared,  # llama.cpp averages with the shared expert
    ),
    MoeArchitecture(
        name="lfm2_moe",
        title="LFM2 MoE",
        model_type="lfm2_moe",
        class_name="Lfm2MoeForCausalLM",
        accepts=("lfm2",),
        backbone={row.role: row.name for row in LFM2_ROWS if not row.is_ffn},
        expert={r: f"{LAYER}feed_forward.experts.{{expert}}.{w}.weight" for r, w in _LFM2_EXPERT.items()},
        router=LAYER + "feed_forward.gate.weight",
        config=_lfm2_config,
        unsupported_reasons=_lfm2_unsupported,
        layer_rule=layers_after_dense("num_dense_layers", default=2, ffn=_LFM2_FFN),
        dense_family="lfm2",
        dense_keys={"block_auto_adjust_ff_dim": False},
        renormalize_key="norm_topk_prob",
        score_function="sigmoid",
        min_transformers="5.23",
        note="the chosen scores are divided by their sum plus 1e-6; routed_scaling_factor compensates for that",
        written_for={"rope_parameters": "mistral.rs 0.9.5"},
    ),
)
