"""Small files from outside, JSON and YAML, read within bounds.

A checkpoint's small files, a model's card and a merge's record may be anybody's. Their size is looked at before they
are read, the number of values before they are parsed, and the depth before anything walks through them: what is
returned can be copied, compared and written again without a RecursionError. Everything that is wrong is a ValueError
whose text is for people.

A merge's own config is read by config/yaml_loader.py, which allows anchors and merges and has bounds of its own.
"""

from __future__ import annotations

import json
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

Pairs = Callable[[list[tuple[str, Any]]], Any]


def check_size(size: int, most: int = MAX_JSON_BYTES) -> None:
    """Raise ValueError for a file of more bytes than such a file has; to be called before it is read."""
    if size > most:
        raise ValueError(f"{size:,} bytes are too many for such a file (at most {most:,})")


def read_json(content: bytes | str, *, pairs: Pairs | None = None) -> Any:
    """The value of a JSON text; `pairs` makes objects out of their (key, value) pairs. Raises ValueError."""
    check_size(len(content))
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    # No fewer than there are: each value but the first comes after a comma, a bracket or a brace.
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

    Without anchors, aliases and merges, with which a few lines stand for any number of values. Tags are ignored.
    """
    import yaml

    check_size(len(text), MAX_YAML_BYTES)
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        # One by one: the parser keeps no more than where it is.
        return _document(yaml.parse(text, Loader=loader))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _document(events: Iterator[Any]) -> Any:
    """The value of the first document. `open_values` holds the lists and mappings that the next value is in."""
    from yaml import events as kinds

    open_values: list[Any] = [[]]
    keys: list[Any] = []  # of each open mapping: the key whose value comes next, or None
    for count, event in enumerate(events):
        if count > _MAX_YAML_VALUES:
            raise ValueError(f"it holds more than {_MAX_YAML_VALUES:,} values")
        if isinstance(event, kinds.AliasEvent):
            raise ValueError("it has an alias (*name), which is not read here")
        if isinstance(event, (kinds.SequenceEndEvent, kinds.MappingEndEvent)):
            value, key = open_values.pop(), keys.pop()
            assert key is None, "a key without a value"
            _put(open_values[-1], keys, value)
        elif isinstance(event, (kinds.SequenceStartEvent, kinds.MappingStartEvent)):
            if len(open_values) > _MAX_DEPTH:
                raise _too_deep()
            if keys and isinstance(open_values[-1], dict) and keys[-1] is None:
                raise ValueError("a key is a list or a mapping")
            open_values.append([] if isinstance(event, kinds.SequenceStartEvent) else {})
            keys.append(None)
        elif isinstance(event, kinds.ScalarEvent):
            if isinstance(open_values[-1], dict) and keys[-1] is None:
                if event.value == "<<" and not event.style:
                    raise ValueError("it merges mappings (<<), which is not read here")
                keys[-1] = event.value
            else:
                _put(open_values[-1], keys, None if _is_null(event) else event.value)
        elif isinstance(event, kinds.DocumentEndEvent):
            break
    return open_values[0][0] if open_values[0] else None


def _put(container: Any, keys: list[Any], value: Any) -> None:
    """Add a value where it belongs; of a key that comes twice the last value stays."""
    if isinstance(container, dict):
        container[keys[-1]] = value
        keys[-1] = None
    else:
        container.append(value)


def _is_null(event: Any) -> bool:
    return not event.style and event.value in ("", "~", "null", "Null", "NULL")
