"""What a merge is as a start for training: which layers have experts."""

from __future__ import annotations

from collections.abc import Iterator

from raymoe.formatting import number_ranges, plural
from raymoe.planning.plan import MergePlan


def start_lines(plan: MergePlan) -> Iterator[str]:
    """One sentence for each thing that differs from a merge with whole FFNs as experts in all layers."""
    layers, count = plan.gates.router_layers, plan.text_config["num_hidden_layers"]
    if layers is not None:
        yield (
            f"Experts are in {len(layers)} of {count} layers ({plural('layer', len(layers))} {number_ranges(layers)}). "
            "The others have the base's FFN."
        )
