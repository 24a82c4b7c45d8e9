"""`DenseSpec`: what a dense model's config.json says, in one form for all families and both generations of configs.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 writes `rope_parameters`; both are read. Keys that
a config leaves out take the family's default (see `DenseFamily.defaults`), never another family's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raymoe.architectures.dense import FAMILIES, DenseFamily, TensorRow
from raymoe.errors import Problem

__all__ = ["DenseSpec", "read_spec"]

_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSpec:
    """Sizes and features of one dense model.

    `rope_scaling` is None for plain RoPE, else transformers' dict with `rope_type`. `sliding_layers` says for each
    layer whether it attends within `sliding_window` tokens only.
    """

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    hidden_act: str
    rms_norm_eps: float
    max_positions: int
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    sliding_window: int | None
    sliding_layers: tuple[bool, ...]
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @property
    def family(self) -> DenseFamily:
        return FAMILIES[self.model_type]

    @property
    def untied(self) -> bool:
        return not self.tied

    @property
    def explicit_head_dim(self) -> bool:
        """Whether head_dim is not simply hidden / heads."""
        return self.head_dim * self.heads != self.hidden

    def size_of(self, symbol: str) -> int:
        """The number behind a symbol in a `TensorRow`'s shape."""
        sizes = {
            "vocab": self.vocab,
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "head_dim": self.head_dim,
            "q_out": self.heads * self.head_dim,
            "kv_out": self.kv_heads * self.head_dim,
        }
        return sizes[symbol]

    def shape_of(self, row: TensorRow) -> tuple[int, ...]:
        return tuple(self.size_of(symbol) for symbol in row.shape)

    def rows(self) -> Iterator[TensorRow]:
        """The family's rows that this model has."""
        return (row for row in self.family.rows if not row.when or getattr(self, row.when))

    def tensors(self) -> Iterator[tuple[TensorRow, int | None, str]]:
        """Every tensor of the model as (row, layer or None, name), in the order in which the model runs."""
        rows = list(self.rows())
        first_layer_row = next(i for i, row in enumerate(rows) if row.per_layer)
        for row in rows[:first_layer_row]:
            yield row, None, row.name
        for layer in range(self.layers):
            for row in rows:
                if row.per_layer:
                    yield row, layer, row.name.format(layer=layer)
        for row in rows[first_layer_row:]:
            if not row.per_layer:
                yield row, None, row.name


def read_spec(config: Mapping[str, Any], label: str) -> DenseSpec | list[Problem]:
    """The spec behind a config.json, or the problems that keep it from being one."""
    where = f"{label}/config.json"
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        what = f"model_type is {model_type!r}, which is no dense family that raymoe knows"
        return [Problem(where=where, what=what, remedy=f"use models of one of these types: {known}")]
    merged = {**FAMILIES[model_type].defaults, **{k: v for k, v in config.items() if v is not None}}
    # An explicit null means 'no sliding window', and must not fall back to the family's default.
    if "sliding_window" in config:
        merged["sliding_window"] = config["sliding_window"]
    problems = [
        Problem(where=where, what=f"{key} is {merged.get(key)!r}", remedy="expected a positive whole number")
        for key in _REQUIRED
        if not _is_positive_int(merged.get(key))
    ]
    problems += [
        Problem(where=where, what=f"{key} is {merged[key]!r:.80}", remedy=f"expected {expected}")
        for keys, is_valid, expected in _OPTIONAL
        for key in keys
        if merged.get(key) is not None and not is_valid(merged[key])
    ]
    if not problems:
        problems = _check_heads(merged, where)
    return problems or _build(model_type, merged, config)


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


# Keys that a config may leave out or set to null, what their values must be, and how to say so.
_OPTIONAL: tuple[tuple[tuple[str, ...], Callable[[object], bool], str], ...] = (
    (("num_key_value_heads", "head_dim", "max_position_embeddings"), _is_positive_int, "a positive whole number"),
    (("sliding_window", "max_window_layers"), lambda v: v == 0 or _is_positive_int(v), "a whole number or null"),
    (("rms_norm_eps", "rope_theta"), _is_positive, "a number over 0"),
    (("rope_scaling", "rope_parameters"), lambda v: isinstance(v, Mapping), "an object or null"),
    (("layer_types",), lambda v: isinstance(v, list), "a list or null"),
    (("hidden_act",), lambda v: isinstance(v, str), "text"),
    (
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
        lambda v: isinstance(v, bool),
        "true or false",
    ),
)


def _check_heads(merged: Mapping[str, Any], where: str) -> list[Problem]:
    heads, hidden = merged["num_attention_heads"], merged["hidden_size"]
    kv_heads = merged.get("num_key_value_heads", heads)
    problems = []
    if "head_dim" not in merged and hidden % heads:
        what = f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is no head_dim"
        problems.append(Problem(where=where, what=what, remedy="set head_dim"))
    if heads % kv_heads:
        what = f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        problems.append(Problem(where=where, what=what, remedy="check the model's config"))
    return problems


def _build(model_type: str, merged: Mapping[str, Any], config: Mapping[str, Any]) -> DenseSpec:
    family = FAMILIES[model_type]
    heads, layers = merged["num_attention_heads"], merged["num_hidden_layers"]
    attention_bias = bool(merged["attention_bias"]) and model_type in ("llama", "qwen3")
    theta, scaling = _rope(merged, config)
    window, sliding = _sliding(model_type, merged, layers)
    return DenseSpec(
        model_type=model_type,
        hidden=merged["hidden_size"],
        intermediate=merged["intermediate_size"],
        layers=layers,
        heads=heads,
        kv_heads=merged.get("num_key_value_heads", heads),
        head_dim=merged.get("head_dim") or merged["hidden_size"] // heads,
        vocab=merged["vocab_size"],
        hidden_act=merged["hidden_act"],
        rms_norm_eps=merged["rms_norm_eps"],
        max_positions=merged["max_position_embeddings"],
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=window,
        sliding_layers=sliding,
        tied=bool(merged["tie_word_embeddings"]),
        qkv_bias=attention_bias or family.fixed.get("qkv_bias", False),
        o_bias=attention_bias,
        mlp_bias=bool(merged["mlp_bias"]) and model_type == "llama",
        qk_norm=family.fixed.get("qk_norm", False),
    )


def _rope(merged: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[float, Mapping[str, Any] | None]:
    """theta and scaling. transformers reads `rope_scaling` before `rope_parameters` where a config has both."""
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = parameters.pop("rope_theta", None) or merged["rope_theta"]
    kind = parameters.pop("rope_type", None) or parameters.get("type", "default")
    parameters.pop("type", None)
    if kind == "default":
        return float(theta), None
    return float(theta), {"rope_type": kind, **parameters}


def _sliding(model_type: str, merged: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window and the layers it holds for (rules: each family's configuration class in transformers)."""
    none = (None, (False,) * layers)
    window = merged["sliding_window"]
    if model_type == "llama" or not window:
        return none
    if model_type == "mistral":
        return window, (True,) * layers
    if not merged["use_sliding_window"]:
        return none
    types = merged.get("layer_types")
    if types:
        sliding = tuple(kind == "sliding_attention" for kind in types)
    else:
        sliding = tuple(layer >= merged["max_window_layers"] for layer in range(layers))
    return (window, sliding) if any(sliding) else none
