"""Locations of values in a config file, and how messages quote what the user typed.

A `Loc` is the path of a value in the config, `("experts", 1, "positive_prompts")`; `SourcePositions` maps each one to
its `Mark` in the file. Checks name a `Loc` for each problem (`Finding`), and `SourcePositions` adds line numbers. So
the same checks serve a config file and a config made in Python, which has no lines.

Text that a user typed can be long and can hold control characters; `short_text` and `short_repr` make it fit into one
line of a terminal.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from raymoe.errors import Problem

Loc = tuple[str | int, ...]

_SHORT_TEXT_CHARS = 60


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Mark:
    """Where a value begins, counted from 1. `text` is how a scalar without quotes was typed, else `None`."""

    line: int
    column: int
    text: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePositions:
    """The marks of one config file. `name` is what messages call the file."""

    name: str
    marks: Mapping[Loc, Mark]

    def mark(self, loc: Loc) -> Mark | None:
        """The mark of `loc`, or of the nearest value around it: a missing key is reported there."""
        for length in range(len(loc), -1, -1):
            if (mark := self.marks.get(loc[:length])) is not None:
                return mark
        return None

    def describe(self, loc: Loc, mark: Mark | None = None) -> str:
        """`merge.yaml:12: experts[1].positive_prompts`, as far as known. `mark` overrides that of `loc`."""
        mark = mark or self.mark(loc)
        place = f"{self.name}:{mark.line}" if mark else self.name
        return ": ".join(part for part in (place, format_loc(loc)) if part)

    def problems(self, found: Iterable[Finding]) -> list[Problem]:
        """`found` as problems, in the order of the file."""
        sorted_problems = [(f.mark or self.mark(f.loc), f) for f in found]
        sorted_problems.sort(key=lambda pair: (pair[0].line, pair[0].column) if pair[0] else (0, 0))
        return [Problem(where=self.describe(f.loc, mark), what=f.what, remedy=f.remedy) for mark, f in sorted_problems]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A problem without its line. `mark` is for a value that has no `Loc` of its own: the second of two equal keys."""

    loc: Loc
    what: str
    remedy: str
    mark: Mark | None = None


NO_POSITIONS = SourcePositions(name="", marks={})
"""For configs made in Python: `where` is the path alone."""


def format_loc(loc: Loc) -> str:
    """`("experts", 1, "dtype")` as text: `experts[1].dtype`."""
    text = ""
    for step in loc:
        text += f"[{step}]" if isinstance(step, int) else f".{short_text(step)}" if text else short_text(step)
    return text


def short_text(text: str, limit: int = _SHORT_TEXT_CHARS) -> str:
    """The first `limit` characters of `text`, on one line and without control characters."""
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:limit])
    return f"{printable}..." if len(text) > limit else printable


def short_repr(value: object) -> str:
    """A value in a message: text in quotes, cut to a maximum length."""
    if isinstance(value, str):
        return f"'{short_text(value)}'"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > 200:
        # str() of an int refuses more than some thousand digits.
        return f"a number of {value.bit_length()} bits"
    return short_text(str(value))


def yaml_kind(value: object) -> str:
    """The type of a value, in YAML's words rather than Python's."""
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (type(None), "nothing"),
        (bool, "a boolean"),
        ((int, float), "a number"),
        (str, "text"),
        (datetime.date, "a date"),
        (bytes, "binary data"),
        (Mapping, "a mapping"),
        ((list, tuple), "a list"),
    )
    return next((name for types, name in kinds if isinstance(value, types)), f"a {type(value).__name__}")
