"""Experts' rows put together: the routers of all layers, and their bytes in the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raymoe.config.modes import MODES
from raymoe.gates.layer_rows import LayerRows
from raymoe.gates.router import random_rows
from raymoe.gates.summary import RouterSummary
from raymoe.planning.types import GatePlan, Part, Router
from raymoe.storage.stream import RouterBytes
from raymoe.storage.transform import NUMPY_DTYPES

__all__ = ["Rows", "collected", "random_gate_rows", "router_bytes", "router_rows"]

Rows = dict[str, npt.NDArray[np.float32]]
"""Rows of each expert by its owner name, (layers, hidden)."""


def collected(
    layers: Mapping[int, LayerRows], experts: Sequence[str], shared: Sequence[str]
) -> tuple[Rows, RouterSummary | None]:
    """Rows by owner out of those of all layers, and the summary of the layers that could be judged."""
    order = [layers[number] for number in sorted(layers)]
    rows = {owner: np.stack([layer.experts[n] for layer in order]) for n, owner in enumerate(experts)}
    rows |= {owner: np.stack([layer.shared[n] for layer in order]) for n, owner in enumerate(shared)}
    checks = {number: layers[number].check for number in sorted(layers)}
    known = {number: check for number, check in checks.items() if check is not None}
    return rows, RouterSummary(experts=len(experts), layers=known) if known else None


def random_gate_rows(gates: GatePlan) -> Rows:
    """Rows of the experts that have no prompts to read, in the modes that draw them."""
    if MODES[gates.mode].needs_prompts:
        return {}
    members = (*gates.experts, *gates.shared)
    return {p.owner: random_rows(gates.mode, gates.seed, p.owner, gates.layers, gates.hidden) for p in members}


def router_rows(gates: GatePlan, rows: Rows, what: Router) -> npt.NDArray[np.float32]:
    """One layer's router, (experts, hidden), or the gate of its shared expert, (shared, hidden)."""
    members = gates.shared if what.shared else gates.experts
    return np.stack([rows[member.owner][what.layer] for member in members])


def router_bytes(gates: GatePlan, rows: Rows) -> RouterBytes:
    """A function that gives the bytes of any router part of the plan."""

    def part_bytes(part: Part, what: Router) -> bytes:
        values: Any = router_rows(gates, rows, what).astype(NUMPY_DTYPES[part.dtype])
        assert values.shape == part.shape
        return bytes(values.tobytes())

    return part_bytes
