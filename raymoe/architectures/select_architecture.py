"""Which MoE architecture a merge gets: the one that the config forces, or the first that represents it exactly.

Of those that do, one that engines compute otherwise (`MoeArchitecture.second_choice_for`) is the last resort.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raymoe.architectures.dense_spec import DenseSpec
from raymoe.architectures.moe import MOE_ARCHITECTURES
from raymoe.architectures.moe_architecture import MoeArchitecture, MoeShape
from raymoe.errors import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """What else the architecture must fulfil.

    Attributes:
        text: What is required, after "can hold a llama base".
        reasons: From an architecture to why it does not fulfil it, one text per reason.
        remedy: What the user may change about the requirement.
    """

    text: str
    reasons: Callable[[MoeArchitecture], list[str]]
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    architecture: MoeArchitecture | None
    problems: tuple[Problem, ...] = ()


def select_moe_architecture(
    base: DenseSpec,
    moe: MoeShape,
    *,
    forced: str | None,
    where: str,
    requirement: Requirement | None = None,
    preferred: str | None = None,
) -> Selection:
    """Choose the MoE architecture for a base model. The planner checks the experts' types against the base's.

    `forced` is the config's `architecture` and may be the start of a name or title ("qwen", "Mixtral"). `requirement`
    is checked of architectures that can hold the model. `preferred` names the architecture that a base from a mixture
    has there: it is chosen if it fits, and none is forced.
    """
    candidates: Sequence[MoeArchitecture] = [
        architecture for architecture in MOE_ARCHITECTURES.values() if base.model_type in architecture.accepts
    ]
    if forced is not None:
        candidates = _architectures_named(forced)
        if not candidates:
            names = ", ".join(f"{h.name} ({h.title})" for h in MOE_ARCHITECTURES.values())
            what = f"unknown architecture {forced!r}"
            return Selection(architecture=None, problems=(Problem(where=where, what=what, remedy=f"one of: {names}"),))
    reasons = [(architecture, _reasons(architecture, base, moe, requirement)) for architecture in candidates]
    if fitting := [architecture for architecture, why_not in reasons if not why_not]:
        own = next((architecture for architecture in fitting if architecture.name == preferred), None)
        first = own or min(fitting, key=lambda architecture: architecture.is_second_choice(base))
        return Selection(architecture=first)
    details = "".join(f"\n      {architecture.title}: {'; '.join(why)}" for architecture, why in reasons)
    no_match = "no MoE architecture" if forced is None else f"architecture {forced!r}"
    can = "can" if forced is None else "can't"
    required = f", {requirement.text}" if requirement else ""
    what = f"{no_match} {can} hold a {base.model_type} base with {_describe(moe)}{required}:{details}"
    remedy = "change the settings named above, or use other models"
    if requirement:
        remedy += f", or {requirement.remedy}"
    if forced is not None:
        others = [
            architecture.name
            for architecture in MOE_ARCHITECTURES.values()
            if not _reasons(architecture, base, moe, requirement)
        ]
        suitable = f" ({', '.join(others)} can)" if others else ""
        remedy += f", or another architecture{suitable}, or leave it out to let raymoe choose"
    return Selection(architecture=None, problems=(Problem(where=where, what=what, remedy=remedy),))


def _architectures_named(forced: str) -> list[MoeArchitecture]:
    wanted = forced.strip().lower()
    exact = [each for each in MOE_ARCHITECTURES.values() if wanted in (each.name, each.title.lower())]
    starts = [h for h in MOE_ARCHITECTURES.values() if h.name.startswith(wanted) or h.title.lower().startswith(wanted)]
    return exact or starts


def _reasons(
    architecture: MoeArchitecture, base: DenseSpec, moe: MoeShape, requirement: Requirement | None
) -> list[str]:
    if base.model_type not in architecture.accepts:
        return [f"takes {', '.join(architecture.accepts)} models only"]
    reasons = architecture.reasons_against(base, moe)
    return reasons if reasons or requirement is None else requirement.reasons(architecture)


def _describe(moe: MoeShape) -> str:
    shared = f", {moe.shared} shared" if moe.shared else ""
    return f"{moe.experts} experts, {moe.experts_per_token} per token{shared}"
