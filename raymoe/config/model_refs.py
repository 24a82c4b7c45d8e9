"""How a config names a model: one string, or mergekit's mapping, parsed to a `ModelRef`.

    org/name    org/name@revision    ./folder    s3://bucket/folder
    model+adapter    model@revision+adapter@revision    s3://bucket/base+s3://bucket/adapter
    {model: {path: org/name, revision: main}, lora: {path: ./adapter}}
    mixture#2    mixture@revision#2    mixture#shared    {model: org/mixture, expert: 2}

The last line names one expert of a mixture, viewed as a dense model (sources/mixture.py): `#` and its number, or
`#shared`.

'+', '@' and '#' may occur in the name of a local folder. So an existing folder wins over a split: first the whole
string is tried, then each split at a '+', then each part before it is split at its '@'. Only a folder of exactly the
written name counts, so an unrelated folder never changes how a config is read. URLs are taken literally and have no
revisions; one with a '+', or with a number after a last '#', is written as a mapping.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from raymoe.formatting import plural
from raymoe.object_store.location import Location
from raymoe.object_store.urls import check_no_secrets, check_spelling, is_url, normalize_url

SHARED_EXPERT = "shared"
"""In place of an expert's number: the FFN of a mixture's shared experts."""

_COMMIT = re.compile(r"@[0-9a-f]{40}(?=#|$)")
_EXPERT = re.compile(rf"(?P<model>.*\S)\s*#\s*(?P<expert>[0-9]{{1,6}}|{SHARED_EXPERT})", re.DOTALL)
_FORMS = "write 'model', 'model@revision', 'model+adapter' or 'model@revision+adapter@revision'"


@dataclass(frozen=True, slots=True, kw_only=True)
class PathRef:
    """A local folder, a Hub id (`org/name`) with the revision asked for, if any, or a URL in normal form."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path

    @property
    def location(self) -> Location | None:
        """The location of a URL; None for a folder or a Hub id, which only the file system can tell apart."""
        return Location.of(self.path) if is_url(self.path) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """A model as a config names it: `model`, `model@revision`, `model+adapter`, `model@rev+adapter@rev`, `mixture#2`.

    Attributes:
        model: Where the model is.
        adapter: Where a LoRA adapter for it is. None: the model is used as it is.
        expert: The model is a mixture, and this is the number of its expert that is used as a dense model, or
            `SHARED_EXPERT`. None: the model is used as it is.
    """

    model: PathRef
    adapter: PathRef | None = None
    expert: int | str | None = None

    @property
    def paths(self) -> tuple[PathRef, ...]:
        """The model and, if there is one, its adapter."""
        return (self.model,) if self.adapter is None else (self.model, self.adapter)

    def __str__(self) -> str:
        model = str(self.model) + expert_suffix(self.expert)
        return f"{model}+{self.adapter}" if self.adapter else model


def expert_suffix(expert: int | str | None) -> str:
    """What a name or label of a mixture ends with if one of its experts is meant; empty for None."""
    return "" if expert is None else f"#{expert}"


def without_expert(name: str) -> str:
    """The name or label of a mixture, without the number of an expert.

    Example:
        >>> without_expert("org/mixture@main#2")
        'org/mixture@main'
    """
    return _split_expert(name)[0]


def paths_in_label(label: str) -> list[str]:
    """The names of the model and of its adapter in a label, without the number of an expert.

    Example:
        >>> paths_in_label("org/mixture@main#2+./adapter")
        ['org/mixture@main', './adapter']
    """
    return [without_expert(name) for name in label.split("+")]


def parse_expert(value: Any) -> int | str:
    """Which expert of a mixture a config names: a number from 0 on, or `SHARED_EXPERT`.

    Raises ValueError with a message for the user.
    """
    is_number = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**6
    if is_number or value == SHARED_EXPERT:
        found: int | str = value
        return found
    raise ValueError(f"'expert' is the number of an expert, from 0 on, or '{SHARED_EXPERT}', not {_kind_name(value)}")


def with_expert(ref: ModelRef, expert: int | str) -> ModelRef:
    """The reference to one expert of the mixture that `ref` names. Raises ValueError if it names another expert."""
    if ref.expert not in (None, expert):
        raise ValueError(f"{str(ref)!r} names expert {ref.expert}, but 'expert' is {expert}; write one of them")
    return replace(ref, expert=expert)


def parse_model_ref(value: str | Mapping[str, Any]) -> ModelRef:
    """Parse a model as a config names it.

    Raises ValueError with a message for the user; the caller knows the config key and adds it.
    """
    if isinstance(value, str):
        return _parse_string(value)
    if isinstance(value, Mapping):
        return _parse_mapping(value)
    raise ValueError(f"a model is a string or a mapping with 'model' and 'lora', not {_kind_name(value)}; {_FORMS}")


def is_local_folder(path: str) -> bool:
    """Whether `path` (with '~' for the home folder) is a folder on this machine."""
    return "\0" not in path and os.path.isdir(os.path.expanduser(path))


