"""The MoE architectures that take the Llama-like families.

Sources: transformers' `models/mixtral`, `models/qwen2_moe`, `models/qwen3_moe`; for DeepSeek-MoE v1 its paper
(https://arxiv.org/abs/2401.06066) and the published config of deepseek-ai/deepseek-moe-16b-base.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raymoe.architectures.dense_family import FFN_ROLES
from raymoe.architectures.dense_spec import DenseSpec
from raymoe.architectures.moe_architecture import (
    BACKBONE,
    EMPTY_SHARED_WIDTH,
    EXPERTS,
    O_BIAS,
    QK_NORM,
    QKV_BIAS,
    ConstantRow,
    MoeArchitecture,
    MoeShape,
    bias_reasons,
    common_reasons,
    fused_experts,
    head_dim_reason,
    ungated_shared_reasons,
    zero_ffn,
)
from raymoe.architectures.moe_layers import MLP_ONLY_LAYERS, MOE_LAYER_FREQ
from raymoe.architectures.tensor_tables import QWEN3_5_ROWS
from raymoe.tensor_names import LAYER

_LLAMAS = ("llama", "mistral", "internlm3", "phi3", "iquestcoder")
_MIXTRAL_NAMES = {"ffn.gate": "w1", "ffn.down": "w2", "ffn.up": "w3"}


def _mixtral_unsupported(spec: DenseSpec, moe: MoeShape) -> list[str]:
    reasons = common_reasons(spec) + bias_reasons(spec, qkv=False, o=False)
    if moe.shared:
        reasons.append("shared_experts: it has none")
    return reasons


def _mixtral_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    return {
        "intermediate_size": moe.width(spec),
        "num_local_experts": moe.experts,
        "head_dim": spec.head_dim,
        "output_router_logits": False,
    }


def _qwen_keys(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    return {
        "num_experts": moe.experts,
        "moe_intermediate_size": moe.width(spec),
        "norm_topk_prob": True,
        "output_router_logits": False,
        "use_sliding_window": spec.sliding_window is not None,
        "max_window_layers": 0 if spec.sliding_window else spec.layers,
    }


def _qwen2_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    window = spec.sliding_window is not None
    keys = {
        **_qwen_keys(spec, moe),
        "qkv_bias": True,
        "shared_expert_intermediate_size": spec.intermediate * moe.shared or EMPTY_SHARED_WIDTH,
    }
    if window:
        # transformers 5 derives other layers from max_window_layers than transformers 4 did, so the layers are listed.
        keys["layer_types"] = spec.window_types
    return keys


def _qwen2_unsupported(spec: DenseSpec, moe: MoeShape) -> list[str]:
    reasons = common_reasons(spec, mixed_windows=True) + bias_reasons(spec, qkv=True, o=False)
    return reasons + head_dim_reason(spec) + _gated_shared_reasons(moe)


def _gated_shared_reasons(moe: MoeShape) -> list[str]:
    if moe.shared and moe.needs_prompts and not moe.shared_has_prompts:
        return ["a shared expert without positive_prompts: its shared expert has a gate"]
    return []


def _qwen2_constants(spec: DenseSpec, moe: MoeShape) -> tuple[ConstantRow, ...]:
    rows: list[ConstantRow] = []
    if not spec.qkv_bias:
        # Not every program honors `qkv_bias: false`; zeros have the same effect in all of them.
        widths = {"q": "q_out", "k": "kv_out", "v": "kv_out"}
        rows += [
            ConstantRow(name=QKV_BIAS[f"attn.{p}.bias"], shape=(width,), is_of_attention=True)
            for p, width in widths.items()
        ]
    return (*rows, *_empty_shared(spec, moe))


def _empty_shared(spec: DenseSpec, moe: MoeShape) -> tuple[ConstantRow, ...]:
    if moe.shared:
        return ()
    gate = ConstantRow(name=LAYER + "mlp.shared_expert_gate.weight", shape=(1, "hidden"))
    return (*zero_ffn(_QWEN2_SHARED, EMPTY_SHARED_WIDTH), gate)


_QWEN2_SHARED = {role: f"{LAYER}mlp.shared_expert.{role[4:]}_proj.weight" for role in FFN_ROLES}


def _qwen3_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    return {**_qwen_keys(spec, moe), "head_dim": spec.head_dim, "attention_bias": spec.qkv_bias}


def _qwen3_unsupported(spec: DenseSpec, moe: MoeShape) -> list[str]:
    return common_reasons(spec) + (["shared_experts: it has none"] if moe.shared else [])


def _qwen3_5_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    return {
        "head_dim": spec.head_dim,
        "attention_bias": spec.qkv_bias,
        "layer_types": list(spec.kinds),
        # Of engines that do not read layer_types. With null they refuse layers that follow no interval.
        "full_attention_interval": spec.attention_interval,
        "num_experts": moe.experts,
        "moe_intermediate_size": moe.width(spec),
        "shared_expert_intermediate_size": spec.intermediate * moe.shared or EMPTY_SHARED_WIDTH,
        "output_router_logits": False,
    }


def _qwen3_5_unsupported(spec: DenseSpec, moe: MoeShape) -> list[str]:
    return _gated_shared_reasons(moe)


_DEEPSEEK_ROPE = ("linear", "dynamic")
_DEEPSEEK_CODE = "deepseek-ai/deepseek-moe-16b-base"


def _deepseek_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    scaling = None
    if spec.rope_scaling:
        # The old form: exactly these two fields. Its configuration class refuses any other.
        scaling = {"type": spec.rope_scaling["rope_type"], "factor": spec.rope_scaling["factor"]}
    return {
        "n_routed_experts": moe.experts,
        "n_shared_experts": moe.shared_widths or None,
        "moe_intermediate_size": moe.width(spec),
        "scoring_func": "softmax",
        "norm_topk_prob": True,
        "attention_bias": spec.qkv_bias,
        "rope_scaling": scaling,
        "auto_map": {
            "AutoConfig": f"{_DEEPSEEK_CODE}--configuration_deepseek.DeepseekConfig",
            "AutoModel": f"{_DEEPSEEK_CODE}--modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": f"{_DEEPSEEK_CODE}--modeling_deepseek.DeepseekForCausalLM",
        },
    }


def _deepseek_unsupported(spec: DenseSpec, moe: MoeShape) -> list[str]:
    reasons = common_reasons(spec)
    if spec.sliding_window:
        reasons.append(f"sliding_window {spec.sliding_window}: its attention has none")
    reasons += head_dim_reason(spec)
    if spec.rope_scaling and spec.rope_scaling["rope_type"] not in _DEEPSEEK_ROPE:
        kind = spec.rope_scaling["rope_type"]
        reasons.append(f"RoPE scaling {kind!r}: it knows {', '.join(_DEEPSEEK_ROPE)}")
    reasons += ungated_shared_reasons(moe)
    if moe.experts_per_token == 1:
        reasons.append("experts_per_token 1: it renormalizes router weights only for two experts or more")
    return reasons


_QWEN3 = MoeArchitecture(
    name="qwen3_moe",
    title="Qwen3 MoE",
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    accepts=("qwen3",),
    backbone={**BACKBONE, **QKV_BIAS, **O_BIAS, **QK_NORM},
    expert=EXPERTS,
    router=LAYER + "mlp.gate.weight",
    config=_qwen3_config,
    unsupported_reasons=_qwen3_unsupported,
    layer_rule=MLP_ONLY_LAYERS,
    dense_family="qwen3",
    renormalize_key="norm_topk_prob",
    aliases={"num_experts": "num_local_experts"},
    min_transformers="4.57",
)

LLAMA_LIKE_ARCHITECTURES = (
    MoeArchitecture(
        name="mixtral",
        title="Mixtral",
        model_type="mixtral",
        class_name="MixtralForCausalLM",
        accepts=(*_LLAMAS, "ministral"),
        backbone=BACKBONE,
        expert={r: f"{LAYER}block_sparse_moe.experts.{{expert}}.{w}.weight" for r, w in _MIXTRAL_NAMES.items()},
        router=LAYER + "block_sparse_moe.gate.weight",
        config=_mixtral_config,
        unsupported_reasons=_mixtral_unsupported,
        dense_family="llama",
        windowed_family="mistral",
        experts_key="num_local_experts",
        aliases={"num_local_experts": "num_experts"},
        min_transformers="4.57",
        reads_tokenizer_as_is=True,
    ),
    MoeArchitecture(
        name="deepseek",
        title="DeepSeek MoE",
        model_type="deepseek",
        class_name="DeepseekForCausalLM",
        accepts=_LLAMAS,
        backbone={**BACKBONE, **QKV_BIAS, **O_BIAS},
        expert=EXPERTS,
        router=LAYER + "mlp.gate.weight",
        shared={role: f"{LAYER}mlp.shared_experts.{role[4:]}_proj.weight" for role in FFN_ROLES},
        tied_head_for="vLLM 0.32.0 and mlx-lm 0.32.2",
        config=_deepseek_config,
        unsupported_reasons=_deepseek_unsupported,
        layer_rule=MOE_LAYER_FREQ,
        dense_family="llama",
        windowed_family="mistral",
        experts_key="n_routed_experts",
        shared_key="n_shared_experts",
        renormalize_key="norm_topk_prob",
        renormalizes_one=False,
        code_repository=_DEEPSEEK_CODE,
    ),
    MoeArchitecture(
        name="qwen2_moe",
        title="Qwen MoE",
        model_type="qwen2_moe",
        class_name="Qwen2MoeForCausalLM",
        accepts=(*_LLAMAS, "ministral", "cwm", "qwen2"),
        backbone={**BACKBONE, **QKV_BIAS},
        expert=EXPERTS,
        router=LAYER + "mlp.gate.weight",
        shared=_QWEN2_SHARED,
        shared_router=LAYER + "mlp.shared_expert_gate.weight",
        constants=_qwen2_constants,
        config=_qwen2_config,
        unsupported_reasons=_qwen2_unsupported,
        layer_rule=MLP_ONLY_LAYERS,
        dense_family="qwen2",
        renormalize_key="norm_topk_prob",
        min_transformers="4.57",
        min_transformers_mixed_windows="5.23",
        second_choice_for=("has_mixed_windows",),
        # With a shared expert it does not make the weights of the chosen experts sum to one.
        runs_in_llama_cpp=lambda moe: not moe.shared or moe.experts_per_token == moe.experts,
    ),
    _QWEN3,
    MoeArchitecture(
        name="qwen3_5_moe",
        title="Qwen3.5 MoE (text)",
        model_type="qwen3_5_moe_text",
        class_name="Qwen3_5MoeForCausalLM",
        accepts=("qwen3_5_text",),
        backbone={row.role: row.name for row in QWEN3_5_ROWS if not row.is_ffn},
        expert=fused_experts("mlp."),
        expert_also_read=EXPERTS,
        wrapper="qwen3_5_moe",
        router=LAYER + "mlp.gate.weight",
        shared=_QWEN2_SHARED,
        shared_router=LAYER + "mlp.shared_expert_gate.weight",
        constants=_empty_shared,
        config=_qwen3_5_config,
        unsupported_reasons=_qwen3_5_unsupported,
        dense_family="qwen3_5_text",
        min_transformers="5.23",
        written_for={
            "the experts of a layer in two tensors": "mlx-lm 0.32.2",
            "the keys of a text model under text_config, with full_attention_interval": "mlx-lm 0.32.2",
        },
    ),
)

QWEN3_VL = replace(
    _QWEN3,
    model_type="qwen3_vl_moe_text",
    class_name="Qwen3VLMoeForConditionalGeneration",
    expert={
        "ffn.gate": LAYER + "mlp.experts.gate_up_proj",
        "ffn.up": LAYER + "mlp.experts.gate_up_proj",
        "ffn.down": LAYER + "mlp.experts.down_proj",
    },
    transposes_experts=True,
)
"""The Qwen3 MoE of mixtures with Qwen3-VL's encoder. Source: transformers' `models/qwen3_vl_moe`, and the layout of
Qwen/Qwen3-VL-30B-A3B-Instruct, which `conversion_mapping.py` has for `qwen3_vl_moe`."""
