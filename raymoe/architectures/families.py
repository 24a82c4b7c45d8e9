"""The dense families that experts come from, and what their configs mean.

Names, shapes and defaults: transformers' modelling and configuration files of each family (`models/llama`,
`models/olmo2`, ...), which follow the layout of the checkpoints on the Hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymoe.architectures.dense import DenseFamily
from raymoe.architectures.rows import (
    ATTENTION,
    COHERE2_ROWS,
    CONV,
    HUNYUAN_ROWS,
    LFM2_ROWS,
    LINEAR,
    LLAMA_ROWS,
    MLA_ROWS,
    OLMO2_ROWS,
    PHI3_ROWS,
    QWEN3_5_ROWS,
)

__all__ = ["FAMILIES"]

# --- what a config says, where families differ


def _windows_everywhere(config: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[bool, ...]]:
    window = config["sliding_window"]
    return (window, (True,) * layers) if window else (None, (False,) * layers)


def _qwen_windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[bool, ...]]:
    window = config["sliding_window"]
    if not window or not config["use_sliding_window"]:
        return None, (False,) * layers
    types = config.get("layer_types")
    if types:
        sliding = tuple(kind == "sliding_attention" for kind in types)
    else:
        sliding = tuple(layer >= config["max_window_layers"] for layer in range(layers))
    return (window, sliding) if any(sliding) else (None, sliding)


def _cohere2_windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Layers with a window have RoPE, the others have none: which is which matters even where no window bites."""
    types = config.get("layer_types")
    if types:
        return config["sliding_window"], tuple(kind == "sliding_attention" for kind in types)
    pattern = config["sliding_window_pattern"]
    return config["sliding_window"], tuple((layer + 1) % pattern != 0 for layer in range(layers))


