"""Features of a merge on which engines differ, read from the config.json that the merge will have.

A feature that each merge in an architecture has (the windows of Gemma 4, the convolutions of LFM2) is one of the
architecture: the row of the architecture itself covers it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

FEATURES: Mapping[str, str] = {
    "rope_linear": "linear RoPE scaling",
    "rope_dynamic": "dynamic RoPE scaling",
    "rope_yarn": "yarn RoPE scaling",
    "rope_llama3": "llama3 RoPE scaling",
    "rope_longrope": "longrope RoPE scaling",
    "no_rope": "no RoPE",
    "partial_rotary": "RoPE on a part of each head",
    "head_dim": "another head_dim than hidden_size / heads",
    "window_all": "a sliding window on all layers",
    "window_some": "a sliding window on some layers",
    "state_layers": "layers without attention",
    "untied": "an output matrix of its own",
    "tied": "tied embeddings",
    "tied_stored": "tied embeddings, the output matrix stored too",
    "qkv_bias": "biases of q, k and v",
    "o_bias": "a bias of attention's output",
    "top1": "one expert per token",
    "renormalize": "several experts per token, but not all",
    "shared": "a shared expert",
    "activation": "another activation than SiLU",
}
"""Features by name, with their titles in docs, in the order of docs."""

_ATTENTION_KINDS = frozenset({"attention", "full_attention", "sliding_attention"})
_SLIDING_KIND = "sliding_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The facts of a merge that decide what engines compute.

    Attributes:
        config: The config.json of the mixture; of an image-text merge, that of its text model.
        experts: How many experts it has.
        experts_per_token: How many of them run for a token.
        shared: It has a shared expert that is not zeros.
        has_qkv_bias: q, k and v have biases, not all of them zeros.
        has_o_bias: The output projection of attention has a bias, zeros included.
        has_head: The checkpoint has an output matrix of its own, also if the embeddings are tied.
    """

    config: Mapping[str, Any]
    experts: int
    experts_per_token: int
    shared: bool = False
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_head: bool = True


def features_of(model: ServedModel) -> frozenset[str]:
    """The features of a merge, as names of `FEATURES`.

    Example:
        >>> sorted(features_of(ServedModel(config={"tie_word_embeddings": True}, experts=4, experts_per_token=1)))
        ['tied_stored', 'top1']
    """
    config = model.config
    return frozenset(
        [
            *_rope_features(config),
            *_layer_features(config),
            *_head_features(config),
            "untied" if not config.get("tie_word_embeddings") else "tied_stored" if model.has_head else "tied",
            *(["qkv_bias"] if model.has_qkv_bias else []),
            *(["o_bias"] if model.has_o_bias else []),
            *(["top1"] if model.experts_per_token == 1 < model.experts else []),
            *(["renormalize"] if 1 < model.experts_per_token < model.experts else []),
            *(["shared"] if model.shared else []),
            *(["activation"] if config.get("hidden_act", "silu") != "silu" else []),
        ]
    )


def _rope_features(config: Mapping[str, Any]) -> Iterator[str]:
    """Settings for each kind of layer (Gemma 4's) are part of the architecture."""
    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if f"rope_{kind}" in FEATURES:
        yield f"rope_{kind}"
    if config.get("position_embedding_type", "rope") != "rope":
        yield "no_rope"
    if (settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        yield "partial_rotary"


def _layer_features(config: Mapping[str, Any]) -> Iterator[str]:
    """A window that is as long as the longest text has no effect."""
    kinds: set[str] = set(config.get("layer_types") or ())
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and window < config.get("max_position_embeddings", window + 1):
        if _SLIDING_KIND in kinds and len(kinds) > 1:
            yield "window_some"
        elif _SLIDING_KIND in kinds or not kinds:
            yield "window_all"
    if kinds - _ATTENTION_KINDS:
        yield "state_layers"


def _head_features(config: Mapping[str, Any]) -> Iterator[str]:
    width, heads = config.get("head_dim"), config.get("num_attention_heads")
    if width and heads and width * heads != config.get("hidden_size"):
        yield "head_dim"
