"""The plan's digest: equal digests mean equal output bytes, so an interrupted merge can recognize its own output.

The digest covers the parts of uploads too: a run resumes with the parts that an earlier one has sent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from json.encoder import encode_basestring_ascii
from typing import Any

from raymoe.planning.multipart import upload_layout
from raymoe.planning.owner import Owner
from raymoe.planning.plan import GatePlan, MomentPlan, Shard
from raymoe.sources.facts import SideFile, SourceFile

# Increase this if the same plan gives other bytes than before (another solver, another order of tensors).
OUTPUT_FORMAT = 2

# Names of classes and fields as they have always been in digests, which identify unfinished and finished merges.
_DIGEST_NAMES = {"HeadPermutation": "HeadRows", "rotary_dim": "turned", "quantize": "quantise"}
# Plans without these newer fields keep their digests.
_LEFT_OUT_IF_NONE = frozenset(
    [
        *("whole", "magnitude", "heads", "content", "combined", "factor", "moments"),
        *("inverse", "router_layers", "columns", "reinit", "repeat", "kept"),
    ]
)
# The text of a plan with 200,000 tensors has hundreds of megabytes. It is hashed in pieces by its outer levels: shard
# by shard, and member by member of the gates.
_LEVELS_IN_PIECES = 3


def plan_digest(
    shards: tuple[Shard, ...],
    config: Mapping[str, Any],
    side_files: tuple[SideFile, ...],
    gates: GatePlan,
    *,
    moments: MomentPlan | None = None,
    strict: bool = False,
) -> str:
    """SHA-256 (hex) over everything that decides the output's bytes.

    Weights count by location and range, local side files by their content too. Fields that are excluded from
    comparisons (the stamps of files) are excluded here. A `strict` plan has another digest than the same plan without:
    it must not resume from shards with unchecked values.
    """
    content = {
        "format": OUTPUT_FORMAT,
        "shards": shards,
        "config": config,
        "side_files": side_files,
        "gates": gates,
        **({"moments": moments} if moments is not None else {}),
        **({"strict": True} if strict else {}),
        "upload": upload_layout(shards),
    }
    digest, texts = hashlib.sha256(), _CanonicalTexts()
    for piece in texts.pieces(content, _LEVELS_IN_PIECES):
        digest.update(piece.encode())
    return digest.hexdigest()


class _CanonicalTexts:
    """The canonical JSON text of values: keys sorted, no spaces, ASCII.

    Thousands of tensors share a file, so its text is cached. A member's prompts are read with the same weights as those
    of the member before it, or with the same backbone, so the texts of the last mapping are cached.
    """

    def __init__(self) -> None:
        self._files: dict[int, str] = {}  # by the object's id, which is safe while the plan holds the objects
        self._last_mapping: tuple[object, str] = (None, "")
        self._last_values: dict[int, str] = {}  # texts of that mapping's values, by the object's id
        self._optional: dict[type, list[str]] = {}  # fields that are left out if they are None
        self._layouts: dict[tuple[type, tuple[str, ...]], tuple[str, list[str]]] = {}  # by class and fields left out
        self._texts: dict[type, Callable[[Any], str]] = {
            str: encode_basestring_ascii,
            int: repr,
            tuple: self._list,
            list: self._list,
            bytes: lambda value: f'"{hashlib.sha256(value).hexdigest()}"',
            Owner: lambda value: encode_basestring_ascii(str(value)),
            SourceFile: self._file,
        }

    def pieces(self, value: object, levels: int) -> Iterator[str]:
        """The text of a value in pieces: lists and objects of the outer `levels` give one piece per element."""
        if levels and isinstance(value, (list, tuple)):
            yield "["
            for number, each in enumerate(value):
                yield "," if number else ""
                yield from self.pieces(each, levels - 1)
            yield "]"
        elif levels and type(value) not in self._texts and (isinstance(value, Mapping) or is_dataclass(value)):
            yield "{"
            for number, (key, each) in enumerate(_items(value)):
                yield f"{',' if number else ''}{encode_basestring_ascii(key)}:"
                yield from self.pieces(each, levels - 1)
            yield "}"
        else:
            yield self.text(value)

    def text(self, value: object) -> str:
        """The whole text of a value."""
        return self._texts.get(type(value), self._other)(value)

    def _list(self, value: Sequence[object]) -> str:
        return f"[{','.join(map(self.text, value))}]"

    def _file(self, file: SourceFile) -> str:
        if id(file) not in self._files:
            self._files[id(file)] = self._fields(file)
        return self._files[id(file)]

    def _other(self, value: object) -> str:
        if isinstance(value, Mapping):
            if self._last_mapping[0] is not value:
                known, items = self._last_values, _items(value)
                texts = {id(each): known.get(id(each)) or self.text(each) for _, each in items}
                members = [f"{encode_basestring_ascii(key)}:{texts[id(each)]}" for key, each in items]
                self._last_mapping, self._last_values = (value, f"{{{','.join(members)}}}"), texts
            return self._last_mapping[1]
        return self._fields(value) if is_dataclass(value) else json.dumps(value)

    def _fields(self, value: Any) -> str:
        kind = type(value)
        if kind not in self._optional:
            self._optional[kind] = [f.name for f in dataclasses.fields(kind) if f.name in _LEFT_OUT_IF_NONE]
        left_out = tuple([name for name in self._optional[kind] if getattr(value, name) is None])
        if (kind, left_out) not in self._layouts:
            self._layouts[kind, left_out] = _layout(value)
        template, names = self._layouts[kind, left_out]
        return template % tuple([self.text(getattr(value, name)) for name in names])


def _layout(value: Any) -> tuple[str, list[str]]:
    """The text of a dataclass with a %s for each value, and the fields of these values."""
    keys = _keys(value)
    members = {**dict.fromkeys(keys, "%s"), "kind": encode_basestring_ascii(_kind(value))}
    template = ",".join(f"{encode_basestring_ascii(key)}:{members[key]}" for key in sorted(members))
    return f"{{{template}}}", [keys[key] for key in sorted(keys)]


def _items(value: Any) -> list[tuple[str, object]]:
    """The content of a mapping or dataclass, sorted by its keys in digests."""
    if isinstance(value, Mapping):
        return sorted(value.items(), key=lambda item: item[0])
    named = {key: getattr(value, field) for key, field in _keys(value).items()}
    return sorted({**named, "kind": _kind(value)}.items(), key=lambda item: item[0])


def _kind(value: Any) -> str:
    name = type(value).__name__
    return _DIGEST_NAMES.get(name, name)


def _keys(value: Any) -> dict[str, str]:
    """The fields of a dataclass that are in digests, by their keys there."""
    names = [field.name for field in dataclasses.fields(value) if field.compare]
    kept = [name for name in names if name not in _LEFT_OUT_IF_NONE or getattr(value, name) is not None]
    return {_DIGEST_NAMES.get(name, name): name for name in kept}
