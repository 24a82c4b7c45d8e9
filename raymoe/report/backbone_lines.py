"""Describes the backbone of a merge, and which parts of the experts it leaves out."""

from __future__ import annotations

from raymoe.formatting import human_bytes, plural
from raymoe.planning.plan import BackboneReport, MergePlan
from raymoe.routers.attention_inputs import MAX_TOKENS
from raymoe.routers.prompt_lengths import prompt_lengths
from raymoe.routers.regmean_memory import merging_operations

_METHODS = {
    "linear": "the mean (linear) of {}",
    "slerp": "the spherical mean (slerp) of {}",
    "ties": "merged by TIES from {}",
    "regmean": "merged by RegMean (attention's matrices; else the mean) from {}",
}
_DIFFERENT = "known to differ from the base's"
_UNKNOWN = "stored in other files than the base's; not compared, or equal in samples"
_MOST_UNUSED = 8  # lines


def backbone_source(plan: MergePlan, base: str) -> str:
    """Where attention, norms and embeddings come from, as a sentence. `base` is the base's name."""
    report = plan.backbone
    if report.method == "base":
        return f"Attention, norms and embeddings come from {base}"
    included = " and ".join(report.include) if len(report.include) < 3 else "attention, norms and embeddings"
    verb = "are" if included.endswith("s") or " and " in included else "is"
    rest = "" if len(report.include) == 3 else f"; the rest of the backbone comes from {base}"
    made = _METHODS[report.method].format(f"{report.experts} {plural('expert', report.experts)}")
    text = f"{included} {verb} {made}{rest}"
    return text[0].upper() + text[1:]


def backbone_lines(plan: MergePlan) -> list[str]:
    """Lines for a terminal: the backbone's method, tensors that could not be merged, and the parts of experts that it
    leaves out."""
    report = plan.backbone
    return [_made_of(plan), *report.notes, *unused_lines(report)]


def backbone_work(plan: MergePlan) -> list[str]:
    """A line about what has to be read and computed before the backbone is written, if prompts decide it."""
    if (moments := plan.moments) is None:
        return []
    prompts = sum(len(each.positive) for each in moments.experts)
    tokens = sum(sum(positive) for positive, _ in prompt_lengths(moments, exact=False).values())
    operations = merging_operations(moments, min(MAX_TOKENS, tokens))
    experts = f"{len(moments.experts)} {plural('expert', len(moments.experts))}"
    return [
        f"Before the backbone is written, {prompts} prompts are read by their own experts ({experts}); "
        f"{human_bytes(plan.totals.backbone_bytes)} of weights are read for them. Merging takes about "
        f"{operations:.1e} operations in float64. Merged matrices ({human_bytes(moments.nbytes)}) wait in Ray's "
        "object store."
    ]


def _made_of(plan: MergePlan) -> str:
    report = plan.backbone
    if report.method == "base":
        return "Backbone: the base's attention, norms and embeddings."
    made = human_bytes(plan.totals.bytes_by_kind.get("combine", 0))
    kept = f", {report.kept} as in the base" if report.kept else ""
    return f"Backbone: {backbone_source(plan, 'the base')}. {report.combined} tensors ({made}) are computed{kept}."


def unused_lines(report: BackboneReport) -> list[str]:
    """The parts of the experts' backbones that are not in the merge; experts with the same parts share a line."""
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for unused in report.unused:
        alike.setdefault((unused.groups, unused.differing), []).append(str(unused.owner))
    lines = [_unused_line(", ".join(owners), *groups) for groups, owners in alike.items()]
    more = [f"and {len(lines) - _MOST_UNUSED} more lines like these"] if len(lines) > _MOST_UNUSED else []
    return [*lines[:_MOST_UNUSED], *more]


def _unused_line(owners: str, groups: tuple[str, ...], differing: tuple[str, ...]) -> str:
    said = f"not used: {', '.join(groups)} of {owners}"
    if differing == groups:
        return f"{said} ({_DIFFERENT})"
    if not differing:
        return f"{said} ({_UNKNOWN})"
    others = ", ".join(group for group in groups if group not in differing)
    return f"{said} ({', '.join(differing)}: {_DIFFERENT}; {others}: {_UNKNOWN})"
