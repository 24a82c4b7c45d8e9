"""Joins experts' rows into the routers of all layers, and gives their bytes in the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raymoe.errors import MergeFailed
from raymoe.gate_modes import MODES
from raymoe.gate_modes.directions import shared_gate_row
from raymoe.gate_modes.layer_values import LayerRows
from raymoe.planning.owner import ALL_SHARED, Owner
from raymoe.planning.plan import GatePlan, Part, Router
from raymoe.routers.heldout_report import RouterSummary
from raymoe.routers.row_checks import not_finite_message
from raymoe.storage.shard_stream import RouterBytes
from raymoe.storage.transform import NUMPY_DTYPES

RouterRows = dict[Owner, npt.NDArray[np.float32]]
"""Rows (layers, hidden) of each expert, and under `ALL_SHARED` those of the shared experts' gate."""


def collect_rows(layers: Mapping[int, LayerRows], experts: Sequence[Owner]) -> tuple[RouterRows, RouterSummary | None]:
    """Rows by owner from those of all layers with a router, and the summary of the layers that could be scored."""
    rows = {owner: _by_layer({k: layer.experts[n] for k, layer in layers.items()}) for n, owner in enumerate(experts)}
    if gates := {number: layer.shared for number, layer in layers.items() if layer.shared is not None}:
        rows[ALL_SHARED] = _by_layer(gates)
    _check_finite(rows)
    checks = {number: layers[number].scores for number in sorted(layers)}
    known = {number: check for number, check in checks.items() if check is not None}
    return rows, RouterSummary(experts=len(experts), layers=known) if known else None


def _by_layer(rows: Mapping[int, npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """Rows (layers, hidden) up to the last layer that has one; zeros in layers without a router."""
    found = np.zeros((max(rows) + 1, *next(iter(rows.values())).shape), np.float32)
    for layer, row in rows.items():
        found[layer] = row
    return found


def random_router_rows(gates: GatePlan) -> RouterRows:
    """All rows of a mode that draws them. A merge holds those of one layer only (`router_rows`)."""
    owners = [member.owner for member in gates.experts] + ([ALL_SHARED] if gates.shared else [])
    return {owner: _drawn_rows(gates, owner, gates.layers) for owner in owners}


def _drawn_rows(gates: GatePlan, owner: Owner, layers: int, first_layer: int = 0) -> npt.NDArray[np.float32]:
    name = str(gates.shared[0].owner if owner == ALL_SHARED else owner)
    return MODES[gates.mode].draw_rows(gates.seed, name, layers, gates.hidden, first_layer)


def embedding_rows_by_owner(gates: GatePlan, rows: Mapping[Owner, npt.NDArray[np.float32]]) -> RouterRows:
    """Rows (hidden,) by owner, of the mode that reads no layers, for each layer."""
    by_owner = {member.owner: rows[member.owner] for member in gates.experts}
    if gates.shared:
        by_owner[ALL_SHARED] = shared_gate_row([rows[member.owner] for member in gates.shared])
    _check_finite({owner: row[None] for owner, row in by_owner.items()})
    return {owner: np.repeat(row[None], gates.layers, axis=0) for owner, row in by_owner.items()}


def _check_finite(rows: Mapping[Owner, npt.NDArray[np.float32]]) -> None:
    """Raises MergeFailed if a row has values that are not finite."""
    for owner, layers in rows.items():
        bad = np.flatnonzero(~np.isfinite(layers).all(axis=-1))
        if bad.size:
            raise MergeFailed(not_finite_message(owner, int(bad[0])))


def router_rows(gates: GatePlan, rows: RouterRows, what: Router) -> npt.NDArray[np.float32]:
    """One layer's router, (experts, hidden), or the gate of its shared experts, (1, hidden).

    Rows that are not in `rows` are drawn, in a mode that draws them: all layers' rows of 80 experts of a 70B model
    would take 210 MB.
    """
    owners = [ALL_SHARED] if what.shared else [member.owner for member in gates.experts]
    router = np.stack(
        [rows[owner][what.layer] if owner in rows else _drawn_rows(gates, owner, 1, what.layer)[0] for owner in owners]
    )
    if what.repeat is not None:
        router = np.repeat(router, what.repeat, axis=0)
    return router if what.factor is None else router * np.float32(what.factor)


def router_bytes(gates: GatePlan, rows: RouterRows) -> RouterBytes:
    """A function that gives the bytes of any router part of the plan; `rows` as in `router_rows`."""

    def part_bytes(part: Part, what: Router) -> bytes:
        values: Any = router_rows(gates, rows, what).astype(NUMPY_DTYPES[part.dtype])
        assert values.shape == part.shape
        return bytes(values.tobytes())

    return part_bytes