def _lfm2_kinds(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    types = config.get("layer_types")
    if types:
        return tuple(types)
    attention = config.get("full_attn_idxs")
    return tuple(ATTENTION if attention is None or layer in attention else CONV for layer in range(layers))


def _qwen3_5_kinds(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    every = config["full_attention_interval"]
    return tuple(config.get("layer_types") or (ATTENTION if n % every == 0 else LINEAR for n in range(1, layers + 1)))


def _qwen3_5_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """All of RoPE in the newer form, which has more than theta and scaling."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    for key in ("rope_theta", "partial_rotary_factor"):
        rope.setdefault(key, config[key])
    return {"rope_parameters": rope}


def _lfm2_width(config: Mapping[str, Any]) -> dict[str, Any]:
    """The width of the FFN, which is not what the key says unless `block_auto_adjust_ff_dim` is off."""
    width = config["intermediate_size"]
    if config["block_auto_adjust_ff_dim"]:
        multiple = config["block_multiple_of"]
        width = int(config["block_ffn_dim_multiplier"] * int(2 * width / 3))
        width = multiple * ((width + multiple - 1) // multiple)
    return {"intermediate_size": width}


def _phi3_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE scaling under the name and with the keys that it has elsewhere."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return {}
    rope.update(rope_type="longrope", original_max_position_embeddings=config["original_max_position_embeddings"])
    rope.pop("type", None)
    return {"rope_scaling": rope}


# --- defaults

_COMMON_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "rope_theta": 10000.0,
}
_QWEN_DEFAULTS = {
    **_COMMON_DEFAULTS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GRANITE_MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
_QWEN3_5_SIZES = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_MLA_SIZES = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
}
_BOS_EOS = {"bos_token_id": 1, "eos_token_id": 2}
_ALL_BIASES = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}

FAMILIES: Mapping[str, DenseFamily] = {
    family.model_type: family
    for family in (
        DenseFamily(
            model_type="llama",
            title="Llama",
            rows=LLAMA_ROWS,
            switches={**_ALL_BIASES, "mlp_bias": "mlp_bias"},
            defaults={**_COMMON_DEFAULTS, "max_position_embeddings": 2048, **_BOS_EOS},
        ),
        DenseFamily(
            model_type="mistral",
            title="Mistral",
            rows=LLAMA_ROWS,
            windows=_windows_everywhere,
            defaults={
                **_COMMON_DEFAULTS,
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
                **_BOS_EOS,
            },
        ),
        DenseFamily(
            model_type="qwen2",
            title="Qwen2, Qwen2.5",
            rows=LLAMA_ROWS,
            windows=_qwen_windows,
            reads_layer_types=True,
            fixed={"qkv_bias": True},
            defaults=_QWEN_DEFAULTS,
        ),
        DenseFamily(
            model_type="qwen3",
            title="Qwen3",
            rows=LLAMA_ROWS,
            windows=_qwen_windows,
            reads_layer_types=True,
            switches=_ALL_BIASES,
            fixed={"qk_norm": True},
            defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        ),
        DenseFamily(
            model_type="qwen3_5_text",
            title="Qwen3.5 (text)",
            rows=QWEN3_5_ROWS,
            kinds=_qwen3_5_kinds,
            reads_layer_types=True,
            switches=_ALL_BIASES,
            carried=(*_QWEN3_5_SIZES, "rope_parameters"),
            adjust=_qwen3_5_rope,
            defaults={
                **_COMMON_DEFAULTS,
                "num_key_value_heads": 4,
                "max_position_embeddings": 32768,
                "head_dim": 256,
                "partial_rotary_factor": 0.25,
                "full_attention_interval": 4,
                **_QWEN3_5_SIZES,
            },
        ),
        DenseFamily(
            model_type="seed_oss",
            title="Seed-OSS",
            rows=LLAMA_ROWS,
            switches={"qkv_bias": "attention_bias", "o_bias": "attention_out_bias", "mlp_bias": "mlp_bias"},
            defaults={
                **_COMMON_DEFAULTS,
                "max_position_embeddings": 524288,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "attention_bias": True,
                "pad_token_id": 1,
                "bos_token_id": 0,
                "eos_token_id": 2,
            },
        ),
        DenseFamily(
            model_type="youtu",
            title="Youtu-LLM",
            rows=MLA_ROWS,
            switches=_ALL_BIASES,
            carried=(*_MLA_SIZES, "rope_interleave"),
            adjust=lambda config: {"head_dim": config["qk_rope_head_dim"]},  # what RoPE turns
            defaults={
                **_COMMON_DEFAULTS,
                "max_position_embeddings": 131072,
                "num_key_value_heads": 16,
                "tie_word_embeddings": True,
                "rope_interleave": True,
                "bos_token_id": 128000,
                "eos_token_id": 128001,
                **_MLA_SIZES,
            },
        ),
        DenseFamily(
            model_type="internlm3",
            title="InternLM3",
            rows=LLAMA_ROWS,
            # The Llama implementation that runs it has one switch for all of attention.
            keys={"attention_bias": ("qkv_bias", "attention_bias"), "mlp_bias": ("bias", "mlp_bias")},
            switches={**_ALL_BIASES, "mlp_bias": "mlp_bias"},
            defaults={
                **_COMMON_DEFAULTS,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 32768,
                "num_key_value_heads": 2,
                "head_dim": 128,
                "pad_token_id": 2,
                **_BOS_EOS,
            },
        ),
        DenseFamily(
            model_type="phi3",
            title="Phi-3, Phi-3.5, Phi-4",
            rows=PHI3_ROWS,
            windows=_windows_everywhere,
            turns_part=True,
            adjust=_phi3_values,
            defaults={
                **_COMMON_DEFAULTS,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 4096,
                "original_max_position_embeddings": 4096,
                "sliding_window": None,
                "bos_token_id": 1,
                "eos_token_id": 32000,
                "pad_token_id": 32000,
            },
        ),
        DenseFamily(
            model_type="olmo2",
            title="OLMo 2",
            rows=OLMO2_ROWS,
            switches=_ALL_BIASES,
            defaults={
                **_COMMON_DEFAULTS,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 2048,
                "pad_token_id": 1,
                "eos_token_id": 50279,
            },
        ),
        DenseFamily(
            model_type="granite",
            title="Granite 3",
            rows=LLAMA_ROWS,
            switches={**_ALL_BIASES, "mlp_bias": "mlp_bias"},
            carried=_GRANITE_MULTIPLIERS,
            defaults={
                **_COMMON_DEFAULTS,
                "max_position_embeddings": 2048,
                **dict.fromkeys(_GRANITE_MULTIPLIERS, 1.0),
                **_BOS_EOS,
            },
        ),
        DenseFamily(
            model_type="ernie4_5",
            title="ERNIE 4.5",
            rows=LLAMA_ROWS,
            switches={"qkv_bias": "use_bias", "o_bias": "use_bias", "mlp_bias": "use_bias"},
            defaults={
                **_COMMON_DEFAULTS,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 131072,
                "num_key_value_heads": 2,
                "head_dim": 128,
                "rope_theta": 500000.0,
                "tie_word_embeddings": True,
                "pad_token_id": 0,
                **_BOS_EOS,
            },
        ),
        DenseFamily(
            model_type="helium",
            title="Helium",
            rows=LLAMA_ROWS,
            switches={"qkv_bias": "attention_bias", "mlp_bias": "mlp_bias"},
            defaults={
                **_COMMON_DEFAULTS,
                "rms_norm_eps": 1e-8,
                "max_position_embeddings": 4096,
                "num_key_value_heads": 20,
                "head_dim": 128,
                "rope_theta": 100000.0,
                "pad_token_id": 3,
                **_BOS_EOS,
            },
        ),
        DenseFamily(
            model_type="hunyuan_v1_dense",
            title="Hunyuan (dense, v1)",
            rows=HUNYUAN_ROWS,
            switches=_ALL_BIASES,
            defaults={
                **_COMMON_DEFAULTS,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 2048,
                "pad_token_id": 0,
                **_BOS_EOS,
            },
        ),
        DenseFamily(
            model_type="cohere2",
            title="Command R7B, Command A (Cohere 2)",
            rows=COHERE2_ROWS,
            keys={"rms_norm_eps": ("layer_norm_eps",)},
            windows=_cohere2_windows,
            reads_layer_types=True,
            switches=_ALL_BIASES,
            carried=("logit_scale",),
            defaults={
                **_COMMON_DEFAULTS,
                "layer_norm_eps": 1e-5,
                "max_position_embeddings": 8192,
                "sliding_window": 4096,
                "sliding_window_pattern": 4,
                "logit_scale": 0.0625,
                "tie_word_embeddings": True,
                "pad_token_id": 0,
                "bos_token_id": 5,
                "eos_token_id": 255001,
            },
        ),
        DenseFamily(
            model_type="lfm2",
            title="LFM2",
            rows=LFM2_ROWS,
            keys={
                "rms_norm_eps": ("norm_eps",),
                "intermediate_size": ("block_ff_dim", "intermediate_size"),
                "tie_word_embeddings": ("tie_embedding", "tie_word_embeddings"),
            },
            kinds=_lfm2_kinds,
            reads_layer_types=True,
            adjust=_lfm2_width,
            carried=("conv_L_cache", "conv_bias"),
            ffn="feed_forward",
            final_norm="embedding_norm",
            defaults={
                **_COMMON_DEFAULTS,
                "norm_eps": 1e-5,
                "max_position_embeddings": 128000,
                "num_key_value_heads": 8,
                "rope_theta": 1000000.0,
                "tie_word_embeddings": True,
                "conv_L_cache": 3,
                "conv_bias": False,
                "block_auto_adjust_ff_dim": True,
                "block_ffn_dim_multiplier": 1.0,
                "block_multiple_of": 256,
                "pad_token_id": 0,
                **_BOS_EOS,
            },
        ),
    )
}
