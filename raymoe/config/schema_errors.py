"""Turns the schema's errors into problems, and a refused config into its valid part.

`schema_problems` gives each of pydantic's errors a location and a remedy. `partial_config` replaces refused values by
placeholders, so that the checks of whole configs run on the rest and all problems are reported at once. The locations
of placeholders are passed on as `unread`; no check reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from raymoe.config.backbone import METHODS, BackboneConfig
from raymoe.config.model_refs import ModelRef, PathRef
from raymoe.config.prompt_sources import PromptFile
from raymoe.config.schema import ExpertConfig, MergeConfig
from raymoe.config.source_positions import Finding, Loc, SourcePositions, short_text, yaml_kind

_TOP_KEYS = tuple(MergeConfig.model_fields)
_EXPERT_KEYS = (*ExpertConfig.model_fields, "expert")  # the last is a part of `source_model` when it is read
_PROMPT_FILE_KEYS = tuple(PromptFile.model_fields)
_BACKBONE_KEYS = tuple(BackboneConfig.model_fields)
_NO_KEYS: tuple[str, ...] = ()
_OTHER_COMMANDS = {
    **dict.fromkeys(("models", "merge_method", "slices", "modules", "parameters"), "mergekit-yaml"),
    **dict.fromkeys(("tokenizer", "tokenizer_source", "out_dtype"), "mergekit-yaml"),
    **dict.fromkeys(("genome", "tasks"), "mergekit-evolve"),
    **dict.fromkeys(("layer_slices", "embedding_source", "lm_head_source"), "bakllama"),
}
_REMEDIES = {
    "base_model": "add 'base_model: org/name' or a local folder: it gives attention, norms and embeddings",
    "experts": "add 'experts:' with one '- source_model: ...' for each expert",
    "source_model": "add 'source_model: org/name' or a local folder: it gives the expert's FFN weights",
    "method": f"add 'method: linear' (one of {', '.join(METHODS)})",
    "file": "name the file as {file: prompts.jsonl}, or make it a list: one prompt per line, each after '- '",
}
_PLACEHOLDER_MODEL = ModelRef(model=PathRef(path="?"))
_PLACEHOLDER_FILE = "?.txt"


def schema_problems(error: ValidationError, positions: SourcePositions) -> list[Finding]:
    """One problem for each thing the schema refuses; a required key under a wrong name is one, not two."""
    all_details = error.errors(include_url=False)
    closest = {_closest_key(details["loc"]) for details in all_details if details["type"] == "extra_forbidden"}
    return [
        _finding(details, positions)
        for details in all_details
        if details["type"] != "missing" or details["loc"] not in closest
    ]


def _finding(details: ErrorDetails, positions: SourcePositions) -> Finding:
    loc = details["loc"]
    if details["type"] == "extra_forbidden":
        what, remedy = _unknown_key(loc)
    elif details["type"] == "missing":
        what, remedy = "this key is required", _REMEDIES[str(loc[-1])]
    elif details["type"] in ("model_type", "model_attributes_type"):
        what = f"a merge config is a mapping of keys to values, not {yaml_kind(details['input'])}"
        remedy = "write 'base_model: ...' and 'experts: ...', each on a line of its own"
    else:
        what, remedy = _value_problem(details, positions)
    return Finding(loc=loc, what=what, remedy=remedy)


def _value_problem(details: ErrorDetails, positions: SourcePositions) -> tuple[str, str]:
    context = details.get("ctx", {})
    mark = positions.marks.get(details["loc"])
    if not context.get("quote") or mark is None or not mark.text:
        return details["msg"], str(context.get("remedy", ""))
    # Show what was typed: the user wrote 'yes', not the true that YAML reads.
    typed = short_text(mark.text)
    what = f"expected text, but without quotes YAML reads '{typed}' as {yaml_kind(details['input'])}"
    return what, f'quote it: "{typed}"'


def _keys_at(loc: Loc) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys known to the mapping that holds `loc`, and those of other mappings."""
    if len(loc) == 4:  # of a file of prompts
        return _PROMPT_FILE_KEYS, _NO_KEYS
    if len(loc) == 2:
        return _BACKBONE_KEYS, _NO_KEYS
    return (_TOP_KEYS, _EXPERT_KEYS) if len(loc) == 1 else (_EXPERT_KEYS, _TOP_KEYS)


def _closest_key(loc: Loc) -> Loc | None:
    """The location of the key that an unknown key was most likely meant to be."""
    known, other_keys = _keys_at(loc)
    key = str(loc[-1])
    if len(loc) == 1 and key in _OTHER_COMMANDS:
        return None
    # `expert` at the top is `experts`; other keys of experts there are where they do not belong.
    cutoff = 0.9 if key in other_keys else 0.55
    near = get_close_matches(key.strip().lower().replace("-", "_"), known, n=1, cutoff=cutoff)
    return (*loc[:-1], near[0]) if near else None


def _unknown_key(loc: Loc) -> tuple[str, str]:
    key, at_top = str(loc[-1]), len(loc) == 1
    known, other_keys = _keys_at(loc)
    closest = _closest_key(loc)
    if key in other_keys and closest is None:
        level = "an expert, next to its source_model" if at_top else "the top level of the config"
        return "unknown key here", f"it belongs to {level}"
    if at_top and key in _OTHER_COMMANDS:
        what = f"this is a key of a config of {_OTHER_COMMANDS[key]}, not of mergekit-moe"
        return (
            what,
            f"remove it, or use {_OTHER_COMMANDS[key]} for this config; keys here: {', '.join(known)}",
        )
    return "unknown key", f"did you mean {closest[-1]}?" if closest else f"keys here: {', '.join(known)}"


def partial_config(data: Any, error: ValidationError) -> tuple[MergeConfig, frozenset[Loc]] | None:
    """The config in `data` without the refused values, and the locations of their placeholders.

    `None` if the config as a whole is not a mapping.
    """
    locs = [(details["loc"], details["type"]) for details in error.errors(include_url=False)]
    if any(not loc for loc, _ in locs):
        return None
    rest = copy.deepcopy(data)
    for loc, kind in locs:
        _replace(rest, loc, unknown=kind == "extra_forbidden")
    unread = {loc for loc, kind in locs if kind != "extra_forbidden"}
    # An unknown key may be a misspelled one: that the right key is missing is then no second problem. An unknown key of
    # an expert may hold its prompts, whatever its name is.
    for details in error.errors(include_url=False):
        loc = details["loc"]
        if details["type"] == "extra_forbidden":
            may_be_prompts = len(loc) == 3 and isinstance(details["input"], (str, list, dict))
            if (
                meant := _closest_key(loc) or ((*loc[:-1], "positive_prompts") if may_be_prompts else None)
            ) is not None:
                unread.add(meant)
    return MergeConfig.model_validate(rest), frozenset(unread)


def _replace(data: Any, loc: Sequence[str | int], *, unknown: bool) -> None:
    parent = data
    for step in loc[:-1]:
        parent = parent[step]
    last = loc[-1]
    if unknown:
        parent.pop(last, None)  # one object may stand in several places of a config made in Python
    elif last in ("base_model", "source_model"):
        parent[last] = _PLACEHOLDER_MODEL
    elif last == "file":
        parent[last] = _PLACEHOLDER_FILE
    elif last == "method":
        parent[last] = "base"
    elif last == "experts":
        parent[last] = []
    elif isinstance(last, int):
        # An item is an expert or a prompt; it stays in its place, since others are named by their number.
        parent[last] = {"source_model": _PLACEHOLDER_MODEL} if len(loc) == 2 else "?"
    else:
        parent.pop(last, None)
