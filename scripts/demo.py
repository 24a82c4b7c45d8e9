"""Shows which expert the routers of a merged model choose for held-out prompts, of which the kind is known.

    python scripts/demo.py out/demo

The shares are those of `raymoe try`: an expert is counted for a token in a layer where it is the first choice. A prompt
goes to the expert with the largest share.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import raymoe

ROOT = Path(__file__).resolve().parent.parent


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
    table = Table("kind", "held-out prompt", "routed to", "share of first choices", box=None, pad_edge=False)
    right = 0
    for label, answer in zip(labels, answers, strict=True):
        shares: dict[str, float] = answer["first_choice"]
        winner = max(shares, key=lambda name: shares[name])
        right += winner == label
        mark = "[green]" if winner == label else "[red]"
        excerpt = " ".join(answer["prompt"].split())[:44].replace("[", "\\[")
        row = "  ".join(f"{name} {share:.0%}" for name, share in shares.items())
        table.add_row(label, excerpt, f"{mark}{winner}[/]", row)
    console = Console(width=150)
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
