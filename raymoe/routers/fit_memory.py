"""How many layers' routers an actor may fit at once. Torch-free.

Each layer is fitted alone, so that the routers do not depend on how many are fitted at once.
"""

from __future__ import annotations

from raymoe.gate_modes import MODES
from raymoe.planning.plan import GatePlan, MergePlan
from raymoe.routers.regmean_memory import max_merges_at_once

_MAX_LAYERS_AT_ONCE = 4
_BUDGET_BYTES = 2 << 30  # of all layers that one actor fits at once; one layer is fitted even if it needs more


def max_computed_at_once(plan: MergePlan) -> int:
    """The most layers that one actor computes at once, whatever its number of cores: their routers, or their
    backbone."""
    return min(max_layers_at_once(plan.gates), max_merges_at_once(plan.moments))


def max_layers_at_once(gates: GatePlan) -> int:
    """The most layers' routers that one actor fits at once, whatever its number of cores."""
    each = MODES[gates.mode].fitting_bytes(gates.hidden)
    most = min(_MAX_LAYERS_AT_ONCE, max(1, gates.layers))
    return max(1, min(most, _BUDGET_BYTES // each)) if each else most
