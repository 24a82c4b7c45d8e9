"""Prints the results of `raymoe try`: answers, and each expert's share of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from raymoe.console import console as rich_console
from raymoe.formatting import plural

_MOST_EXPERTS = 8  # per line, those with the largest shares
_SMALLEST = 0.005  # smallest share of an expert that is shown for a token


def print_description(description: Mapping[str, Any]) -> None:
    """Print the model, its experts, and whether weights stay in memory."""
    console = rich_console()
    console.print(f"{description['model']} ({description['architecture']})", style="bold")
    experts = f"{len(description['experts'])} experts, {description['experts_per_token']} for each token"
    ways = {"resident": "all weights stay in memory", "streamed": "weights do not fit, layers are read for each token"}
    way = f"{description['device']}: {ways[description['weights']]}"
    console.print(f"{experts}, {description['layers']} layers; on {way}")


def print_answer(answer: Mapping[str, Any]) -> None:
    """Print a prompt, its answer if there is one, and the shares of the experts."""
    console = rich_console()
    console.print(f"\n{answer['prompt']}", style="bold")
    if answer["new_tokens"]:
        console.print(_trimmed(answer["answer"]))
    console.print()
    if "tokens" in answer:
        console.print(_token_table(answer))
    read, new = answer["prompt_tokens"], answer["new_tokens"]
    end = "" if answer["is_ended"] or not new else ", cut there (--max-new-tokens)"
    console.print(f"tokens         {read} of the prompt, {new} new{end}", style="dim")
    console.print(f"first choice   {_shares(answer['first_choice'])}")
    console.print(f"router weight  {_shares(answer['weight'])}")


def _trimmed(answer: str) -> str:
    """An answer without blank lines around it, and without one space before it. Its first line stays indented."""
    return re.sub(r"^(?:[^\S\n]*\n)+|^ (?=\S)", "", answer).rstrip()


def _token_table(answer: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table("token", "first choice of layers", "router weight", box=None, pad_edge=False)
    for token in answer["tokens"]:
        shares = (token["first_choice"], token["weight"])
        seen = [{name: share for name, share in each.items() if share >= _SMALLEST} for each in shares]
        table.add_row(repr(token["text"]), *map(_largest, seen))
    return table


def _shares(shares: Mapping[str, float]) -> str:
    """`go 95%, spanish 5%`, and how many experts are left out."""
    more = len(shares) - _MOST_EXPERTS
    return f"{_largest(shares)}, and {more} more {plural('expert', more)}" if more > 0 else _largest(shares)


def _largest(shares: Mapping[str, float]) -> str:
    names = sorted(shares, key=lambda name: -shares[name])[:_MOST_EXPERTS]
    return ", ".join(f"{name} {shares[name]:.0%}" for name in names)
