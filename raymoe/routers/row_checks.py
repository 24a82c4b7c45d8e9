"""Checks that router rows can tell experts apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from raymoe.formatting import number_ranges
from raymoe.gate_modes.directions import normalize
from raymoe.planning.owner import Owner

Float32 = npt.NDArray[np.float32]

# Two rows of a larger cosine are nearly parallel: both experts get nearly the same score for every token.
MAX_COSINE = 0.92


def not_finite_message(owner: Owner, layer: int) -> str:
    """The message for an expert with prompts that give states that are not finite."""
    return (
        f"gates of {owner}: the states of its prompts are not finite numbers at layer {layer}. The model that reads "
        "them has weights that are not finite, or so large that its sums overflow: get it again, or use another"
    )


def conditioning_warning(rows: Sequence[Float32], names: Sequence[str]) -> str | None:
    """A warning with numbers if the rows of two experts point nearly the same way in some layers.

    Args:
        rows: One (layers, hidden) array per expert.
        names: What the warning calls the experts, in the order of `rows`.

    Only cosines near +1 count: rows of opposite directions tell experts apart best, and rows that add up to zero, or
    more rows than dimensions, are not a problem.
    """
    if len(rows) < 2:
        return None
    closest = [_closest_pair(np.stack([row[layer] for row in rows])) for layer in range(len(rows[0]))]
    bad = [layer for layer, (cosine, _, _) in enumerate(closest) if not cosine <= MAX_COSINE]
    if not bad:
        return None
    worst = max(bad, key=lambda layer: closest[layer][0])
    cosine, first, second = closest[worst]
    return (
        f"the router rows of two experts are nearly parallel (cosine above {MAX_COSINE:g}) in {len(bad)} of "
        f"{len(closest)} layers ({number_ranges(bad)}). Worst is layer {worst}: cosine {cosine:.3f} between "
        f"{names[first]} and {names[second]}. Such experts get nearly equal scores for every token; use prompts that "
        "differ more, add negative_prompts, or gate_mode: ridge"
    )


def _closest_pair(rows_EH: Float32) -> tuple[float, int, int]:
    """The largest cosine between two experts' rows of one layer, and the two experts."""
    units = normalize(rows_EH).astype(np.float64)
    first, second = np.triu_indices(len(units), 1)
    cosines = (units @ units.T)[first, second]
    largest = int(cosines.argmax())
    return float(cosines[largest]), int(first[largest]), int(second[largest])


def zero_row_warnings(rows: Sequence[Float32], names: Sequence[str]) -> Iterator[str]:
    """A warning for each expert with rows of zeros: its prompts and its negative prompts give the same states."""
    for row, name in zip(rows, names, strict=True):
        zero = np.flatnonzero(~row.any(axis=1)).tolist()
        if zero:
            yield (
                f"the router row of {name} is zero in {len(zero)} of {len(row)} layers ({number_ranges(zero)}), so "
                "that it has the same score for every token: its positive_prompts and negative_prompts leave the same "
                "states; use prompts that differ"
            )
