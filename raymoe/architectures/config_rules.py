"""Rules for configs where families differ: windows, kinds of layers, values that follow from others.

Functions of a config with the family's defaults filled in. Rules: each family's configuration class in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymoe.architectures.dense_family import Scan
from raymoe.architectures.rope import is_number, rope_kind, rope_parameters
from raymoe.architectures.tensor_tables import ATTENTION, CONV, LINEAR, SHARED, SLIDING


def windows_everywhere(config: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[bool, ...]]:
    window = config["sliding_window"]
    return (window, (True,) * layers) if window else (None, (False,) * layers)


def qwen_windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[bool, ...]]:
    if not config["use_sliding_window"]:
        return None, (False,) * layers
    return _windows_of(config, _sliding(config) or tuple(n >= config["max_window_layers"] for n in range(layers)))


def cohere2_windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Layers with a window have RoPE, the others have none. So the kind of a layer matters even if no text is longer
    than the window."""
    pattern = config["sliding_window_pattern"]
    return config["sliding_window"], _sliding(config) or tuple((n + 1) % pattern != 0 for n in range(layers))


def cohere_windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """All layers have RoPE. In Cohere 2's MoE only layers with a window have it, so all get a window that no text
    exceeds."""
    return config["max_position_embeddings"], (True,) * layers


def cohere_limits(config: Mapping[str, Any]) -> list[str]:
    if config["use_qk_norm"]:
        return ["use_qk_norm: Cohere 2's MoE has no norms of q and k"]
    return []


def ministral_windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[bool, ...]]:
    return _windows_of(config, _sliding(config) or (True,) * layers)


def cwm_windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[bool, ...]]:
    return _windows_of(config, _sliding(config) or tuple(n % 4 != 0 for n in range(layers)))


def _sliding(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Whether each layer has a window; empty if the config does not name the layers."""
    return tuple(kind == "sliding_attention" for kind in config.get("layer_types") or ())


def _windows_of(config: Mapping[str, Any], sliding: tuple[bool, ...]) -> tuple[int | None, tuple[bool, ...]]:
    window = config["sliding_window"]
    return (window, sliding) if window and any(sliding) else (None, (False,) * len(sliding))


def cwm_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Its RoPE is scaled also if the config does not say how."""
    if config.get("rope_parameters") or config.get("rope_scaling"):
        return {}
    return {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 16.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        }
    }


