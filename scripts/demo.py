"""Shows which expert the routers of a merged model choose for held-out prompts, of which the kind is known.

    python scripts/demo.py out/demo

The shares are those of `raymoe try`: an expert is counted for a token in a layer where it is the first choice. A prompt
goes to the expert with the largest share.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import raymoe

ROOT = Path(__file__).resolve().parent.parent
PROMPT_CHARACTERS = 44  # shown of a prompt, at most
SHARES = 2  # shown for a prompt, the largest ones


def held_out(path: Path, per_label: int) -> list[tuple[str, str]]:
    """(label, text) pairs, the first `per_label` texts of each label."""
    seen: Counter[str] = Counter()
    chosen = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        seen[row["label"]] += 1
        if seen[row["label"]] <= per_label:
            chosen.append((row["label"], row["text"]))
    return chosen


def show_routing(labels: Sequence[str], answers: Sequence[Mapping[str, Any]]) -> None:
    """Print a row for each prompt, and how many went to the expert of their kind."""
    table = Table(box=None, pad_edge=False)
    table.add_column("kind", no_wrap=True)
    table.add_column("held-out prompt", no_wrap=True, overflow="ellipsis", max_width=PROMPT_CHARACTERS)
    table.add_column("routed to", no_wrap=True)
    table.add_column("largest shares of first choices", no_wrap=True)
    right = 0
    for label, answer in zip(labels, answers, strict=True):
        shares: dict[str, float] = answer["first_choice"]
        largest = sorted(shares, key=lambda name: -shares[name])[:SHARES]
        right += largest[0] == label
        winner = Text(largest[0], style="" if largest[0] == label else "bold red")
        excerpt = Text(" ".join(answer["prompt"].split())[:PROMPT_CHARACTERS])
        table.add_row(label, excerpt, winner, ", ".join(f"{name} {shares[name]:.0%}" for name in largest))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    console.print(table)
    console.print(f"{right} of {len(labels)} held-out prompts went to the expert of their kind.\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the merged model")
    parser.add_argument("--heldout", type=Path, default=ROOT / "examples/heldout.jsonl")
    parser.add_argument("--per-kind", type=int, default=4, help="held-out prompts per kind")
    arguments = parser.parse_args()
    labels, texts = zip(*held_out(arguments.heldout, arguments.per_kind), strict=True)
    show_routing(labels, raymoe.generate(arguments.model, texts, max_new_tokens=0)["answers"])


if __name__ == "__main__":
    main()
