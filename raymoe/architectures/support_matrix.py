"""Supported and unsupported families as rows: for `raymoe archs`, and for the table in the docs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from raymoe.architectures.families import FAMILIES
from raymoe.architectures.moe import MOE_ARCHITECTURES
from raymoe.architectures.moe_architecture import MoeArchitecture
from raymoe.architectures.unsupported_families import UNSUPPORTED


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
        for number, architecture in enumerate(h for h in MOE_ARCHITECTURES.values() if family.model_type in h.accepts):
            yield SupportedPair(
                family=family.model_type,
                family_title=family.title,
                host=architecture.name,
                host_title=architecture.title,
                architecture=architecture.class_name,
                is_default=number == 0,
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


def support_matrix() -> dict[str, list[dict[str, Any]]]:
    """Both tables as plain data: what `raymoe archs --json` prints."""
    return {
        "exact": [asdict(pair) for pair in supported_pairs()],
        "refused": [asdict(family) for family in UNSUPPORTED],
    }