def lfm2_kinds(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    types = config.get("layer_types")
    if types:
        return tuple(types)
    numbers = config.get("full_attn_idxs")
    attention = range(layers) if numbers is None else frozenset(numbers)
    return tuple(ATTENTION if layer in attention else CONV for layer in range(layers))


def qwen3_5_kinds(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    every = config["full_attention_interval"]
    return tuple(config.get("layer_types") or (ATTENTION if n % every == 0 else LINEAR for n in range(1, layers + 1)))


def qwen3_5_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """All RoPE settings in the newer form, which has more than theta and scaling."""
    rope = rope_parameters(config)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    for key in ("rope_theta", "partial_rotary_factor"):
        rope.setdefault(key, config[key])
    return {"rope_parameters": rope}


def lfm2_width(config: Mapping[str, Any]) -> dict[str, Any]:
    """The width of the FFN. It differs from the config key unless `block_auto_adjust_ff_dim` is off."""
    width = config["intermediate_size"]
    if config["block_auto_adjust_ff_dim"]:
        multiple = config["block_multiple_of"]
        width = int(config["block_ffn_dim_multiplier"] * int(2 * width / 3))
        width = multiple * ((width + multiple - 1) // multiple)
    return {"intermediate_size": width}


def granite4_limits(config: Mapping[str, Any]) -> list[str]:
    """Models of this type may also be mixtures."""
    heads, width, inner = (
        config["mamba_n_heads"],
        config["mamba_d_head"],
        config["mamba_expand"] * config["hidden_size"],
    )
    if width != "auto" and heads * width != inner:
        return [
            f"mamba_n_heads {heads} of mamba_d_head {width} are not mamba_expand times hidden_size, {inner} channels"
        ]
    if config["num_local_experts"]:
        return [f"num_local_experts is {config['num_local_experts']!r}: it is a mixture of experts already"]
    return []


_GRANITE4_KINDS = {"mamba": LINEAR, "attention": ATTENTION}


def granite4_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Kinds of layers as transformers 5 names them, and how wide each head of a state-space layer is."""
    types = config.get("layer_types") or config.get("layers_block_type") or [LINEAR] * config["num_hidden_layers"]
    width = config["mamba_d_head"]
    if width == "auto":
        width = config["mamba_expand"] * config["hidden_size"] // config["mamba_n_heads"]
    return {"layer_types": [_GRANITE4_KINDS.get(kind, kind) for kind in types], "mamba_d_head": width}


def granite4_kinds(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    return tuple(config["layer_types"])


def granite4_scan(extra: Mapping[str, Any]) -> Scan:
    """For each head, matrices of a chunk's tokens by its tokens."""
    chunk: int = extra["mamba_chunk_size"]
    return Scan(chunk=chunk, numbers=5 * chunk * extra["mamba_n_heads"])


def qwen3_5_scan(extra: Mapping[str, Any]) -> Scan:
    """Queries, keys and values of each head in float32, many times; the chunk is fixed in transformers' code."""
    chunk, widths = 64, extra["linear_key_head_dim"] + extra["linear_value_head_dim"]
    return Scan(chunk=chunk, numbers=extra["linear_num_value_heads"] * (11 * widths + 2 * chunk))


def granite_swa_limits(config: Mapping[str, Any]) -> list[str]:
    thetas = config.get("layer_rope_theta")
    if thetas is not None and (
        not isinstance(thetas, list)
        or len(thetas) != config["num_hidden_layers"]
        or not all(is_number(theta) and theta >= 0 for theta in thetas)
    ):
        layers = config["num_hidden_layers"]
        return [f"layer_rope_theta is {thetas!r:.80}: not one number, 0 or more, for each of {layers} layers"]
    return []


def granite_swa_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The base of each layer's RoPE (0: none), and the common base if all layers with RoPE have the same."""
    rope = rope_parameters(config)
    theta = rope.get("rope_theta") or config["rope_theta"]
    thetas = config.get("layer_rope_theta") or [theta] * config["num_hidden_layers"]
    rope["rope_theta"] = next((theta for theta in thetas if theta), theta)
    return {"layer_rope_theta": thetas, "rope_parameters": rope, "rope_scaling": None}


def iquestcoder_limits(config: Mapping[str, Any]) -> list[str]:
    """Limits that transformers has too: its Llama code, which runs these models, clips nothing and has no windows."""
    reasons = []
    if config.get("clip_qkv"):
        reasons.append(f"clip_qkv is {config['clip_qkv']!r:.40}: queries, keys and values are not clipped")
    if config.get("use_sliding_window"):
        reasons.append("use_sliding_window is on: its attention has no windows")
    return reasons


def youtu_limits(config: Mapping[str, Any]) -> list[str]:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if kv_heads != heads:
        return [f"num_key_value_heads is {kv_heads}: its attention has as many as num_attention_heads, {heads}"]
    return []


def smollm3_windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[bool, ...]]:
    otherwise = tuple(config["use_sliding_window"] and not rope for rope in _ropes(config, layers))
    return _windows_of(config, _sliding(config) or otherwise)


def smollm3_limits(config: Mapping[str, Any]) -> list[str]:
    layers = config.get("no_rope_layers")
    if layers is not None and (
        not isinstance(layers, list)
        or len(layers) != config["num_hidden_layers"]
        or any(rope not in (0, 1) for rope in layers)
    ):
        return [f"no_rope_layers is {layers!r:.80}: not a list of {config['num_hidden_layers']} zeros and ones"]
    return []


def smollm3_values(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"no_rope_layers": _ropes(config, config["num_hidden_layers"])}


def _ropes(config: Mapping[str, Any], layers: int) -> list[int]:
    """For each layer, 1 if it has RoPE and 0 if not. The key's name suggests the opposite."""
    every = config["no_rope_layer_interval"]
    return config.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in range(layers)]


def phi3_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE scaling under the usual name and with the usual keys."""
    rope = rope_parameters(config)
    if rope_kind(rope) == "default":
        return {}
    rope.update(rope_type="longrope", original_max_position_embeddings=config["original_max_position_embeddings"])
    rope.pop("type", None)
    return {"rope_scaling": rope}


_GEMMA4_PATTERN = 6  # by default, each sixth layer is without a window
_GEMMA4_LAYER_KEYS = ("head_dim", "num_key_value_heads")


def gemma4_kinds(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """The kind of each layer. The last ones may have the keys and values of earlier ones."""
    first_shared = layers - config["num_kv_shared_layers"]
    types = _gemma4_types(config, layers)
    return tuple(kind if layer < first_shared else SHARED + kind for layer, kind in enumerate(types))


def _gemma4_types(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """For each layer, whether it has a window. The last one has none, whatever the config says."""
    every = _GEMMA4_PATTERN
    given = config.get("layer_types") or [SLIDING if n % every else ATTENTION for n in range(1, layers + 1)]
    return (*given[:-1], ATTENTION)


def gemma4_windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[bool, ...]]:
    return _windows_of(config, tuple(kind == SLIDING for kind in _gemma4_types(config, layers)))


def gemma4_limits(config: Mapping[str, Any]) -> list[str]:
    reasons = []
    if config["enable_moe_block"]:
        reasons.append("enable_moe_block is on: it is a mixture of experts already; experts are made of dense models")
    layers, shared = config["num_hidden_layers"], config["num_kv_shared_layers"]
    types = _gemma4_types(config, layers)
    if missing := {*types[max(0, layers - shared) :]}.difference(types[: max(0, layers - shared)]):
        reasons.append(
            f"num_kv_shared_layers is {shared}: these layers have the keys and values of an earlier one of their kind, "
            f"and none before them is of kind {' or '.join(sorted(missing))}"
        )
    if shared and not config["hidden_size_per_layer_input"]:
        reasons.append(
            f"num_kv_shared_layers is {shared} without hidden_size_per_layer_input: transformers runs such layers with "
            "both only"
        )
    rows = config["vocab_size_per_layer_input"]
    if config["hidden_size_per_layer_input"] and rows < config["vocab_size"]:
        reasons.append(
            f"vocab_size_per_layer_input is {rows}, less than vocab_size, {config['vocab_size']}: other tokens have no "
            "input of layers"
        )
    if config.get("use_bidirectional_attention") == "all":
        reasons.append("use_bidirectional_attention is all: its tokens attend to later ones, so it is no causal model")
    return reasons + _gemma4_head_limits(config)


def _gemma4_head_limits(config: Mapping[str, Any]) -> list[str]:
    """`per_layer_config`, in which transformers 5 saves the heads of layers without a window, may hold anything."""
    own = config.get("per_layer_config") or {}
    if not all(isinstance(each, Mapping) and not each.keys() - {*_GEMMA4_LAYER_KEYS} for each in own.values()):
        return [f"per_layer_config has other keys than {' and '.join(_GEMMA4_LAYER_KEYS)}"]
    kinds = _gemma4_types(config, config["num_hidden_layers"])
    heads = [_gemma4_heads(config, layer, kind) for layer, kind in enumerate(kinds)]
    usual = (config["head_dim"], config["num_key_value_heads"])
    if any(each != (heads[-1] if kind == ATTENTION else usual) for each, kind in zip(heads, kinds, strict=True)):
        return ["per_layer_config gives layers of one kind different heads"]
    head_dim, number = heads[-1]
    if not (isinstance(head_dim, int) and isinstance(number, int) and head_dim > 0 and number > 0):
        return [f"per_layer_config has head_dim {head_dim!r:.40} and num_key_value_heads {number!r:.40}"]
    if config["num_attention_heads"] % number:
        return [f"num_attention_heads {config['num_attention_heads']} is not a multiple of {number}, in some layers"]
    if number != usual[1] and not config["attention_k_eq_v"]:
        return ["per_layer_config has a num_key_value_heads of its own, which takes attention_k_eq_v"]
    return []


def _gemma4_heads(config: Mapping[str, Any], layer: int, kind: str) -> tuple[Any, Any]:
    """(head_dim, number of heads of keys and values) of a layer."""
    own: Mapping[str, Any] = {}
    if "per_layer_config" in config:
        own = config["per_layer_config"].get(str(layer)) or {}
    elif kind == ATTENTION:
        number = config.get("num_global_key_value_heads") if config["attention_k_eq_v"] else None
        own = {"head_dim": config["global_head_dim"], **({"num_key_value_heads": number} if number else {})}
    return own.get("head_dim", config["head_dim"]), own.get("num_key_value_heads", config["num_key_value_heads"])


def gemma4_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Heads of layers without a window under the published names, whichever way they were saved."""
    layers = config["num_hidden_layers"]
    head_dim, number = _gemma4_heads(config, layers - 1, ATTENTION)
    return {
        "layer_types": list(_gemma4_types(config, layers)),
        "global_head_dim": head_dim,
        "num_global_key_value_heads": number,
        "hidden_size_per_layer_input": config["hidden_size_per_layer_input"] or 0,
    }
