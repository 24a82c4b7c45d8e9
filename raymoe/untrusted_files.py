"""Small files from outside, JSON and YAML, read within bounds.

A checkpoint's small files, a model's card and a merge's record are untrusted. Their size is checked before they are
read, the number of values before they are parsed, and the depth before they are walked through: returned values can be
copied, compared and written again without a RecursionError. Every error is a ValueError with a message for users.

A merge's own config is read by config/yaml_loader.py, which allows anchors and merges and has bounds of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

# The largest that are known: an index of a million tensors has 120 MB, a header of as many 100 MB and 8 million values,
# a tokenizer.json of 262,144 tokens 35 MB and 2 million values.
MAX_JSON_BYTES = 200 * 1024 * 1024
MAX_VALUES = 10_000_000
# Cards with the results of a hundred benchmarks have half a megabyte.
MAX_YAML_BYTES = 1 << 20
_MAX_YAML_VALUES = 300_000
# Ten levels are the most that was seen, in configs of models with several parts.
_MAX_DEPTH = 64
_NULL_TAG, _NULL = "tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$")

Pairs = Callable[[list[tuple[str, Any]]], Any]


def check_size(size: int, most: int = MAX_JSON_BYTES) -> None:
    """Raise ValueError if a file is too large. Call this before it is read."""
    if size > most:
        raise ValueError(f"{size:,} bytes are too many for such a file (at most {most:,})")


def read_json(content: bytes | str, *, pairs: Pairs | None = None) -> Any:
    """The value of a JSON text; `pairs` makes objects out of their (key, value) pairs. Raises ValueError."""
    check_size(len(content))
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    # An upper bound: each value but the first comes after a comma, a bracket or a brace.
    if text.count(",") + text.count("[") + text.count("{") > MAX_VALUES:
        raise ValueError(f"it holds more than {MAX_VALUES:,} values")
    try:
        value = json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise _too_deep() from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        level = [part for parts in level for part in _parts(parts) if isinstance(part, (dict, list))]
        if not level:
            return
    raise _too_deep()


def _parts(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _too_deep() -> ValueError:
    return ValueError(f"lists and objects are nested more than {_MAX_DEPTH} deep")


def read_yaml(text: str) -> Any:
    """The value of a YAML text, its scalars as text, and None for what is empty or null. Raises ValueError.

    Aliases and merges are refused, since with them a few lines stand for any number of values. Tags are ignored. Of
    several documents the first is read, and of a repeated key the last value.
    """
    import yaml

    check_size(len(text), MAX_YAML_BYTES)
    base = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    loader: Any = type("Loader", (base,), {})
    loader.add_implicit_resolver(_NULL_TAG, _NULL, ["", "~", "n", "N"])
    loader.add_constructor(_NULL_TAG, lambda loader, node: None)
    try:
        _check_events(yaml.parse(text, Loader=base))
        return next(yaml.load_all(text, Loader=loader), None)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _check_events(events: Iterator[Any]) -> None:
    """Raise ValueError for a document with aliases, merges or too many values. Events come one by one: the parser keeps
    only its position."""
    from yaml import events as kinds

    depth = 0
    for count, event in enumerate(events):
        if isinstance(event, kinds.DocumentEndEvent):
            return
        if count > _MAX_YAML_VALUES:
            raise ValueError(f"it holds more than {_MAX_YAML_VALUES:,} values")
        if isinstance(event, kinds.AliasEvent):
            raise ValueError("it has an alias (*name), which is not read here")
        if isinstance(event, kinds.ScalarEvent) and event.value == "<<" and not event.style:
            raise ValueError("it merges mappings (<<), which is not read here")
        depth += isinstance(event, kinds.CollectionStartEvent) - isinstance(event, kinds.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise _too_deep()