def _parse_string(text: str) -> ModelRef:
    text = text.strip()
    check_no_secrets(text)
    if not text:
        raise ValueError(f"the model is empty; {_FORMS}")
    if is_local_folder(text) or is_local_folder(without_expert(text)) or "+" not in text:
        return _parse_model(text)
    splits = [(text[:at], text[at + 1 :]) for at, char in enumerate(text) if char == "+"]
    if len(splits) > 1:
        local = [split for split in splits if all(_is_folder_name(part) or "+" not in part for part in split)]
        if len(local) != 1:
            raise ValueError(
                f"{text!r} has {len(splits)} '+', but a model takes one adapter; {_FORMS}. "
                "(Several adapters: merge all but one first. A folder with '+' in its name has to exist; "
                "a URL with '+' is written as {model: {path: s3://...}}.)"
            )
        splits = local
    model, adapter = splits[0]
    return replace(_parse_model(model), adapter=_parse_path(adapter, "adapter"))


def _parse_model(text: str) -> ModelRef:
    """A model, or one expert of a mixture."""
    path, expert = (text, None) if is_local_folder(text.strip()) else _split_expert(text)
    return ModelRef(model=_parse_path(path, "model"), expert=expert)


def _split_expert(text: str) -> tuple[str, int | str | None]:
    """The name before a last '#', and the expert after it; the whole text and None if it names no expert."""
    match = _EXPERT.fullmatch(text)
    if match is None:
        return text, None
    return match["model"], match["expert"] if match["expert"] == SHARED_EXPERT else int(match["expert"])


def _is_folder_name(part: str) -> bool:
    part = part if is_local_folder(part) else _split_expert(part)[0]
    return is_local_folder(part) or ("@" in part and is_local_folder(part.rpartition("@")[0]))


def _parse_path(text: str, role: str) -> PathRef:
    text = text.strip()
    if not text:
        raise ValueError(f"the {role} is empty; {_FORMS}")
    check_spelling(text)
    if is_url(text):
        return PathRef(path=_url_without_revision(text, role))
    if is_local_folder(text) or "@" not in text:
        return PathRef(path=text)
    path, _, revision = text.rpartition("@")
    if not path.strip():
        raise ValueError(f"{text!r} has a revision but no {role} before the '@'; {_FORMS}")
    if not revision.strip():
        raise ValueError(f"the revision after '@' in {text!r} is empty; leave the '@' out for the default branch")
    # An '@' before a '/' is part of a path (./a@b/c, not there yet), and a second '@' is no Hub id.
    if "@" in path and not is_local_folder(path):
        raise ValueError(f"{text!r} has more than one '@', and no folder of that name exists here; {_FORMS}")
    return PathRef(path=path.strip(), revision=revision.strip())


def _url_without_revision(text: str, role: str) -> str:
    check_no_secrets(text)
    name, at, revision = text.rpartition("/")[2].rpartition("@")
    if at:
        raise ValueError(
            f"{text!r} asks for revision {revision!r}, but a URL has none; leave out '@{revision}', or, if the folder "
            f"is called {name}@{revision}, write {{{role}: {{path: {text}}}}}"
        )
    return normalize_url(text)


def _parse_mapping(value: Mapping[str, Any]) -> ModelRef:
    if value.get("override_architecture") is not None:
        raise ValueError(
            "'override_architecture' is not supported: the architecture is read from config.json; "
            "correct 'architectures' and 'model_type' there"
        )
    _refuse_unknown(value, {"model", "lora", "expert", "override_architecture"}, "a model")
    if value.get("model") is None:
        raise ValueError("the mapping of a model has no 'model'; write {model: {path: org/name}, lora: {path: ...}}")
    model, lora, expert = value["model"], value.get("lora"), value.get("expert")
    if isinstance(model, str) and lora is None:
        ref = _parse_string(model)
    else:
        ref = _parse_model(model) if isinstance(model, str) else ModelRef(model=_parse_part(model, "model"))
        ref = replace(ref, adapter=None if lora is None else _parse_part(lora, "lora"))
    return ref if expert is None else with_expert(ref, parse_expert(expert))


def _parse_part(value: Any, role: str) -> PathRef:
    if isinstance(value, str):
        return _parse_path(value, role)
    if not isinstance(value, Mapping):
        raise ValueError(f"'{role}' is a string or a mapping with 'path' and 'revision', not {_kind_name(value)}")
    _refuse_unknown(value, {"path", "revision"}, f"'{role}'")
    path, revision = value.get("path"), value.get("revision")
    if not isinstance(path, str) or not path.strip():
        raise ValueError(f"'{role}' needs a 'path': a local folder, a Hub id such as org/name, or a URL")
    check_spelling(path)
    if is_url(path):
        if revision is not None:
            raise ValueError(f"'{role}' is a URL, and a URL has no revisions; leave out 'revision'")
        return PathRef(path=normalize_url(path))
    if revision is not None and (not isinstance(revision, str) or not revision.strip()):
        raise ValueError(f"'revision' of '{role}' must be a branch, tag or commit as a string, not {revision!r}")
    check_no_secrets(revision or "")
    # As in mergekit, `path` here is taken literally, and not split.
    return PathRef(path=path.strip(), revision=revision.strip() if revision else None)


def _refuse_unknown(value: Mapping[str, Any], known: set[str], what: str) -> None:
    unknown = sorted(str(key) for key in value if key not in known)
    if unknown:
        known_text = ", ".join(sorted(known - {"override_architecture"}))
        keys = f"{plural('key', len(unknown))} {', '.join(unknown)}"
        raise ValueError(f"unknown {keys} in {what}; known: {known_text}")


def _kind_name(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"


def short_name(model: str, adapter: str | None) -> str:
    """A short name of a source: the last part of its adapter's path, or of its model's if there is no adapter."""
    return _COMMIT.sub("", (adapter or model).rstrip("/")).rpartition("/")[2]
