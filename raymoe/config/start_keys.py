"""The keys of a config that describe a start for training: `moe_layers`, `granularity` and `reinit`.

moe_layers: odd          granularity: 4          reinit: 0.5
moe_layers: "8-31"
moe_layers: [0, 2, 3]
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any

from raymoe.config.coerce import parse_choice, parse_finite, parse_integer, value_error
from raymoe.config.source_positions import short_repr, yaml_kind

MoeLayers = str | tuple[int, ...]
"""`all`, `even`, `odd`, a range as text (`8-31`, both ends included), or the numbers of layers."""

ALL_LAYERS = "all"
_WORDS = (ALL_LAYERS, "even", "odd")
_NICKNAMES = {"every": ALL_LAYERS}
_RANGE = re.compile(r"(\d{1,5}) *- *(\d{1,5})")
_REMEDY = 'write all, even, odd, a range such as "8-31", or a list such as [0, 2, 4]; layer 0 is the first'


def parse_moe_layers(value: Any) -> MoeLayers:
    """The value of `moe_layers`. A list is sorted."""
    if isinstance(value, (list, tuple)):
        layers = tuple(parse_integer(layer, example=8) for layer in value)
        if not layers:
            raise value_error("no layer would have experts", _REMEDY)
        if negative := [layer for layer in layers if layer < 0]:
            raise value_error(f"{short_repr(negative[0])} is no number of a layer", _REMEDY)
        if twice := [layer for layer in layers if layers.count(layer) > 1]:
            raise value_error(f"layer {short_repr(twice[0])} is listed twice", "list each layer once")
        return tuple(sorted(layers))
    if isinstance(value, bool) or not isinstance(value, str):
        raise value_error(f"expected layers, got {yaml_kind(value)}", _REMEDY)
    if found := _RANGE.fullmatch(value.strip()):
        first, last = map(int, found.groups())
        if first > last:
            raise value_error(f"the range {short_repr(value)} ends before it begins", f'write "{last}-{first}"')
        return f"{first}-{last}"
    if re.search(r"\d", value):
        raise value_error(f"{short_repr(value)} is no range of layers", _REMEDY)
    word = value.strip().lower()
    if word not in _NICKNAMES and not get_close_matches(word, _WORDS, n=1):
        raise value_error(f"{short_repr(value)} is not a known value", _REMEDY)
    return parse_choice(value, _WORDS, _NICKNAMES)


def plain_moe_layers(value: MoeLayers) -> str | list[int]:
    """The value of `moe_layers` as JSON has it."""
    return value if isinstance(value, str) else list(value)


def chosen_layers(value: MoeLayers, layers: int) -> list[int] | str:
    """The layers with experts of a model with `layers` layers, in ascending order. A text says what is wrong.

    Example:
        >>> chosen_layers("1-2", 4)
        [1, 2]
    """
    if isinstance(value, str) and (found := _RANGE.fullmatch(value)):
        value = tuple(range(int(found[1]), int(found[2]) + 1))
    if isinstance(value, str):
        steps = {ALL_LAYERS: range(layers), "even": range(0, layers, 2), "odd": range(1, layers, 2)}
        return list(steps[value]) or f"{value} names no layer of a model with {layers}"
    if value[-1] >= layers:
        return f"there is no layer {value[-1]}: the base has {layers} layers, numbered from 0 to {layers - 1}"
    return list(value)


def parse_granularity(value: Any) -> int:
    """In how many experts each FFN is cut."""
    number = parse_integer(value, example=4)
    if number < 1:
        remedy = "write in how many experts each FFN is cut, 2 or more; 1 leaves it whole"
        raise value_error(f"{short_repr(number)} is no number of experts", remedy)
    return number


def parse_reinit(value: Any) -> float:
    """The share of an expert's channels that are drawn anew."""
    number = parse_finite(value)
    if not 0 <= number <= 1:
        remedy = "write the share of channels to draw anew: from 0 to 1; the paper of Drop-Upcycling takes 0.5"
        raise value_error(f"{short_repr(number)} is not a share", remedy)
    return number
