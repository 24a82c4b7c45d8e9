"""NaN and infinity among the numbers of models' configs, which JSON as Python writes it can hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from raymoe.sources.facts import ModelFacts

__all__ = ["find_non_finite"]

_NAMED = 3  # of one config
# Infinity is what these say where there is no limit: transformers writes `time_step_limit: [0.0, Infinity]`.
_MAY_BE_INFINITE = ("_limit", "_limits")


def find_non_finite(models: Mapping[str, ModelFacts]) -> Iterator[tuple[str, str]]:
    """(where, what) for each number of `models`, by their place in the merge's config, that is none to compute with."""
    for place, facts in models.items():
        found = list(_non_finite(facts.config, ""))
        for key, value in found[:_NAMED]:
            yield f"{place} ({facts.label})", f"{key} in its config.json is {'NaN' if math.isnan(value) else value}"
        if len(found) > _NAMED:
            yield f"{place} ({facts.label})", f"{len(found) - _NAMED} more numbers in its config.json are not finite"


def _non_finite(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value) or not key.partition("[")[0].endswith(_MAY_BE_INFINITE):
            yield key, value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _non_finite(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _non_finite(each, f"{key}[{number}]")
