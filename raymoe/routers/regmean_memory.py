"""How much memory and work RegMean (regmean.py) takes. Torch-free, since plans use it."""

from __future__ import annotations

from collections.abc import Sequence

from raymoe.planning.plan import Combination, MomentPlan
from raymoe.routers.attention_inputs import MAX_TOKENS

BLOCK = 1024
"""How many tokens' inputs, and how many rows of a matrix, are computed at once."""

_F64 = 8
_BUDGET_BYTES = 2 << 30  # of all layers that one actor merges at once; one layer is merged even if it needs more
_MAX_LAYERS_AT_ONCE = 4


def merging_bytes(matrices: Sequence[Combination]) -> int:
    """Peak bytes of merging one layer: inputs, second moments (columns x columns) and changes of all rows with the same
    inputs in float64, and the merged matrices."""
    if not matrices:
        return 0
    width = max(each.shape[1] for each in matrices)
    rows = sum(each.shape[0] for each in matrices)
    working = _F64 * (4 * width * width + rows * width + 4 * BLOCK * width)
    return working + inputs_bytes(matrices) + 4 * rows * width


def inputs_bytes(matrices: Sequence[Combination]) -> int:
    """The most bytes of the kept inputs of one layer: as if all matrices of one width shared theirs, and one more had
    its own."""
    widths = sorted({each.shape[1] for each in matrices})
    own = widths if len(widths) > 1 or len(matrices) < 2 else widths * 2
    return 2 * MAX_TOKENS * sum(own)


def max_merges_at_once(plan: MomentPlan | None) -> int:
    """The most layers that one actor merges at once, whatever its number of cores."""
    most = max(map(merging_bytes, plan.matrices), default=0) if plan is not None else 0
    return max(1, min(_MAX_LAYERS_AT_ONCE, _BUDGET_BYTES // most)) if most else _MAX_LAYERS_AT_ONCE


def merging_operations(plan: MomentPlan, tokens: int) -> int:
    """Floating-point operations of all merges, in float64, if `tokens` tokens' inputs are kept at each layer."""
    total = 0
    for matrices in plan.matrices:
        widths = {each.shape[1] for each in matrices}
        total += sum(2 * tokens * width**2 + width**3 // 3 for width in widths)
        total += sum(2 * each.shape[0] * each.shape[1] ** 2 * len(each.experts) for each in matrices)
    return total
