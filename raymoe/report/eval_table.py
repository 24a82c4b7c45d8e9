"""An evaluation on a terminal: losses, routing accuracy, experts' loads; scores on tasks.

Tables are split into blocks of columns that fit into 100 characters, so that 16 labels are as readable as 2. Piped
output has the same blocks. What is bold on a terminal has a `*` everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from raymoe.console import console as rich_console
from raymoe.console import print_json, print_warning
from raymoe.formatting import human_count
from raymoe.report.eval_numbers import (
    MEAN,
    best_loss,
    is_dense,
    loss_rows,
    mean_load,
    merge_origin,
    own_expert,
    own_expert_loss,
    perplexity,
    read_labels,
    read_loss,
    references,
    top_k_name,
    top_k_rows,
    weakest_layers,
)

_WIDTH = 100
_MEANINGS = {
    "average": "a plain average of the experts as dense models, attention and all else included",
    "hidden": "the merge with routers of gate mode hidden",
    "oracle": "the merge, with each text routed to its own expert",
    "experts": "each expert as a dense model, on the texts of its own label",
}
_Column = TypeVar("_Column", str, int)


def print_evaluation(result: Mapping[str, Any], *, as_json: bool = False) -> None:
    """Print an evaluation (the content of `eval.json`) on standard output, as tables or as JSON."""
    if as_json:
        print_json(result)
        return
    console = rich_console()
    data = result["data"]
    console.print(f"{result['model']} ({result['architecture']})", style="bold")
    facts = [f"{result['layers']} layers", *merge_origin(result)]
    if not is_dense(result):
        facts = [f"{len(result['experts'])} experts", f"{result['experts_per_token']} for each token", *facts]
    console.print(", ".join(facts))
    console.print(f"{data['texts']:,} texts of {data['file']}, {data['tokens']:,} tokens")
    _print_losses(console, result)
    _print_top_k(console, result)
    if not is_dense(result):
        _print_routing(console, result)
        _print_confusion(console, result)
        _print_load(console, result)
    for warning in result.get("warnings") or ():
        print_warning(console, warning)


def _print_losses(console: Any, result: Mapping[str, Any]) -> None:
    rows = loss_rows(result)

    def cell(model: str, label: str) -> tuple[str, str]:
        loss = read_loss(result, model, label)
        if loss is None:
            return "-", ""
        best = loss == best_loss(result, label)
        return f"{loss:.3f} ({perplexity(loss)}){'*' if best else ' '}", "bold" if best else ""

    console.print("\nLoss in nats per token, perplexity in brackets; * is the lowest of a column")
    # The mean is first, so that it is in the first block on a narrow terminal.
    _print_blocks(console, "model", rows, {label: label for label in (MEAN, *read_labels(result))}, cell)
    console.print()
    for name in rows:
        if meaning := _meaning(result, name):
            console.print(f"{name}: {meaning}")
    merged = read_loss(result, "merged", MEAN)
    if merged is None:
        return
    for name, loss in references(result).items():
        console.print(f"{name[0].upper()}{name[1:]}: mean {loss:.3f}; the merge: {merged:.3f} ({merged - loss:+.3f})")
    if (own := own_expert_loss(result, MEAN)) is not None:
        console.print(
            f"Each expert alone, on its own label: mean {own:.3f}; the merge: {merged:.3f} ({merged - own:+.3f})"
        )
    if result.get("gap_closed") is not None:
        share = result["gap_closed"]
        console.print(f"{share:.0%} of the gap from hidden to oracle is closed.")


def _print_top_k(console: Any, result: Mapping[str, Any]) -> None:
    rows = {top_k_name(result, row.count): row for row in top_k_rows(result)}
    if not rows:
        return
    labels = [MEAN, *read_labels(result)]
    best = [
        min((loss for row in rows.values() if (loss := row.losses[label]) is not None), default=None)
        for label in labels
    ]

    def cell(name: str, column: int) -> tuple[str, str]:
        row = rows[name]
        if column == 0:
            return human_count(row.active), ""
        if column == 1:
            return "-" if row.share is None else f"{row.share:.2f}x", ""
        loss = row.losses[labels[column - 2]]
        if loss is None:
            return "-", ""
        is_best = loss == best[column - 2]
        return f"{loss:.3f} ({perplexity(loss)}){'*' if is_best else ' '}", "bold" if is_best else ""

    console.print(
        "\nBy experts for a token: active parameters, loss, perplexity in brackets; * is the lowest of a column"
    )
    heads = dict(enumerate(("active", "of config's", *labels)))
    _print_blocks(console, "experts", list(rows), heads, cell)


def _meaning(result: Mapping[str, Any], row: str) -> str | None:
    """What a row of the table is of; None if its name says it."""
    further = (result.get("compared") or {}).get(row)
    return further or _MEANINGS.get(row)


def _print_routing(console: Any, result: Mapping[str, Any]) -> None:
    routing, used = result["routing"], result["experts_per_token"]
    console.print("\nRouting accuracy, mean over layers and labels")
    console.print(f"own expert is the first choice   {routing['first_accuracy_mean']:6.1%}")
    console.print(f"own expert among the {used} chosen    {routing['chosen_accuracy_mean']:6.1%}")
    weakest = ", ".join(f"{layer} ({accuracy:.0%})" for layer, accuracy in weakest_layers(result))
    console.print(f"weakest layers, by first choice: {weakest}")


def _print_confusion(console: Any, result: Mapping[str, Any]) -> None:

    def cell(label: str, expert: int) -> tuple[str, str]:
        own = expert == own_expert(result, label)
        return f"{result['routing']['confusion'][label][expert]:.0%}{'*' if own else ' '}", "bold" if own else ""

    console.print("\nFirst choices of each label's tokens, all layers; * is the label's own expert")
    _print_blocks(console, "label", read_labels(result), dict(enumerate(result["experts"])), cell)


def _print_load(console: Any, result: Mapping[str, Any]) -> None:
    from rich.table import Table

    load, entropy = result["routing"]["load"], result["routing"]["load_entropy"]
    table = Table("expert", "load", "least", "most", "in layer", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for number, (name, mean) in enumerate(zip(result["experts"], mean_load(result))):
        shares = [row[number] for row in load]
        most = max(range(len(shares)), key=shares.__getitem__)
        table.add_row(name, f"{mean:.1%}", f"{min(shares):.1%}", f"{shares[most]:.1%}", str(most))
    even = 1 / len(result["experts"])
    console.print(f"\nLoad: share of the work, mean over layers and extremes of layers; even is {even:.1%}")
    console.print(table)
    least = min(range(len(entropy)), key=entropy.__getitem__)
    mean = sum(entropy) / len(entropy)
    console.print(f"load entropy {mean:.3f} (1 is even), lowest {entropy[least]:.3f} in layer {least}")


def _print_blocks(
    console: Any,
    corner: str,
    rows: Sequence[str],
    heads: Mapping[_Column, str],
    cell: Callable[[str, _Column], tuple[str, str]],
) -> None:
    """Print one table, or several below each other if the columns don't fit side by side. `cell` returns text and
    style."""
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    first = max(cell_len(text) for text in (corner, *rows))
    width = {
        column: max(cell_len(head), *(cell_len(cell(row, column)[0]) for row in rows)) for column, head in heads.items()
    }
    for number, block in enumerate(_blocks(width, min(console.width, _WIDTH) - first)):
        if number:
            console.print()
        table = Table(corner, box=None, pad_edge=False)
        for column in block:
            table.add_column(heads[column], justify="right", no_wrap=True)
        for row in rows:
            table.add_row(row, *(Text(*cell(row, column)) for column in block))
        console.print(table)


def _blocks(width: Mapping[_Column, int], room: int) -> Iterator[list[_Column]]:
    """Blocks of columns that fit into `room` characters, with two between columns; at least one column per block."""
    block: list[_Column] = []
    used = 0
    for column, size in width.items():
        if block and used + size + 2 > room:
            yield block
            block, used = [], 0
        block.append(column)
        used += size + 2
    yield block


def print_tasks(result: Mapping[str, Any]) -> None:
    """Print what `raymoe eval --tasks --json` writes on standard output, one row per metric."""
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
