"""How a MoE architecture's config.json says which layers have experts.

A layer without experts has a plain FFN, as wide as the dense model's. Most architectures have experts in all layers.
Some have keys for other layers, and each has its own limits:

    mlp_only_layers                              any layers
    mlp_layer_types                              any layers
    first_k_dense_replace                        all layers from one on
    num_dense_layers                             all layers from one on
    first_k_dense_replace, moe_layer_freq        every n-th layer from one on, counted from layer 0
    moe_layer_start_index, _end_index, _interval every n-th layer of a range, counted from layer -1

Layers are numbered from 0. Sources: the modeling and configuration files of the architectures in transformers; for
DeepSeek-MoE v1 its own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raymoe.architectures.dense_family import FFN_ROLES
from raymoe.architectures.dense_spec import DenseSpec
from raymoe.tensor_names import LAYER

PLAIN_FFN = {role: f"{LAYER}mlp.{role[4:]}_proj.weight" for role in FFN_ROLES}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRule:
    """The config keys of an architecture that may have layers without experts.

    Attributes:
        text: Where its experts may be, after "experts may be in".
        write: From a dense model and its layers with experts, in ascending order, to config keys. None: the keys can't
            say it.
        read: From a config.json and a number of layers to those with experts. A key that the config leaves out has
            transformers' default.
        ffn: Role to tensor name, of the FFN of a layer without experts.
    """

    text: str
    write: Callable[[DenseSpec, Sequence[int]], dict[str, Any] | None]
    read: Callable[[Mapping[str, Any], int], list[int]]
    ffn: Mapping[str, str] = field(default_factory=lambda: PLAIN_FFN)


def _without(layers: int, chosen: Sequence[int]) -> list[int]:
    return [layer for layer in range(layers) if layer not in set(chosen)]


# --- any layers


def _write_mlp_only(spec: DenseSpec, chosen: Sequence[int]) -> dict[str, Any]:
    return {"decoder_sparse_step": 1, "mlp_only_layers": _without(spec.layers, chosen)}


def _read_mlp_only(config: Mapping[str, Any], layers: int) -> list[int]:
    step, only = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or []
    return [layer for layer in range(layers) if layer not in only and (layer + 1) % step == 0]


MLP_ONLY_LAYERS = LayerRule(text="any layers (mlp_only_layers)", write=_write_mlp_only, read=_read_mlp_only)


def _write_layer_types(spec: DenseSpec, chosen: Sequence[int]) -> dict[str, Any]:
    types = {"mlp_layer_types": ["sparse" if layer in set(chosen) else "dense" for layer in range(spec.layers)]}
    if len(chosen) == spec.layers:
        return types
    # With 1, layers without experts would have RoPE, whether they have a window or not.
    return {**types, "prefix_dense_sliding_window_pattern": 4, "prefix_dense_intermediate_size": spec.intermediate}


def _read_layer_types(config: Mapping[str, Any], layers: int) -> list[int]:
    types = config.get("mlp_layer_types")
    if not types:
        return list(range(config.get("first_k_dense_replace") or 0, layers))
    return [layer for layer, kind in enumerate(types[:layers]) if kind != "dense"]


MLP_LAYER_TYPES = LayerRule(text="any layers (mlp_layer_types)", write=_write_layer_types, read=_read_layer_types)


# --- all layers from one on


def layers_after_dense(
    key: str, *, default: int = 0, also: Mapping[str, Any] | None = None, ffn: Mapping[str, str] = PLAIN_FFN
) -> LayerRule:
    """The rule of a key with the number of layers before the first one with experts. `default`: its value in
    transformers if a config leaves it out; `also`: further keys to write."""

    def write(spec: DenseSpec, chosen: Sequence[int]) -> dict[str, Any] | None:
        is_rest = list(chosen) == list(range(chosen[0], spec.layers))
        return {key: chosen[0], **(also or {})} if is_rest else None

    def read(config: Mapping[str, Any], layers: int) -> list[int]:
        first = config.get(key)
        return list(range(default if first is None else first, layers))

    return LayerRule(text=f"all layers from one on ({key})", write=write, read=read, ffn=ffn)


# --- every n-th layer


def _write_freq(spec: DenseSpec, chosen: Sequence[int]) -> dict[str, Any] | None:
    keys = ({"first_k_dense_replace": chosen[0], "moe_layer_freq": every} for every in range(1, spec.layers + 1))
    return next((each for each in keys if _read_freq(each, spec.layers) == list(chosen)), None)


def _read_freq(config: Mapping[str, Any], layers: int) -> list[int]:
    first, every = config.get("first_k_dense_replace") or 0, config.get("moe_layer_freq") or 1
    return [layer for layer in range(layers) if layer >= first and layer % every == 0]


MOE_LAYER_FREQ = LayerRule(
    text="every n-th layer from one on (first_k_dense_replace, moe_layer_freq)", write=_write_freq, read=_read_freq
)


def _write_interval(spec: DenseSpec, chosen: Sequence[int]) -> dict[str, Any] | None:
    ends = {"moe_layer_start_index": chosen[0], "moe_layer_end_index": chosen[-1]}
    keys = ({**ends, "moe_layer_interval": every} for every in range(1, spec.layers + 1))
    return next((each for each in keys if _read_interval(each, spec.layers) == list(chosen)), None)


def _read_interval(config: Mapping[str, Any], layers: int) -> list[int]:
    first, last = config.get("moe_layer_start_index", 1), config.get("moe_layer_end_index", -1)
    every = config.get("moe_layer_interval") or 1
    last = layers - 1 if last in (None, -1) else last
    return [layer for layer in range(layers) if (first or 0) <= layer <= last and (layer + 1) % every == 0]


MOE_LAYER_INTERVAL = LayerRule(
    text="layers n - 1, 2n - 1, ... of a range (moe_layer_start_index, moe_layer_end_index, moe_layer_interval)",
    write=_write_interval,
    read=_read_interval,
)
