"""The `storage:` block of a config: how object stores are reached. Never credentials: configs are shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from raymoe.config.source_positions import short_repr, yaml_kind
from raymoe.errors import ProblemReport
from raymoe.object_store.options import StorageOptions

_TYPES: Mapping[str, tuple[type, ...]] = {
    "endpoint": (str,),
    "region": (str,),
    "profile": (str,),
    "checksum": (str,),
    "anonymous": (bool,),
    "max_requests": (int,),
    "max_copies": (int,),
    "read_timeout_s": (int, float),
    "deadline_s": (int, float),
}
_SECRET_WORDS = ("key", "secret", "token", "password", "credential")


def storage_options(value: Any) -> StorageOptions:
    """The options that the block gives. Raises ValueError with (what, remedy)."""
    if value is None or isinstance(value, StorageOptions):
        return value or StorageOptions()
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping, got {yaml_kind(value)}", f"keys here: {', '.join(_TYPES)}")
    given = {key: item for key, item in value.items() if item is not None}
    for key, item in given.items():
        _check(str(key), item)
    try:
        return StorageOptions(**given)
    except ProblemReport as error:
        problem = error.problems[0]
        raise ValueError(f"{problem.where.removeprefix('storage.')}: {problem.what}", problem.remedy) from None


def _check(key: str, item: Any) -> None:
    if key not in _TYPES:
        if any(word in key.lower() for word in _SECRET_WORDS):
            remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile of ~/.aws, where the merge runs"
            raise ValueError(f"{key!r} looks like a credential, which a config never holds", remedy)
        near = get_close_matches(key, _TYPES, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]}?" if near else f"keys here: {', '.join(_TYPES)}"
        raise ValueError(f"unknown key {key!r}", remedy)
    wanted = _TYPES[key]
    if not isinstance(item, wanted) or (isinstance(item, bool) and bool not in wanted):
        kind = {str: "text", bool: "true or false", int: "a whole number"}[wanted[0]]
        raise ValueError(f"{key} is {short_repr(item)}", f"write {kind}")


def plain_storage(options: StorageOptions) -> dict[str, Any]:
    """The keys that differ from their defaults, as in a config."""
    default = StorageOptions()
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def storage_note(options: StorageOptions) -> str | None:
    """A note about the endpoint and profile that a config sets for signed requests; None if it sets neither."""
    if not options.endpoint and not options.profile:
        return None
    address = f" at {options.endpoint}" if options.endpoint else ""
    profile = f" with the profile {options.profile!r}" if options.profile else ""
    return f"s3:// is reached{address}{profile}, as storage: in the config says"
