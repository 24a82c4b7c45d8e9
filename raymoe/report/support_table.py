"""`raymoe archs`: which dense models become which MoE architectures, and why others do not."""

from __future__ import annotations

import sys

from raymoe.architectures.support_matrix import support_matrix, supported_pairs, wrapped_types
from raymoe.architectures.unsupported_families import UNSUPPORTED
from raymoe.console import print_json

_SHARED = {
    "no": "",
    "gated": "optional, with a gate",
    "plain": "optional",
    "always": "optional; zeros without",
}


def print_support_matrix(*, as_json: bool) -> None:
    if as_json:
        print_json(support_matrix())
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 10_000)
    exact = Table("dense models", "model_type", "become", "architecture", "shared expert", "transformers", box=None)
    last = ""
    notes: dict[str, list[str]] = {}
    for pair in supported_pairs():
        names = (pair.family_title, pair.family) if pair.family != last else ("", "")
        since = f"{pair.since} and later" if pair.since else "code of its own"
        exact.add_row(*names, pair.host_title, pair.host, _SHARED[pair.shared_expert], since)
        last = pair.family
        if pair.note and pair.host_title not in notes.setdefault(pair.note, []):
            notes[pair.note].append(pair.host_title)
    console.print("A merge of copies of one model computes exactly what that model computes:", style="bold")
    console.print(exact)
    console.print("\nThe first one is used if a config has no `architecture`.")
    for note, titles in notes.items():
        console.print(f"{', '.join(titles)}: {note}.")
    wrapped = Table("image-text and audio-text models", "model_type", "text model, usually", box=None)
    for each in wrapped_types():
        wrapped.add_row(each.title, each.wrapper, each.family)
    console.print(
        "\nOf these, the text model is taken, as base or expert. It is merged as the dense model that it is:",
        style="bold",
    )
    console.print(wrapped)
    console.print("\nRefused, since no MoE architecture computes the same:", style="bold")
    refused = {f"{family.title} ({', '.join(family.model_types)})": family.reason for family in UNSUPPORTED}
    if not sys.stdout.isatty():  # one line per family: a table would make all lines as long as the longest reason
        for family, reason in refused.items():
            console.print(f" {family}: {reason}")
        return
    reasons = Table("dense models", "why not", box=None)
    for family, reason in refused.items():
        reasons.add_row(family, reason)
    console.print(reasons)
