"""The scores of an evaluation on tasks, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymoe.console import console as rich_console

__all__ = ["print_tasks"]


def print_tasks(result: Mapping[str, Any]) -> None:
    """Print what `raymoe eval --tasks --json` writes on standard output, a row a metric."""
    from rich.table import Table

    console = rich_console()
    console.print(result["model"], style="bold")
    table = Table("task", "version", "shots", "examples", "metric", "value", "standard error", box=None, pad_edge=False)
    for column in (*table.columns[1:4], *table.columns[5:]):
        column.justify = "right"
    for name, task in result["tasks"].items():
        facts = ["-" if task[key] is None else str(task[key]) for key in ("version", "fewshot", "samples")]
        for metric, value in task["metrics"].items():
            table.add_row(name, *facts, metric, _format_score(value["value"]), _format_score(value["stderr"]))
    console.print(table)


def _format_score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
