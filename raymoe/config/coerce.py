"""Converts single values of a config, as YAML gives them, to texts, numbers and booleans.

Each function takes the value from the file. It returns the converted value, or raises an error with a remedy in its
context; `schema_errors` turns that into a message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic_core import PydanticCustomError

from raymoe.config.source_positions import short_repr, yaml_kind


def value_error(what: str, remedy: str, *, quote: bool = False) -> PydanticCustomError:
    """An error of one value. `quote`: quotes around the value would make it valid."""
    return PydanticCustomError("raymoe", "{what}", {"what": what, "remedy": remedy, "quote": quote})


def optional(parse: Callable[[Any], Any], default: Any = None) -> Callable[[Any], Any]:
    """`parse` for a key whose `null` is its default."""
    return lambda value: default if value is None else parse(value)


def parse_text(value: Any) -> str:
    if value is None:
        raise value_error("expected text, got nothing", "write the text, or remove the entry", quote=True)
    if not isinstance(value, str):
        raise value_error(f"expected text, got {yaml_kind(value)}", "put it in quotes", quote=True)
    try:
        # JSON may spell a character beyond U+FFFF as two escapes, which YAML reads as two halves of one.
        return value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise value_error(
            f"{short_repr(value)} is not valid Unicode text", "remove the lone surrogate (\\uD800-\\uDFFF)"
        ) from None


def parse_choice(value: Any, names: tuple[str, ...], nicknames: Mapping[str, str]) -> str:
    given = parse_text(value)
    if given in names:
        return given
    near = given.strip().lower()
    close = [nicknames[near]] if near in nicknames else get_close_matches(near, names, n=1)
    remedy = f"did you mean {close[0]}? (one of {', '.join(names)})" if close else f"use one of {', '.join(names)}"
    raise value_error(f"{short_repr(given)} is not a known value", remedy)


def parse_flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    got = f"the text {short_repr(value)}" if isinstance(value, str) else yaml_kind(value)
    raise value_error(f"expected true or false, got {got}", "write true or false, without quotes")


def parse_integer(value: Any, *, example: int) -> int:
    if isinstance(value, str):
        raise value_error(
            f"expected a whole number, got the text {short_repr(value)}", "write it as digits without quotes"
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise value_error(f"expected a whole number, got {yaml_kind(value)}", f"write a number, for example {example}")
    if isinstance(value, float) and not value.is_integer():
        remedy = f"write a number without a fraction, for example {example}"
        raise value_error(f"expected a whole number, got {short_repr(value)}", remedy)
    return int(value)


def parse_finite(value: Any) -> float:
    """A finite float."""
    if isinstance(value, str):
        number = _parse_number(value)
        remedy = f"write it without quotes: {number}" if number is not None else "write a number, for example 0.1"
        raise value_error(f"expected a number, got the text {short_repr(value)}", remedy)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise value_error(f"expected a number, got {yaml_kind(value)}", "write a number, for example 0.1")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise value_error(f"{short_repr(value)} is not a finite number", "write a number, for example 0.1")
    return number


def _parse_number(given: str) -> float | None:
    try:
        number = float(given)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
