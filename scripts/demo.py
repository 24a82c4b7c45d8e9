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
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    rows = []
    for label, answer in zip(labels, answers, strict=True):
        shares: dict[str, float] = answer["first_choice"]
        largest = sorted(shares, key=lambda name: -shares[name])[:SHARES]
        text = ", ".join(f"{name} {shares[name]:.0%}" for name in largest)
        rows.append((label, " ".join(answer["prompt"].split()), largest[0], text))
    others = sum(2 + max(len(row[column]) for row in rows) for column in (0, 2, 3))
    room = min(PROMPT_CHARACTERS, max(len("held-out prompt"), console.width - others))
    table = Table("kind", "held-out prompt", "routed to", "first choices", box=None, pad_edge=False)
    for label, prompt, winner, text in rows:
        table.add_row(label, Text(prompt[:room]), Text(winner, style="" if winner == label else "bold red"), text)
    console.print(table)
    right = sum(label == winner for label, _, winner, _ in rows)
    console.print(f"{right} of {len(rows)} held-out prompts went to the expert of their kind.\n")


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
