"""`raymoe archs --engine`: what an engine makes of merges in each MoE architecture."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from raymoe.architectures import MOE_ARCHITECTURES
from raymoe.console import print_json
from raymoe.engines import ENGINES, FEATURES, SAME, UNKNOWN, EngineRow, engine_rows
from raymoe.engines.table import READ
from raymoe.errors import Problem, ProblemReport


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureLine:
    """What an engine makes of one architecture: of its plain merges, and with each feature that changes it."""

    architecture: str
    title: str
    verdict: str
    how: str
    exceptions: tuple[str, ...]


def engine_matrix(engine: str) -> dict[str, Any]:
    """All rows of an engine as plain data: what `raymoe archs --engine NAME --json` prints.

    Raises ProblemReport if there is no such engine.
    """
    if engine not in ENGINES:
        what = f"there is no engine {engine!r} in the table"
        raise ProblemReport([Problem(where="engine", what=what, remedy=f"one of: {', '.join(ENGINES)}")])
    return {
        "engine": engine,
        "title": ENGINES[engine].title,
        "commands": list(ENGINES[engine].commands),
        "features": dict(FEATURES),
        "rows": [asdict(row) for row in engine_rows() if row.engine == engine],
    }


def architecture_lines(engine: str) -> Iterator[ArchitectureLine]:
    """One line per MoE architecture, in their order."""
    rows: dict[str, dict[str, EngineRow]] = {}
    for row in engine_rows():
        if row.engine == engine:
            rows.setdefault(row.architecture, {})[row.feature] = row
    for architecture in MOE_ARCHITECTURES.values():
        found = rows.get(architecture.name, {})
        plain = found.get("")
        others = [row for row in found.values() if row.feature and plain is not None and row.verdict != plain.verdict]
        yield ArchitectureLine(
            architecture=architecture.name,
            title=architecture.title,
            verdict=plain.verdict if plain else UNKNOWN,
            how=_how(plain) if plain else "not looked at",
            exceptions=tuple(_exceptions(others)),
        )


def _how(row: EngineRow) -> str:
    size = f", largest difference {row.difference}" if row.difference and row.verdict == SAME else ""
    reason = row.reason.replace("this option", row.remedy) if row.remedy else row.reason
    return f"{row.found}, {row.version}{size}" + (f"; {reason}" if reason else "")


def _exceptions(rows: list[EngineRow]) -> Iterator[str]:
    """Rows with the same reason as one text: "otherwise with tied embeddings (...)"."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        read = " [read]" if row.found == READ else ""
        grouped.setdefault((row.verdict, row.reason), []).append(f"{FEATURES[row.feature]}{read}")
    for (verdict, reason), features in grouped.items():
        yield f"{verdict} with {', '.join(features)}" + (f" ({reason})" if reason else "")


def print_engine_table(engine: str, *, as_json: bool) -> None:
    """Print what `engine_matrix` has. Raises ProblemReport if there is no such engine."""
    content = engine_matrix(engine)
    if as_json:
        print_json(content)
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 10_000)
    title = ENGINES[engine].title
    console.print(f"What {title} computes of merges, compared with transformers:", style="bold")
    table = Table("architecture", "", "computes", "found", "but", box=None)
    for line in architecture_lines(engine):
        table.add_row(line.title, line.architecture, line.verdict, line.how, "; ".join(line.exceptions))
    console.print(table)
    for command in ENGINES[engine].commands:
        console.print(f"\n  {command.format(model='OUT')}")
