"""The RoPE settings of a config.json, in one form for both generations of configs.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 writes `rope_parameters`; both are read. If a
config has both, `rope_scaling` counts, as in transformers. Kinds and the keys that each must have: transformers'
`modeling_rope_utils.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

POSITIVE = "a number over 0 (up to 1.8e+308)"
"""Describes what `is_positive` accepts, for messages."""

# Kind -> keys that transformers requires for it, all of them numbers or lists of numbers.
_REQUIRED_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_LISTS = ("short_factor", "long_factor")
# Kinds that are known where each kind of layer has settings of its own.
_REQUIRED_KEYS_PER_LAYER: Mapping[str, tuple[str, ...]] = {"default": (), "proportional": ()}
# Keys that may be left out or null, all of them numbers.
_OPTIONAL = (
    *("original_max_position_embeddings", "alpha", "attention_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor", "factor"),
)


def read_rope(config: Mapping[str, Any]) -> tuple[float, Mapping[str, Any] | None]:
    """theta, and the scaling with its `rope_type`; None for plain RoPE."""
    parameters = rope_parameters(config)
    theta = parameters.pop("rope_theta", None) or config["rope_theta"]
    kind = rope_kind(parameters)
    for key in ("rope_type", "type", "partial_rotary_factor"):  # `rotary_share` reads the last
        parameters.pop(key, None)
    if kind == "default":
        return float(theta), None
    return float(theta), {"rope_type": kind, **parameters}


def rotary_share(config: Mapping[str, Any]) -> float:
    """The share of each head's dimensions that RoPE rotates."""
    return float(rope_parameters(config).get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)


def ropes_of_layers(config: Mapping[str, Any], kinds: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """The config with one set of RoPE settings for all layers, as often as it has one: once if `kinds` is empty, else
    for each of these kinds of layers. The settings of a kind that it does not name are empty."""
    if not kinds:
        yield config
        return
    ropes = rope_parameters(config)
    for kind in kinds:
        yield {**config, "rope_scaling": None, "rope_parameters": ropes.get(kind)}


def rope_value_problems(config: Mapping[str, Any], kinds: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """(what, what was expected) of values that are invalid for every family, or for a family whose layers of each of
    `kinds` have settings of their own."""
    for kind in kinds:
        settings = rope_parameters(config).get(kind)
        if not isinstance(settings, Mapping) or not is_positive(settings.get("rope_theta")):
            yield f"its RoPE has no rope_theta for {kind} layers", "settings for each kind of layer"
            return
    for one in ropes_of_layers(config, kinds):
        yield from _value_problems(one)


def _value_problems(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for parameters in (config, rope_parameters(config)):
        share = parameters.get("partial_rotary_factor")
        if share is not None and not (is_positive(share) and share <= 1):
            yield f"partial_rotary_factor is {share!r:.80}", "a number over 0, up to 1"
    for key, value in rope_parameters(config).items():
        if key in ("rope_type", "type") and not isinstance(value, str):
            yield f"{key} of its RoPE is {value!r:.80}", "text"
        elif key == "rope_theta" and value is not None and not is_positive(value):
            yield f"rope_theta is {value!r:.80}", POSITIVE
        elif isinstance(value, Mapping):
            yield f"its RoPE has settings for {key:.80} layers alone", "one RoPE for all layers"
        elif key in _OPTIONAL and value is not None and not is_number(value):
            yield f"{key} of its RoPE is {value!r:.80}", "a number"
        elif any(_is_too_large(each) for each in (value if isinstance(value, list) else [value])):
            yield f"{key:.80} of its RoPE is {value!r:.80}", "a number that a float can hold"


def rope_kind_problems(
    config: Mapping[str, Any], rotary_dim: int, kinds: Sequence[str] = ()
) -> Iterator[tuple[str, str]]:
    """(what, what was expected) of a kind of scaling that transformers can't compute. `rotary_dim`: dimensions of a
    head that RoPE rotates. `kinds` as in `rope_value_problems`."""
    for one in ropes_of_layers(config, kinds):
        yield from _kind_problems(one, rotary_dim, _REQUIRED_KEYS_PER_LAYER if kinds else _REQUIRED_KEYS)


def _kind_problems(
    config: Mapping[str, Any], rotary_dim: int, known: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, str]]:
    parameters = rope_parameters(config)
    kind = rope_kind(parameters)
    if kind not in known:
        yield f"its RoPE is of type {kind!r:.40}", f"one of {', '.join(known)}"
        return
    for key in known[kind]:
        value = parameters.get(key)
        if key not in _LISTS and not is_positive(value):
            yield f"{key} of its {kind} RoPE is {value!r:.80}", POSITIVE
        elif key in _LISTS and not (
            isinstance(value, list) and len(value) == rotary_dim // 2 and all(map(is_positive, value))
        ):
            yield f"{key} of its {kind} RoPE is {value!r:.80}", f"{rotary_dim // 2} numbers over 0"


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the RoPE settings under either name."""
    found = config.get("rope_scaling") or config.get("rope_parameters")
    return dict(found) if isinstance(found, Mapping) else {}


def yarn_magnitude_ratio(scaling: Mapping[str, Any]) -> float | None:
    """The factor of yarn on cosines and sines if its settings have `mscale` and `mscale_all_dim`; else None.

    Source: transformers' `modeling_rope_utils.py`.
    """
    mscale, of_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if not (mscale and of_all):
        return None
    return yarn_magnitude(scaling["factor"], mscale) / yarn_magnitude(scaling["factor"], of_all)


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """How much larger yarn makes queries and keys of texts that are `factor` times as long (arXiv 2309.00071)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def original_length(scaling: Mapping[str, Any], longest: int) -> float:
    """The length in tokens of the texts that a model was made for before its RoPE was scaled. `longest`: its
    `max_position_embeddings`."""
    return float(scaling.get("original_max_position_embeddings") or longest)


def longrope_magnitude(scaling: Mapping[str, Any], longest: int) -> float:
    """The factor of longrope on cosines and sines. `longest`: the model's `max_position_embeddings`, in tokens.

    Source: `_compute_longrope_parameters` in transformers' `modeling_rope_utils.py`.
    """
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)
    length = original_length(scaling, longest)
    stretch = float(scaling.get("factor") or longest / length)
    return math.sqrt(1 + math.log(stretch) / math.log(length)) if stretch > 1 else 1.0


def rope_kind(parameters: Mapping[str, Any]) -> str:
    """The kind of scaling; older configs call it `type`."""
    kind: str = parameters.get("rope_type") or parameters.get("type") or "default"
    return kind


def is_positive(value: object) -> TypeGuard[float]:
    """Whether a value of a config is a number over 0."""
    return is_number(value) and value > 0


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a config is a number that a float can hold. JSON has integers of thousands of digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not _is_too_large(value)


def _is_too_large(value: object) -> bool:
    return isinstance(value, int) and abs(value) > sys.float_info.max
