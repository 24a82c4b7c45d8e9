"""What works and what does not, as rows: for `raymoe archs`, and for the table in the docs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from raymoe.architectures.families import FAMILIES
from raymoe.architectures.moe import HOSTS
from raymoe.architectures.moe_architecture import MoeHost
from raymoe.architectures.unsupported_families import UNHELD

__all__ = ["HeldPair", "held_pairs", "table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldPair:
    """A dense family and a MoE host that holds it exactly.

    `is_default`: the host that is taken where a config names none. `shared_expert`: `no`, `gated`, `plain`, or `always`
    (a plain one that is zeros where the config has none). `since`: the oldest transformers that loads it, of models
    with the windows that the family has where a config does not say otherwise.
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


def held_pairs() -> Iterator[HeldPair]:
    """Every pair, by family, in the order in which hosts are chosen."""
    for family in FAMILIES.values():
        _, windows = family.windows(family.defaults, 8)
        for number, host in enumerate(h for h in HOSTS.values() if family.model_type in h.accepts):
            yield HeldPair(
                family=family.model_type,
                family_title=family.title,
                host=host.name,
                host_title=host.title,
                architecture=host.architecture,
                is_default=number == 0,
                shared_expert=_shared_expert(host),
                since=host.loaded_since(windows),
                note=host.note,
            )


def _shared_expert(host: MoeHost) -> str:
    if not host.shared:
        return "no"
    if host.shared_router:
        return "gated"
    return "plain" if host.shared_key else "always"


def table() -> dict[str, list[dict[str, Any]]]:
    """Both tables as plain data: what `raymoe archs --json` prints."""
    return {"exact": [asdict(pair) for pair in held_pairs()], "refused": [asdict(family) for family in UNHELD]}
