"""What a merge is as a start for training: which layers have experts, how they are cut, what is drawn anew."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from raymoe.formatting import number_ranges, plural
from raymoe.planning.owner import OwnerKind
from raymoe.planning.plan import MergePlan, Part, Reinit, Transform

EXPERT = OwnerKind.EXPERT.value


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
    if shares := _drawn_anew(plan):
        yield f"{shares} are random numbers: the merge has to be trained."


def _drawn_anew(plan: MergePlan) -> str:
    """'25% of the channels of expert 0 and 50% of those of experts 1-2'; empty if nothing is drawn anew."""
    owners: dict[float, set[tuple[str, int]]] = {}
    for shard in plan.shards:
        for part in shard.parts:
            for reinit in _reinits(part):
                # The name is 'layer 0 expert 3', where 3 counts the experts that FFNs are cut into.
                kind, number = reinit.channels.split()[-2:]
                index = int(number) // (plan.granularity if kind == EXPERT else 1)
                owners.setdefault(reinit.share, set()).add((kind, index))
    all_experts = {(EXPERT, index) for index in range(len(plan.gates.experts))}
    texts: list[str] = []
    for share, found in sorted(owners.items()):
        whose = "experts" if found == all_experts else _names(found)
        texts.append(f"{share:.0%} of {'those' if texts else 'the channels'} of {whose}")
    return " and ".join(texts)


def _names(owners: Collection[tuple[str, int]]) -> str:
    texts = []
    for kind in sorted({kind for kind, _ in owners}):
        numbers = sorted(number for each, number in owners if each == kind)
        noun = "expert" if kind == EXPERT else "shared expert"
        texts.append(f"{plural(noun, len(numbers))} {number_ranges(numbers)}")
    return " and ".join(texts)


def _reinits(part: Part) -> Iterator[Reinit]:
    for source in part.sources_read:
        if isinstance(source, Transform) and source.reinit is not None:
            yield source.reinit
