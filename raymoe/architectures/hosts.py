"""The MoE hosts that experts are put into: names of the output tensors, the output's config.json, and the limits.

A host holds a dense model exactly when, with one expert's FFN in every place, it computes what the dense model
computes. Whatever a host can't express (a bias that its attention lacks, a window on some layers only) is refused by
name: a checkpoint that loads and computes something else is worse than none.

Output names are those of the checkpoints on the Hub, one tensor an expert and matrix, which transformers 4 and 5, vLLM,
SGLang and llama.cpp's converter read; not the fused names that transformers 5 uses in memory.
Sources: transformers' `models/mixtral`, `models/qwen2_moe`, `models/qwen3_moe`; for DeepSeek-MoE v1 its paper
(https://arxiv.org/abs/2401.06066) and the published config of deepseek-ai/deepseek-moe-16b-base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raymoe.architectures.dense import FFN_ROLES
from raymoe.architectures.spec import DenseSpec

__all__ = ["HOSTS", "MoeHost", "MoeShape", "ZeroRow", "host_config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeShape:
    """How many experts there are, how many run for a token, how many are shared (run for every token).

    `shared_prompted`: the shared experts have prompts. `needs_prompts`: the gate mode computes gates from prompts.
    """

    experts: int
    experts_per_token: int
    shared: int = 0
    shared_prompted: bool = False
    needs_prompts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroRow:
    """A tensor that the host demands and the dense model lacks; zeros make it do nothing."""

    name: str
    shape: tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeHost:
    """One MoE architecture.

    `backbone` maps roles to output names, `expert` and `shared` map FFN roles to names with `{layer}` and `{expert}`.
    `zeros` and `refusals` look at the dense model; `config` gives the keys that the host adds to the base's config.
    """

    name: str
    title: str
    model_type: str
    architecture: str
    accepts: tuple[str, ...]
    backbone: Mapping[str, str]
    expert: Mapping[str, str]
    router: str
    config: Callable[[DenseSpec, MoeShape], dict[str, Any]]
    refusals: Callable[[DenseSpec, MoeShape], list[str]]
    shared: Mapping[str, str] = field(default_factory=dict)
    shared_router: str = ""
    zeros: Callable[[DenseSpec, MoeShape], tuple[ZeroRow, ...]] = lambda spec, moe: ()


_L = "model.layers.{layer}."
_BACKBONE = {
    "embed": "model.embed_tokens.weight",
    "norm.input": _L + "input_layernorm.weight",
    "norm.post": _L + "post_attention_layernorm.weight",
    "norm.final": "model.norm.weight",
    "lm_head": "lm_head.weight",
    **{f"attn.{p}": f"{_L}self_attn.{p}_proj.weight" for p in "qkvo"},
}
_QKV_BIAS = {f"attn.{p}.bias": f"{_L}self_attn.{p}_proj.bias" for p in "qkv"}
_O_BIAS = {"attn.o.bias": f"{_L}self_attn.o_proj.bias"}
_QK_NORM = {f"attn.{p}_norm": f"{_L}self_attn.{p}_norm.weight" for p in "qk"}
_EXPERTS = {role: f"{_L}mlp.experts.{{expert}}.{role[4:]}_proj.weight" for role in FFN_ROLES}
_MIXTRAL_NAMES = {"ffn.gate": "w1", "ffn.down": "w2", "ffn.up": "w3"}

# With no shared expert, Qwen2-MoE still has one in every layer: it gets this width and zeros. 256 is a multiple of
# every block size that quantised formats use; a width of 0 is not read by llama.cpp.
EMPTY_SHARED_WIDTH = 256


def host_config(host: MoeHost, spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    """Keys of the output's config.json that follow from the dense model and the host.

    Written out in full, since the defaults of dense and MoE configurations differ (RMSNorm's epsilon does, for one).
    RoPE goes in the older form, `rope_theta` and `rope_scaling`, which every reader knows.
    """
    window = spec.sliding_window
    return {
        "architectures": [host.architecture],
        "model_type": host.model_type,
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "hidden_act": spec.hidden_act,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_scaling": dict(spec.rope_scaling) if spec.rope_scaling else None,
        "sliding_window": window,
        "tie_word_embeddings": spec.tied,
        "num_experts_per_tok": moe.experts_per_token,
        **host.config(spec, moe),
    }


def _common_refusals(spec: DenseSpec) -> list[str]:
    reasons = []
    if spec.mlp_bias:
        reasons.append("mlp_bias: its experts have no bias")
    if len(set(spec.sliding_layers)) > 1:
        reasons.append("sliding window on some layers only (max_window_layers / layer_types): it has one rule for all")
    return reasons


def _bias_reasons(spec: DenseSpec, *, qkv: bool, o: bool) -> list[str]:
    if (spec.qkv_bias and not qkv) or (spec.o_bias and not o):
        missing = "q, k, v and output projections" if not qkv else "output projection"
        return [f"attention_bias: its {missing} of attention have no bias"]
    return []


def _mixtral_refusals(spec: DenseSpec, moe: MoeShape) -> list[str]:
    reasons = _common_refusals(spec) + _bias_reasons(spec, qkv=False, o=False)
    if moe.shared:
        reasons.append("shared_experts: it has none")
    return reasons


def _mixtral_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    return {"num_local_experts": moe.experts, "head_dim": spec.head_dim, "output_router_logits": False}


def _qwen_keys(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    return {
        "num_experts": moe.experts,
        "moe_intermediate_size": spec.intermediate,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
        "use_sliding_window": spec.sliding_window is not None,
        "max_window_layers": 0 if spec.sliding_window else spec.layers,
    }


def _qwen2_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    window = spec.sliding_window is not None
    keys = {
        **_qwen_keys(spec, moe),
        "qkv_bias": True,
        "shared_expert_intermediate_size": spec.intermediate if moe.shared else EMPTY_SHARED_WIDTH,
    }
    if window:
        # transformers 5 derives other layers from max_window_layers than transformers 4 did: say it outright.
        keys["layer_types"] = ["sliding_attention"] * spec.layers
    return keys


def _qwen2_refusals(spec: DenseSpec, moe: MoeShape) -> list[str]:
    reasons = _common_refusals(spec) + _bias_reasons(spec, qkv=True, o=False)
    if spec.explicit_head_dim:
        reasons.append(f"head_dim {spec.head_dim}: its head_dim is always hidden_size / num_attention_heads")
    if moe.shared > 1:
        reasons.append(f"{moe.shared} shared experts: it has one")
    if moe.shared and moe.needs_prompts and not moe.shared_prompted:
        reasons.append("a shared expert without positive_prompts: its shared expert has a gate")
    return reasons


def _qwen2_zeros(spec: DenseSpec, moe: MoeShape) -> tuple[ZeroRow, ...]:
    rows: list[ZeroRow] = []
    if not spec.qkv_bias:
        # Not every reader honours `qkv_bias: false`; zeros mean the same to all of them.
        widths = {"q": "q_out", "k": "kv_out", "v": "kv_out"}
        rows += [ZeroRow(name=_QKV_BIAS[f"attn.{p}.bias"], shape=(width,)) for p, width in widths.items()]
    if not moe.shared:
        width = EMPTY_SHARED_WIDTH
        shapes: dict[str, tuple[str | int, ...]] = {
            "ffn.gate": (width, "hidden"),
            "ffn.up": (width, "hidden"),
            "ffn.down": ("hidden", width),
        }
        rows += [ZeroRow(name=_QWEN2_SHARED[role], shape=shape) for role, shape in shapes.items()]
        rows.append(ZeroRow(name=_L + "mlp.shared_expert_gate.weight", shape=(1, "hidden")))
    return tuple(rows)


_QWEN2_SHARED = {role: f"{_L}mlp.shared_expert.{role[4:]}_proj.weight" for role in FFN_ROLES}


def _qwen3_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    return {**_qwen_keys(spec, moe), "head_dim": spec.head_dim, "attention_bias": spec.qkv_bias}


def _qwen3_refusals(spec: DenseSpec, moe: MoeShape) -> list[str]:
    return _common_refusals(spec) + (["shared_experts: it has none"] if moe.shared else [])


_DEEPSEEK_ROPE = ("linear", "dynamic")
_DEEPSEEK_CODE = "deepseek-ai/deepseek-moe-16b-base--"


def _deepseek_config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    scaling = None
    if spec.rope_scaling:
        # The form of its time: these two fields, and no other, or its configuration class refuses to load.
        scaling = {"type": spec.rope_scaling["rope_type"], "factor": spec.rope_scaling["factor"]}
    return {
        "n_routed_experts": moe.experts,
        "n_shared_experts": moe.shared or None,
        "moe_intermediate_size": spec.intermediate,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": True,
        "attention_bias": spec.qkv_bias,
        "rope_scaling": scaling,
        "auto_map": {
            "AutoConfig": _DEEPSEEK_CODE + "configuration_deepseek.DeepseekConfig",
            "AutoModel": _DEEPSEEK_CODE + "modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": _DEEPSEEK_CODE + "modeling_deepseek.DeepseekForCausalLM",
        },
    }


def _deepseek_refusals(spec: DenseSpec, moe: MoeShape) -> list[str]:
    reasons = _common_refusals(spec)
    if spec.sliding_window:
        reasons.append(f"sliding_window {spec.sliding_window}: its attention has none")
    if spec.explicit_head_dim:
        reasons.append(f"head_dim {spec.head_dim}: its head_dim is always hidden_size / num_attention_heads")
    if spec.rope_scaling and spec.rope_scaling["rope_type"] not in _DEEPSEEK_ROPE:
        kind = spec.rope_scaling["rope_type"]
        reasons.append(f"RoPE scaling {kind!r}: it knows {', '.join(_DEEPSEEK_ROPE)}")
    if moe.shared > 1:
        reasons.append(f"{moe.shared} shared experts: at most one")
    if moe.shared_prompted:
        reasons.append("prompts of the shared expert: its shared expert has no gate")
    if moe.experts_per_token == 1:
        reasons.append("experts_per_token 1: it renormalises router weights only for two experts or more")
    return reasons


# In order of preference where a config does not force one: the most widely read layout first.
HOSTS: Mapping[str, MoeHost] = {
    host.name: host
    for host in (
        MoeHost(
            name="mixtral",
            title="Mixtral",
            model_type="mixtral",
            architecture="MixtralForCausalLM",
            accepts=("llama", "mistral"),
            backbone=_BACKBONE,
            expert={r: f"{_L}block_sparse_moe.experts.{{expert}}.{w}.weight" for r, w in _MIXTRAL_NAMES.items()},
            router=_L + "block_sparse_moe.gate.weight",
            config=_mixtral_config,
            refusals=_mixtral_refusals,
        ),
        MoeHost(
            name="deepseek",
            title="DeepSeek MoE",
            model_type="deepseek",
            architecture="DeepseekForCausalLM",
            accepts=("llama", "mistral"),
            backbone={**_BACKBONE, **_QKV_BIAS, **_O_BIAS},
            expert=_EXPERTS,
            router=_L + "mlp.gate.weight",
            shared={role: f"{_L}mlp.shared_experts.{role[4:]}_proj.weight" for role in FFN_ROLES},
            config=_deepseek_config,
            refusals=_deepseek_refusals,
        ),
        MoeHost(
            name="qwen2_moe",
            title="Qwen MoE",
            model_type="qwen2_moe",
            architecture="Qwen2MoeForCausalLM",
            accepts=("llama", "mistral", "qwen2"),
            backbone={**_BACKBONE, **_QKV_BIAS},
            expert=_EXPERTS,
            router=_L + "mlp.gate.weight",
            shared=_QWEN2_SHARED,
            shared_router=_L + "mlp.shared_expert_gate.weight",
            zeros=_qwen2_zeros,
            config=_qwen2_config,
            refusals=_qwen2_refusals,
        ),
        MoeHost(
            name="qwen3_moe",
            title="Qwen3 MoE",
            model_type="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            accepts=("qwen3",),
            backbone={**_BACKBONE, **_QKV_BIAS, **_O_BIAS, **_QK_NORM},
            expert=_EXPERTS,
            router=_L + "mlp.gate.weight",
            config=_qwen3_config,
            refusals=_qwen3_refusals,
        ),
    )
}
