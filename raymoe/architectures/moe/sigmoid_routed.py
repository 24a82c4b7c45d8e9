"""Architectures whose routers score by sigmoid, in the manner of DeepSeek-V3.

Scores of the chosen experts are made to sum to one, and the bias that affects the choice is zero. So a merge of copies
of one model computes what that model computes. Each has a shared expert in every layer. Sources: transformers'
`models/deepseek_v3` and `models/glm4_moe`.
"""

from __future__ import annotations

from typing import Any

from raymoe.architectures.dense_family import FFN_ROLES
from raymoe.architectures.dense_spec import DenseSpec
from raymoe.architectures.moe_architecture import (
    BACKBONE,
    EXPERTS,
    QK_NORM,
    QKV_BIAS,
    ConstantRow,
    MoeArchitecture,
    MoeShape,
    ungated_shared_reasons,
    zero_ffn,
)
from raymoe.architectures.moe_layers import layers_after_dense
from raymoe.architectures.tensor_tables import MLA_ROWS
from raymoe.tensor_names import LAYER

_SHARED = {role: f"{LAYER}mlp.shared_experts.{role[4:]}_proj.weight" for role in FFN_ROLES}


def _routing(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    return {
        "n_routed_experts": moe.experts,
        "n_shared_experts": max(1, moe.shared_widths),
        "moe_intermediate_size": moe.width(spec),
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
        "output_router_logits": False,
        "attention_bias": spec.qkv_bias,
    }


def _glm4_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    keys = {"head_dim": spec.head_dim, "use_qk_norm": spec.qk_norm, "partial_rotary_factor": spec.partial_rotary}
    return {**_routing(spec, moe), **keys}


def _reasons(spec: DenseSpec, moe: MoeShape) -> list[str]:
    reasons = ungated_shared_reasons(moe)
    if spec.mlp_bias:
        reasons.append("mlp_bias: its experts have no bias")
    if moe.experts == 1:
        reasons.append("1 expert: its router compares the two best")
    return reasons


def _glm4_unsupported(spec: DenseSpec, moe: MoeShape) -> list[str]:
    reasons = _reasons(spec, moe)
    if spec.o_bias:
        reasons.append("bias of attention's output projection: its attention has none")
    if spec.rotary_dim % 2:
        reasons.append(f"partial_rotary_factor {spec.partial_rotary:g}: {spec.rotary_dim} dimensions are no pairs")
    if spec.sliding_window:
        reasons.append(f"sliding_window {spec.sliding_window}: its attention has none")
    return reasons


def _constants(spec: DenseSpec, moe: MoeShape) -> tuple[ConstantRow, ...]:
    bias = ConstantRow(name=LAYER + "mlp.gate.e_score_correction_bias", shape=(moe.experts,))
    return (bias,) if moe.shared else (bias, *zero_ffn(_SHARED, moe.width(spec)))


# By their code, neither ties the head to the embedding in these classes; run with tiny models.
_TIED_HEAD_FOR = "vLLM 0.32.0 and mlx-lm 0.32.2"
_NOTE = "without a shared expert there is one of zeros, as wide as the experts"

SIGMOID_ROUTED_ARCHITECTURES = (
    MoeArchitecture(
        name="glm4_moe",
        title="GLM-4.5 MoE",
        model_type="glm4_moe",
        class_name="Glm4MoeForCausalLM",
        accepts=("seed_oss", "phi3", "llama", "mistral", "internlm3", "iquestcoder", "qwen2", "qwen3", "glm"),
        backbone={**BACKBONE, **QKV_BIAS, **QK_NORM},
        expert=EXPERTS,
        router=LAYER + "mlp.gate.weight",
        shared=_SHARED,
        constants=_constants,
        tied_head_for=_TIED_HEAD_FOR,
        config=_glm4_config,
        unsupported_reasons=_glm4_unsupported,
        layer_rule=layers_after_dense("first_k_dense_replace", default=1, also={"moe_layer_freq": 1}),
        dense_family="seed_oss",
        qk_norm_family="qwen3",
        partial_rotary_family="glm",
        experts_key="n_routed_experts",
        renormalize_key="norm_topk_prob",
        aliases={"n_routed_experts": "num_local_experts"},
        score_function="sigmoid",
        min_transformers="4.57",
        note=_NOTE,
        reads_tokenizer_as_is=True,
    ),
    MoeArchitecture(
        name="deepseek_v3",
        title="DeepSeek-V3",
        model_type="deepseek_v3",
        class_name="DeepseekV3ForCausalLM",
        accepts=("youtu",),
        backbone={row.role: row.name for row in MLA_ROWS if not row.is_ffn},
        expert=EXPERTS,
        router=LAYER + "mlp.gate.weight",
        shared=_SHARED,
        constants=_constants,
        tied_head_for=_TIED_HEAD_FOR,
        config=_routing,
        unsupported_reasons=_reasons,
        layer_rule=layers_after_dense("first_k_dense_replace", default=3, also={"moe_layer_freq": 1}),
        dense_family="youtu",
        experts_key="n_routed_experts",
        renormalize_key="norm_topk_prob",
        aliases={"n_routed_experts": "num_local_experts"},
        score_function="sigmoid",
        min_transformers="4.57",
        note=_NOTE,
    ),
)
