"""Supported and unsupported families as rows: for `raymoe archs`, and for the table in the docs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from raymoe.architectures.families import FAMILIES
from raymoe.architectures.moe import MOE_ARCHITECTURES
from raymoe.architectures.moe_architecture import MoeArchitecture
from raymoe.architectures.unsupported_families import UNSUPPORTED
from raymoe.architectures.wrappers import TEXT_TYPES, WRAPPERS


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportedPair:
    """A dense family and a MoE architecture that represents it exactly.

    `is_default`: the architecture is chosen if a config names none. `shared_expert`: `no`, `gated`, `plain`, or
    `always` (plain, and of zeros if the config has none). `since`: the oldest transformers that loads it, for models
    with the family's default windows.
    """

    family: str
    family_title: str
    host: str
    host_title: str
    architecture: str
    is_default: bool
    shared_expert: str
    since: str
    note: str


def supported_pairs() -> Iterator[SupportedPair]:
    """Every pair, by family, in the order in which architectures are chosen."""
    for family in FAMILIES.values():
        _, windows = family.windows(family.defaults, 8)
        accepting = [h for h in MOE_ARCHITECTURES.values() if family.model_type in h.accepts]
        default = min(accepting, key=lambda h: len(set(windows)) > 1 and "has_mixed_windows" in h.second_choice_for)
        for architecture in accepting:
            yield SupportedPair(
                family=family.model_type,
                family_title=family.title,
                host=architecture.name,
                host_title=architecture.title,
                architecture=architecture.class_name,
                is_default=architecture is default,
                shared_expert=_shared_expert(architecture),
                since=architecture.min_transformers_for(windows),
                note=architecture.note,
            )


def _shared_expert(architecture: MoeArchitecture) -> str:
    if not architecture.shared:
        return "no"
    if architecture.shared_router:
        return "gated"
    return "plain" if architecture.shared_key else "always"


@dataclass(frozen=True, slots=True, kw_only=True)
class WrappedType:
    """An image-text or audio-text model type whose text model is merged if it is of a supported family. `family` is
    the usual one."""

    wrapper: str
    title: str
    family: str


def wrapped_types() -> Iterator[WrappedType]:
    for wrapper in WRAPPERS.values():
        family = TEXT_TYPES.get(wrapper.text_type, wrapper.text_type)
        yield WrappedType(wrapper=wrapper.model_type, title=wrapper.title, family=family)


def support_matrix() -> dict[str, list[dict[str, Any]]]:
    """All tables as plain data: what `raymoe archs --json` prints."""
    return {
        "exact": [asdict(pair) for pair in supported_pairs()],
        "wrapped": [asdict(wrapped) for wrapped in wrapped_types()],
        "refused": [asdict(family) for family in UNSUPPORTED],
    }
