"""Router rows that experts of a mixture keep, and the scale of the rows that are computed beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from raymoe.errors import Problem, first_few
from raymoe.planning.owner import Owner
from raymoe.planning.plan import GatePlan
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transform import load_array

Float32 = npt.NDArray[np.float32]
KeptRouterRows = Mapping[Owner, Float32]
"""Rows (layers, hidden) of the experts that keep them, with the values of their mixture's router."""


def read_kept_rows(gates: GatePlan, reader: SourceReader) -> KeptRouterRows:
    """Read the rows that the plan keeps; none if it keeps none."""
    found: dict[Owner, Float32] = {}
    for kept in gates.kept or ():
        rows = np.zeros((gates.layers, gates.hidden), np.float32)
        for layer, entry in zip(gates.layers_with_router, kept.layers, strict=True):
            rows[layer] = load_array(reader, entry).reshape(-1).astype(np.float32)
        found[kept.owner] = rows
    return found


def kept_row_problems(gates: GatePlan) -> list[Problem]:
    """A problem for each file of kept rows that is on other nodes only: the driver reads them."""
    files = {entry.file for kept in gates.kept or () for entry in kept.layers}
    missing = sorted(file.location for file in files if file.kind.is_local and not os.path.exists(file.location))
    what = "the driver reads router rows from it, and it is not on its node"
    remedy = "copy the mixture to the driver's node, or to a bucket"
    return first_few(Problem(where=location, what=what, remedy=remedy) for location in missing)


def with_kept_rows(computed_EH: Float32, experts: tuple[Owner, ...], kept: KeptRouterRows, layer: int) -> Float32:
    """One layer's router with the kept rows in their places, and the others in their scale.

    Each computed row is multiplied so that its length (Euclidean norm) is the mean length of this layer's kept rows; a
    row of zeros stays so. Kept rows have the bytes that they have in the mixture.

    Args:
        computed_EH: Rows (experts, hidden) in the scale of the output; those of kept experts are not used.
        experts: The owners of the rows.
        kept: The kept rows of all layers, at least one.
        layer: The number of the layer.

    Returns:
        The rows (experts, hidden).
    """
    lengths = [np.linalg.norm(kept[owner][layer].astype(np.float64)) for owner in experts if owner in kept]
    router = np.array(computed_EH)
    for number, owner in enumerate(experts):
        if owner in kept:
            router[number] = kept[owner][layer]
        elif length := float(np.linalg.norm(router[number].astype(np.float64))):
            router[number] *= np.float32(np.mean(lengths) / length)
    return router
