"""Ministral 3 as the Mistral that it is up to its original context.

From the end of that context on, its attention multiplies queries by 1 + beta * log(1 + floor(position / context)). No
MoE architecture with its attention does. Up to there the factor is 1, and Ministral 3 computes what Mistral computes.
So its config is read as that of a Mistral, with the original context as the longest text. Source: transformers'
`models/ministral3`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymoe.architectures.rope import rope_parameters

MODEL_TYPE = "ministral3"
_FAMILY = "mistral"
# Values that transformers' class assumes where they differ from those of Mistral's.
_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "pad_token_id": 11,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
    },
}
# Keys of its RoPE settings that a Mistral does not have.
_OWN_KEYS = ("llama_4_scaling_beta", "max_position_embeddings")


def original_context(config: Mapping[str, Any]) -> int | None:
    """How many tokens a Ministral 3 reads like a Mistral; None for all other models."""
    if config.get("model_type") != MODEL_TYPE:
        return None
    context = (rope_parameters(config) or _DEFAULTS["rope_parameters"]).get("original_max_position_embeddings")
    return context if isinstance(context, int) and context > 0 else None


def within_original_context(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of a Ministral 3 as that of a Mistral; the config itself for all other models."""
    context = original_context(config)
    if context is None:
        return config
    rope = rope_parameters(config) or dict(_DEFAULTS["rope_parameters"])
    rope = {key: value for key, value in rope.items() if key not in _OWN_KEYS}
    own = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_parameters")}
    limit = {"max_position_embeddings": context, "rope_parameters": rope, "model_type": _FAMILY}
    return {**_DEFAULTS, **own, **limit}


def context_warning(label: str, config: Mapping[str, Any]) -> str | None:
    """What a mixture of a Ministral 3 does not do; None for all other models."""
    context = original_context(config)
    if context is None:
        return None
    return (
        f"{label}: a Ministral 3 scales its queries by their position from token {context:,} on, which no MoE "
        f"architecture does. The mixture is the same up to there, and its max_position_embeddings is {context}"
    )
