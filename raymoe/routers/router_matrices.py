"""Joins experts' rows into the routers of all layers, and gives their bytes in the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
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
from raymoe.routers.kept_rows import KeptRouterRows, read_kept_rows, with_kept_rows
from raymoe.routers.row_checks import not_finite_message
from raymoe.storage.shard_stream import RouterBytes
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transform import NUMPY_DTYPES

RouterRows = dict[Owner, npt.NDArray[np.float32]]
"""Rows (layers, hidden) of each expert, and under `ALL_SHARED` those of the shared experts' gate."""


def fitted_rows(gates: GatePlan, layers: Mapping[int, LayerRows]) -> tuple[RouterRows, RouterSummary | None]:
    """Rows by owner from those of all layers, of the experts whose rows are computed. Scores on held-out prompts are of
    the fitted rows alone, so there are none if other rows are kept."""
    rows, summary = collect_rows(layers, [expert.owner for expert in gates.fitted])
    return rows, None if gates.kept is not None else summary


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
    by_owner = {member.owner: rows[member.owner] for member in gates.fitted}
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


def router_rows(
    gates: GatePlan, rows: RouterRows, what: Router, kept: KeptRouterRows = MappingProxyType({})
) -> npt.NDArray[np.float32]:
    """One layer's router, (experts, hidden), or the gate of its shared experts, (1, hidden).

    Rows that are neither in `rows` nor `kept` are drawn, in a mode that draws them: all layers' rows of 80 experts of a
    70B model would take 210 MB.
    """
    owners = (ALL_SHARED,) if what.shared else tuple(member.owner for member in gates.experts)
    if what.shared and ALL_SHARED in kept:
        gate: npt.NDArray[np.float32] = kept[ALL_SHARED][what.layer, None]
        return gate
    found = {**kept, **rows}
    router = np.stack(
        [
            found[owner][what.layer] if owner in found else _drawn_rows(gates, owner, 1, what.layer)[0]
            for owner in owners
        ]
    )
    if what.repeat is not None:
        router = np.repeat(router, what.repeat, axis=0)
    router = router if what.factor is None else router * np.float32(what.factor)
    return router if what.shared or not kept else with_kept_rows(router, owners, kept, what.layer)


def router_bytes(gates: GatePlan, rows: RouterRows, reader: SourceReader | None = None) -> RouterBytes:
    """A function that gives the bytes of any router part of the plan; `rows` as in `router_rows`. `reader` reads the
    rows that are kept, if there are any."""
    kept = read_kept_rows(gates, reader) if reader is not None else {}
    assert len(kept) == len(gates.kept or ())

    def part_bytes(part: Part, what: Router) -> bytes:
        values: Any = router_rows(gates, rows, what, kept).astype(NUMPY_DTYPES[part.dtype])
        assert values.shape == part.shape
        return bytes(values.tobytes())

    return part_bytes
