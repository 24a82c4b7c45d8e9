"""What a merge is as a start for training: which layers have experts, how they are cut, what is drawn anew."""

from __future__ import annotations

from collections.abc import Iterator

from raymoe.formatting import number_ranges, plural
from raymoe.planning.plan import MergePlan, Part, Transform


def start_lines(plan: MergePlan) -> Iterator[str]:
    """One sentence for each thing that differs from a merge with whole FFNs as experts in all layers."""
    layers, count = plan.gates.router_layers, plan.text_config["num_hidden_layers"]
    if layers is not None:
        yield (
            f"Experts are in {len(layers)} of {count} layers ({plural('layer', len(layers))} {number_ranges(layers)}). "
            "The others have the base's FFN."
        )
    if plan.granularity > 1:
        yield (
            f"Each FFN is cut into {plan.granularity} experts with equal router rows, so {len(plan.gates.experts)} "
            f"sources are {plan.experts} experts. The router chooses all experts of a source together, and the merge "
            "computes what whole FFNs compute."
        )
    if shares := sorted({share for shard in plan.shards for part in shard.parts for share in _shares(part)}):
        values = " or ".join(f"{share:.0%}" for share in shares)
        yield f"{values} of the channels of experts are random numbers: the merge has to be trained."


def _shares(part: Part) -> Iterator[float]:
    for source in part.sources_read:
        if isinstance(source, Transform) and source.reinit is not None:
            yield source.reinit.share
