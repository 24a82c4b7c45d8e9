"""The plan's digest: equal digests mean equal output bytes, so that an interrupted merge knows its own output again.

The parts of uploads are in it too: a run goes on with the parts that an earlier one has sent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from raymoe.planning.multipart import upload_layout
from raymoe.planning.owner import Owner
from raymoe.planning.plan import GatePlan, Shard
from raymoe.sources.facts import SideFile

# Raise this when the same plan would give other bytes than before (another solver, another order of tensors).
OUTPUT_FORMAT = 2

# Names of classes and fields as they have always been in digests: unfinished and finished merges are known by them.
_DIGEST_NAMES = {"HeadPermutation": "HeadRows", "rotary_dim": "turned", "quantize": "quantise"}


def plan_digest(
    shards: tuple[Shard, ...],
    config: Mapping[str, Any],
    side_files: tuple[SideFile, ...],
    gates: GatePlan,
    *,
    strict: bool = False,
) -> str:
    """SHA-256 (hex) over everything that decides the output's bytes.

    Weights count by location and range, local side files by their content too. What fields leave out of comparisons
    (the stamps of files) is left out here. A `strict` plan has another digest than the same plan without: it must not
    go on from shards whose numbers were not looked at.
    """
    content = {
        "format": OUTPUT_FORMAT,
        "shards": shards,
        "config": config,
        "side_files": side_files,
        "gates": gates,
        **({"strict": True} if strict else {}),
        "upload": upload_layout(),
    }
    text = json.dumps(content, default=_plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Owner):
        return str(value)
    assert dataclasses.is_dataclass(value), f"no canonical form for {type(value)}"
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.compare}
    for key in ("whole", "magnitude", "heads", "content"):  # plans of before there were such things keep their digests
        if fields.get(key, ...) is None:
            del fields[key]
    kind = type(value).__name__
    return {"kind": _DIGEST_NAMES.get(kind, kind), **{_DIGEST_NAMES.get(key, key): v for key, v in fields.items()}}
