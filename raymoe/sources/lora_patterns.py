"""Matches an adapter's rank_pattern and alpha_pattern: untrusted regular expressions, with bounded time.

A pattern matches a module's name, or its end after a dot. The first matching pattern counts. Source: `get_pattern_key`
in peft/utils/other.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

# The patterns that peft writes are names of modules. Four repetitions (`.*`) are within the limits.
LONGEST_NAME = 80
_PATTERN_CHARACTERS, _MAX_WAYS = 1000, LONGEST_NAME**4
# Per setting. A model of 126 layers has 882 modules with a pattern each, 35 kB. Compiling takes up to 4 us per
# character.
_MAX_PATTERNS, _MAX_TOTAL_CHARACTERS = 10_000, 400_000
# These make compiling slow, and module names need none of them: characters beyond ASCII (one class can hold hundreds of
# ranges), their escapes, and flags (each character is matched in both cases).
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPES_BY_NUMBER = frozenset("xuUN0")
_FLAG = re.compile(r"\(\?[^:=!<>P(]")
# For all patterns on all modules. A way takes about 2 ns, and a match as long as _WAYS_OF_A_MATCH: some 10 seconds.
_MAX_TOTAL_WAYS, _WAYS_PER_MATCH = 5 * 10**9, 1000


class Patterns:
    """The values that patterns give to modules."""

    def __init__(self, patterns: Mapping[str, Any], default: Any) -> None:
        self._values = [(_compiled(pattern), value) for pattern, value in patterns.items()]
        self._default = default

    def __bool__(self) -> bool:
        return bool(self._values)

    def value(self, module: str) -> Any:
        return next((value for pattern, value in self._values if pattern.match(module)), self._default)


def too_many_patterns(patterns: Collection[str]) -> str | None:
    """The problem of a setting with too many patterns. Call it before each pattern is checked."""
    if len(patterns) > _MAX_PATTERNS:
        return f"has {len(patterns)} patterns (at most {_MAX_PATTERNS})"
    if (characters := sum(map(len, patterns))) > _MAX_TOTAL_CHARACTERS:
        return f"has patterns of {characters:,} characters in all (at most {_MAX_TOTAL_CHARACTERS:,})"
    return None


def pattern_problem(pattern: str) -> str | None:
    """What is wrong with a pattern, as the end of a sentence; None if it is valid."""
    # Compiling costs time and memory itself, so it comes last.
    if len(pattern) > _PATTERN_CHARACTERS or _ways_to_try(pattern, LONGEST_NAME) > _MAX_WAYS:
        return f"has {pattern!r:.80}, which may take too long to match"
    if not pattern.isascii() or _ESCAPES_BY_NUMBER.intersection(_ESCAPE.findall(pattern)):
        return f"has {pattern!r:.80}, which has characters that names of modules don't have"
    if _FLAG.search(_ESCAPE.sub("a", pattern)):
        return f"has {pattern!r:.80}, which has flags, (?i) or the like"
    try:
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"has {pattern!r:.80}, which is no regular expression: {error}"
    return None


@lru_cache(maxsize=_MAX_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    """Compile with a cache: adapters of one merge mostly have the same patterns, but the cache of `re` holds only
    512."""
    return re.compile(rf"(.*\.)?({pattern})$")


def slow_patterns(settings: Collection[Mapping[str, Any]], modules: Collection[str]) -> str | None:
    """The problem of patterns that take too long in total."""
    longest = min(max(map(len, modules), default=0), LONGEST_NAME)
    patterns = [pattern for patterns in settings for pattern in patterns]
    ways = sum(_WAYS_PER_MATCH + _ways_to_try(pattern, longest) for pattern in patterns)
    if ways * len(modules) <= _MAX_TOTAL_WAYS:
        return None
    return f"{len(patterns)} patterns for {len(modules)} modules may take too long to match"


def _ways_to_try(pattern: str, characters: int) -> float:
    """The maximum number of ways that a failing match tries, on names of this many characters; inf without a limit.

    A repeated group may hold a choice of its own (`([a-z]+)+`), for which the ways grow exponentially. So no group may
    be repeated, except by `?`. Otherwise the ways multiply: a repetition can end at any character, and each group has
    its alternatives. Characters of a class (`[)*]`) are counted as if they were operators, which gives too many ways
    but never too few. `#` starts comments in verbose patterns, which could hide repetitions; names of modules contain
    no `#`.
    """
    plain = _ESCAPE.sub("a", pattern)
    if "#" in plain or re.search(r"\)\s*[*+{]", plain):
        return math.inf
    # Lazy and possessive repetitions count once, not twice. (After `}` they count as two: it may be a plain character.)
    plain = re.sub(r"([*+?])[?+]", r"\1", plain.replace("(?", "("))
    repetitions, optional = len(re.findall(r"[*+{]", plain)), plain.count("?")
    alternatives: int = math.prod(group.count("|") + 1 for group in re.split("[()]", plain))
    return float(min(alternatives * characters**repetitions * 2**optional, _MAX_WAYS + 1))
