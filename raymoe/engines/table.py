"""The rows of rows.csv, and the verdict that they give on a merge.

A row without a feature is about the architecture itself: a merge without RoPE scaling, windows and biases, with two of
four experts per token. A row with a feature says what changes with it. A merge gets the worst verdict of the rows that
apply to it; a feature without a row counts as the architecture itself. An architecture without a row was not looked at.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from raymoe.engines.features import FEATURES

SAME, OTHERWISE, FAILS, UNKNOWN = "same", "otherwise", "fails", "unknown"
RUN, READ = "run", "read"
COLUMNS = ("engine", "version", "architecture", "feature", "verdict", "found", "difference", "reason", "remedy")

_RANKS = {SAME: 0, UNKNOWN: 1, OTHERWISE: 2, FAILS: 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRow:
    """What an engine makes of merges in one architecture, with one feature.

    Attributes:
        engine: The engine, a key of `ENGINES`.
        version: The version that was run or read.
        architecture: The MoE architecture, by its name in raymoe.
        feature: The feature, a key of `FEATURES`. Empty: the architecture itself.
        verdict: `same` (as transformers), `otherwise` (it loads, and computes something else), or `fails`.
        found: `run` or `read`.
        difference: The largest difference of log-probabilities from transformers; empty if it was not run to an end.
        reason: Why: after "computes Mixtral" for `otherwise`, after a colon for `fails`, a remark for `same`.
        remedy: What to do about it in the engine itself: an option of its command. A merge that is the `same` only with
            an option has it too.
    """

    engine: str
    version: str
    architecture: str
    feature: str
    verdict: str
    found: str
    difference: str = ""
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What an engine makes of one merge.

    Attributes:
        status: `same`, `otherwise`, `fails`, or `unknown` if the architecture was not looked at.
        version: The version of the engine; empty if the status is unknown.
        was_run: All rows behind the status were run.
        rows: The rows that give the status.
    """

    status: str
    version: str = ""
    was_run: bool = False
    rows: tuple[EngineRow, ...] = ()

    @property
    def reason(self) -> str:
        """The rows' reasons as one text."""
        return " and ".join(dict.fromkeys(row.reason for row in self.rows if row.reason))

    def remedy(self, config: Mapping[str, Any]) -> str:
        """What to do in the engine for a merge with this config.json; empty if there is not one thing that helps.

        Keys of RoPE in braces stand for their numbers.
        """
        found = {row.remedy for row in self.rows if self.status != SAME or row.remedy}
        text = found.pop() if len(found) == 1 else ""
        for key, value in (config.get("rope_scaling") or config.get("rope_parameters") or {}).items():
            text = text.replace(f"{{{key}}}", str(value))
        return text


@cache
def engine_rows() -> tuple[EngineRow, ...]:
    """All rows, in the order of the file."""
    text = files("raymoe.engines").joinpath("rows.csv").read_text(encoding="utf-8")
    return tuple(read_rows(text))


def read_rows(text: str) -> Iterator[EngineRow]:
    """The rows of a text in the form of rows.csv."""
    for row in csv.DictReader(text.splitlines()):
        yield EngineRow(**row)


@cache
def _by_architecture() -> Mapping[tuple[str, str], Mapping[str, EngineRow]]:
    """The rows of each engine and architecture, by feature."""
    found: dict[tuple[str, str], dict[str, EngineRow]] = {}
    for row in engine_rows():
        found.setdefault((row.engine, row.architecture), {})[row.feature] = row
    return found


def judge(engine: str, architecture: str, features: Collection[str]) -> Verdict:
    """What an engine makes of a merge in an architecture with these features. It is unknown if one of these is not in
    `FEATURES`: no merge with it was looked at. transformers computes layers without experts as the tests of the
    architectures find.

    Example:
        >>> judge("mlx", "mixtral", {"rope_llama3", "untied"}).status
        'otherwise'
    """
    rows = _by_architecture().get((engine, architecture), {})
    known = FEATURES.keys() | ({"layers_without_experts"} if engine == "transformers" else set())
    if "" not in rows or not known >= set(features):
        return Verdict(status=UNKNOWN)
    applying = [rows[""], *(rows[feature] for feature in sorted(features) if feature in rows)]
    status = max((row.verdict for row in applying), key=_RANKS.__getitem__)
    deciding = tuple(row for row in applying if row.verdict == status)
    return Verdict(
        status=status,
        version=deciding[0].version,
        was_run=all(row.found == RUN for row in deciding),
        rows=deciding,
    )
