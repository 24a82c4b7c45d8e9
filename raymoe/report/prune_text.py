"""What `raymoe prune` has done, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymoe.console import console as rich_console
from raymoe.console import print_json
from raymoe.report.eval_numbers import perplexity


def print_pruned(pruned: Mapping[str, Any], *, as_json: bool = False) -> None:
    """Print the result of `raymoe.prune` on standard output: each expert's load, and losses before and after."""
    from rich.table import Table

    if as_json:
        print_json(pruned)
        return
    console = rich_console()
    table = Table("expert", "load", "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for number, (name, load) in enumerate(zip(pruned["experts"], pruned["load"], strict=True)):
        table.add_row(name, f"{load:.1%}", "removed" if number in pruned["removed"] else "")
    console.print("Load: share of the work, mean over layers and labels")
    console.print(table)
    table = Table("label", "before", "after", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    before, after = pruned["loss"]["before"], pruned["loss"]["after"]
    for label in before:
        table.add_row(label, _loss(before[label]), _loss(after[label]))
    console.print("\nLoss in nats per token, perplexity in brackets")
    console.print(table)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} ({perplexity(value)})"
