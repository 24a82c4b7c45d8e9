"""`DenseSpec`: what a dense model's config.json says, in one form for all families and both generations of configs.

Keys that a config leaves out take the family's default (see `DenseFamily.defaults`), never another family's. The RoPE
settings of a config are read in rope.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from raymoe.architectures.dense_family import DenseFamily, Scan, TensorRow
from raymoe.architectures.families import FAMILIES
from raymoe.architectures.rope import (
    POSITIVE,
    is_number,
    is_positive,
    read_rope,
    rope_kind_problems,
    rope_value_problems,
    ropes_of_layers,
    rotary_share,
)
from raymoe.architectures.tensor_tables import ATTENTION, LINEAR, SHARED, SLIDING
from raymoe.architectures.unsupported_families import unsupported_reason
from raymoe.errors import Problem, first_few
from raymoe.tensor_names import HEAD, layer_of

# Keys where null means that the model lacks the feature.
NULL_MEANS_NONE = frozenset({"sliding_window", "q_lora_rank", "hidden_size_per_layer_input"})
# The numbers in one token's keys, and in its values, in a layer without a window (Gemma 4's).
_WINDOWLESS_KEYS = "num_global_key_value_heads*global_head_dim"
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class DenseSpec:
    """Sizes and features of one dense model.

    Attributes:
        model_type: Its family, a key of `FAMILIES`.
        hidden: The width of hidden states.
        intermediate: The width of the FFN.
        layers: How many layers it has.
        heads: How many heads of queries each layer has.
        kv_heads: How many heads of keys and values each layer has.
        head_dim: The width of a head.
        vocab: How many rows the embedding has.
        hidden_act: The activation of the FFN, by transformers' name.
        rms_norm_eps: What norms add to a variance, LayerNorm included.
        max_positions: The longest text that it is made for, in tokens.
        rope_theta: The base of rotary frequencies.
        rope_scaling: transformers' dict with `rope_type`. None for plain RoPE.
        sliding_window: How many tokens the layers with a window attend to. None if no layer has one.
        sliding_layers: For each layer, whether it has a window.
        tied: The embedding is the output matrix.
        qkv_bias: The projections of q, k and v have biases.
        o_bias: The output projection of attention has a bias.
        mlp_bias: The matrices of the FFN have biases.
        qk_norm: Attention has norms on the heads of q and k.
        kinds: For each layer, its kind. Empty if all layers are alike.
        partial_rotary: The share of each head that RoPE rotates.
        extra: The family's own keys (`DenseFamily.carried`) with their values.
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
    kinds: tuple[str, ...] = ()
    partial_rotary: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> DenseFamily:
        return FAMILIES[self.model_type]

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of each head RoPE rotates."""
        return int(self.head_dim * self.partial_rotary)

    @property
    def untied(self) -> bool:
        return not self.tied

    @property
    def latent_q_bias(self) -> bool:
        """Whether queries are made of latent numbers that have a bias (DeepSeek's attention)."""
        return self.qkv_bias and bool(self.extra["q_lora_rank"])

    @property
    def windowless_v_bias(self) -> bool:
        """Whether layers without a window have values with a bias, and not their keys as values (Gemma 4's)."""
        return self.qkv_bias and not self.extra["attention_k_eq_v"]

    @property
    def scan(self) -> Scan | None:
        """Memory of its layers of linear attention or state spaces; None if it has none."""
        return self.family.scan(self.extra) if self.family.scan and LINEAR in self.kinds else None

    def layers_of(self, kind: str) -> list[int]:
        return [layer for layer, this in enumerate(self.kinds) if this == kind]

    @property
    def layer_types(self) -> list[str]:
        """`layer_types` of a config.json whose layers are of several kinds."""
        return [kind.removeprefix(SHARED) for kind in self.kinds]

    @cached_property
    def ffn_widths(self) -> tuple[int, ...]:
        """The width of each layer's FFN."""
        return tuple(
            next(self.shape_of(row)[-1] for row in self.rows(layer) if row.role == "ffn.down")
            for layer in range(self.layers)
        )

    @property
    def kept_keys(self) -> int:
        """How many numbers per token the keys and values are that layers keep for later ones."""
        shared = {kind.removeprefix(SHARED) for kind in self.kinds if kind.startswith(SHARED)}
        return sum(2 * self.size_of("kv_out" if kind == SLIDING else _WINDOWLESS_KEYS) for kind in shared)

    def ignores(self, name: str) -> bool:
        """Whether no model reads this tensor, though checkpoints may hold it."""
        layer = layer_of(name)
        kind = self.kinds[layer] if self.kinds and layer is not None and layer < self.layers else ""
        suffixes = (*self.family.ignored, *self.family.ignored_in.get(kind, ()))
        return name.endswith(suffixes) or (name == HEAD and self.tied)

    @property
    def has_mixed_windows(self) -> bool:
        """Whether some layers have a sliding window and some have none."""
        return len(set(self.sliding_layers)) > 1

    @property
    def attention_interval(self) -> int | None:
        """n, if every n-th layer has attention and the others have none; None if its layers follow no such rule."""
        every = self.kinds.index(ATTENTION) + 1 if ATTENTION in self.kinds else 0
        regular = every and all((kind == ATTENTION) == (n % every == 0) for n, kind in enumerate(self.kinds, 1))
        return every if regular else None

    @property
    def scales_rope(self) -> bool:
        """Whether its RoPE has any scaling."""
        return self.rope_scaling is not None

    @property
    def window_types(self) -> list[str]:
        """`layer_types` of a config.json whose layers have a sliding window or none."""
        return ["sliding_attention" if sliding else "full_attention" for sliding in self.sliding_layers]

    @property
    def explicit_head_dim(self) -> bool:
        """Whether head_dim is not simply hidden / heads."""
        return self.head_dim * self.heads != self.hidden

    def size_of(self, symbol: str) -> int:
        """The number behind a symbol in a `TensorRow`'s shape: a name, a number, or products and sums of them."""
        return sum(prod(self._size(name) for name in term.split("*")) for term in symbol.split("+"))

    def _size(self, name: str) -> int:
        if name.isdecimal():
            return int(name)
        sizes = {
            "vocab": self.vocab,
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "layers": self.layers,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "q_out": self.heads * self.head_dim,
            "kv_out": self.kv_heads * self.head_dim,
        }
        size: int = sizes[name] if name in sizes else self.extra[name]
        return size

    def shape_of(self, row: TensorRow) -> tuple[int, ...]:
        if row.shape not in self._shapes:
            self._shapes[row.shape] = tuple(self.size_of(symbol) for symbol in row.shape)
        return self._shapes[row.shape]

    @cached_property
    def _shapes(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        return {}

    def fused_parts(self, row: TensorRow) -> Iterator[tuple[str, int, int]]:
        """(role, first row, row after the last) of each matrix in a tensor. Most tensors hold one matrix."""
        if not row.fused:
            yield row.role, 0, self.shape_of(row)[0]
        start = 0
        for role, rows in row.fused:
            yield role, start, start + self.size_of(rows)
            start += self.size_of(rows)

    def rows(self, layer: int | None = None) -> Iterator[TensorRow]:
        """The family's rows that this model has; only those of `layer` if it is given."""
        kind = self.kinds[layer] if layer is not None and self.kinds else ""
        for row in self.family.rows:
            if row.when and self._has(row.when.removeprefix("!")) is row.when.startswith("!"):
                continue
            if layer is None or (row.per_layer and row.kind in ("", kind)):
                yield row

    def _has(self, flag: str) -> bool:
        return bool(self.extra[flag] if flag in self.extra else getattr(self, flag))

    def tensors(self) -> Sequence[tuple[TensorRow, int | None, str]]:
        """Every tensor of the model as (row, layer or None, name), in the order in which the model runs."""
        return self._tensors

    @cached_property
    def _tensors(self) -> tuple[tuple[TensorRow, int | None, str], ...]:
        return tuple((row, layer, sys.intern(name)) for row, layer, name in self._named_rows())

    def _named_rows(self) -> Iterator[tuple[TensorRow, int | None, str]]:
        rows = list(self.rows())
        first_layer_row = next(i for i, row in enumerate(rows) if row.per_layer)
        for row in rows[:first_layer_row]:
            yield row, None, row.name
        for layer in range(self.layers):
            for row in self.rows(layer):
                yield row, layer, row.name.format(layer=layer)
        for row in rows[first_layer_row:]:
            if not row.per_layer:
                yield row, None, row.name


_MAX_LAYERS = 10_000  # each takes memory at once; the largest models have 130


def read_spec(config: Mapping[str, Any], label: str) -> DenseSpec | list[Problem]:
    """The spec of a config.json, or the problems that prevent reading it."""
    where = f"{label}/config.json"
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        return [_unknown_family_problem(model_type, where)]
    merged = _with_defaults(FAMILIES[model_type], config)
    problems = [
        Problem(where=where, what=f"{key} is {merged.get(key)!r:.80}", remedy="expected a positive whole number")
        for key in _REQUIRED
        if not _is_positive_int(merged.get(key))
    ]
    layers = merged.get("num_hidden_layers")
    if not problems and isinstance(layers, int) and layers > _MAX_LAYERS:
        what = f"num_hidden_layers is {layers}"
        problems.append(Problem(where=where, what=what, remedy=f"expected at most {_MAX_LAYERS}"))
    problems += [
        Problem(where=where, what=f"{key} is {merged[key]!r:.80}", remedy=f"expected {expected}")
        for keys, is_valid, expected in _OPTIONAL
        for key in keys
        if merged.get(key) is not None and not is_valid(merged[key])
    ]
    family = FAMILIES[model_type]
    problems = problems or _value_problems(where, rope_value_problems(merged, family.rope_kinds))
    if problems:
        return problems
    if limits := family.limits(merged):
        return [
            Problem(where=where, what=reason, remedy="check the model's config; `raymoe archs` lists what works")
            for reason in limits
        ]
    merged |= family.adjust(merged)
    problems = [*_check_heads(merged, where), *_check_layers(family, merged, where)]
    if problems:
        return problems
    spec = _build(family, merged)
    return _value_problems(where, rope_kind_problems(merged, spec.rotary_dim, family.rope_kinds)) or spec


def _value_problems(where: str, found: Iterable[tuple[str, str]]) -> list[Problem]:
    return first_few(Problem(where=where, what=what, remedy=f"expected {expected}") for what, expected in found)


def _unknown_family_problem(model_type: object, where: str) -> Problem:
    if isinstance(model_type, str) and (reason := unsupported_reason(model_type)):
        what, remedy = f"model_type is {model_type!r}: {reason}", "use models of a family that `raymoe archs` lists"
        return Problem(where=where, what=what, remedy=remedy)
    known = ", ".join(sorted(FAMILIES))
    what = f"model_type is {model_type!r}, which is no dense family that raymoe knows"
    return Problem(where=where, what=what, remedy=f"use models of one of these types: {known}")


def _with_defaults(family: DenseFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the family's defaults, and with the usual names for keys that the family names differently."""
    merged = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    # transformers takes null for a switch as off, and for this number as another; of other keys it leaves the default.
    off = {key for key, default in family.defaults.items() if isinstance(default, bool) and key in config}
    merged |= {key: False for key in off if config[key] is None}
    merged |= {key: config[key] for key in NULL_MEANS_NONE & config.keys()}
    if "num_key_value_heads" in config and config["num_key_value_heads"] is None:
        merged["num_key_value_heads"] = merged.get("num_attention_heads")
    for usual, names in family.keys.items():
        found = [name for name in names if name in merged]
        if found:
            merged[usual] = merged[found[0]]
    return merged


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**48


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) for each in value)


def _is_limit(value: object) -> bool:
    """Whether it is a pair of numbers. transformers 5 writes infinity as an object."""
    infinity = {"__float__": "Infinity"}
    return (
        isinstance(value, list)
        and len(value) == 2
        and is_number(value[0])
        and (is_number(value[1]) or value[1] == infinity)
    )


# Keys that a config may leave out or set to null, the check of their values, and its description.
_OPTIONAL: tuple[tuple[tuple[str, ...], Callable[[object], bool], str], ...] = (
    (("num_key_value_heads", "head_dim", "max_position_embeddings"), _is_positive_int, "a positive whole number"),
    (
        ("sliding_window", "max_window_layers"),
        lambda v: v == 0 or _is_positive_int(v),
        "a whole number from 0 on or null",
    ),
    (("rms_norm_eps", "rope_theta", "logits_scaling"), is_positive, POSITIVE),
    (("block_ffn_dim_multiplier",), lambda v: is_positive(v) and v < 2**20, "a number over 0, below 1,048,576"),
    (
        ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logit_scale"),
        is_number,
        "a number",
    ),
    (
        (
            "conv_L_cache",
            "sliding_window_pattern",
            "block_multiple_of",
            "full_attention_interval",
            "no_rope_layer_interval",
            *("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
            *("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
            *("linear_num_key_heads", "linear_num_value_heads"),
            *("global_head_dim", "num_global_key_value_heads"),
            *("mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_chunk_size"),
        ),
        _is_positive_int,
        "a positive whole number",
    ),
    (("final_logit_softcapping",), is_positive, POSITIVE),
    (("vocab_size_per_layer_input",), _is_positive_int, "a positive whole number"),
    (
        ("hidden_size_per_layer_input", "num_kv_shared_layers"),
        lambda v: v == 0 or _is_positive_int(v),
        "a whole number from 0 on",
    ),
    (("rope_scaling", "rope_parameters", "per_layer_config"), lambda v: isinstance(v, Mapping), "an object or null"),
    (("layer_types", "layers_block_type"), lambda v: _is_list_of(v, str), "a list of kinds or null"),
    (("full_attn_idxs",), lambda v: _is_list_of(v, int), "a list of numbers of layers or null"),
    (("mamba_d_head",), lambda v: v == "auto" or _is_positive_int(v), 'a positive whole number or "auto"'),
    (("time_step_limit",), _is_limit, "two numbers"),
    (("hidden_act",), lambda v: isinstance(v, str), "text"),
    (
        (
            *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias", "conv_bias", "use_sliding_window"),
            *("rope_interleave", "mamba_conv_bias", "mamba_proj_bias", "attention_k_eq_v", "use_double_wide_mlp"),
        ),
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
    head_dim = merged.get("head_dim") or hidden // heads
    if head_dim % 2 and rotary_share(merged) == 1.0 and merged.get("position_embedding_type", "rope") == "rope":
        what = f"each head has {head_dim} dimensions, an odd number, but RoPE rotates pairs of them"
        problems.append(Problem(where=where, what=what, remedy="check the model's config"))
    return problems


def _check_layers(family: DenseFamily, merged: Mapping[str, Any], where: str) -> list[Problem]:
    """If `layer_types` matters, it must name every layer, with kinds that the family has."""
    types, layers = merged.get("layer_types"), merged["num_hidden_layers"]
    known = {row.kind.removeprefix(SHARED) for row in family.rows if row.kind} or {
        "full_attention",
        "sliding_attention",
    }
    if not types or not family.reads_layer_types:
        return []
    if len(types) != layers:
        what = f"layer_types has {len(types)} entries, but num_hidden_layers is {layers}"
        return [Problem(where=where, what=what, remedy="give one for each layer")]
    invalid = sorted({str(kind) for kind in types} - known)
    if invalid:
        what = f"layer_types has {', '.join(invalid)}, which a {family.model_type} model does not have"
        return [Problem(where=where, what=what, remedy=f"expected {' or '.join(sorted(known))}")]
    return []


def _build(family: DenseFamily, merged: Mapping[str, Any]) -> DenseSpec:
    heads, layers = merged["num_attention_heads"], merged["num_hidden_layers"]
    theta, scaling = read_rope(next(ropes_of_layers(merged, family.rope_kinds)))
    window, sliding = family.windows(merged, layers)

    def has(feature: str) -> bool:
        key = family.switches.get(feature)
        return family.fixed.get(feature, False) or (key is not None and bool(merged.get(key)))

    return DenseSpec(
        model_type=family.model_type,
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
        qkv_bias=has("qkv_bias"),
        o_bias=has("o_bias"),
        mlp_bias=has("mlp_bias"),
        qk_norm=has("qk_norm"),
        kinds=family.kinds(merged, layers) if family.kinds else (),
        partial_rotary=rotary_share(merged) if family.has_partial_rotary else 1.0,
        extra={key: merged.get(key) for key in family.carried},
    )
