"""How much memory fitting a layer's router takes, and how many layers an actor may fit at once. Torch-free.

Each layer is fitted alone, so that the routers do not depend on how many are fitted at once.
"""

from __future__ import annotations

from raymoe.config.modes import MODES
from raymoe.gates.capture import MOST_TOKENS
from raymoe.planning.types import GatePlan

__all__ = ["fitting_bytes", "most_layers_at_once"]

_MOST_LAYERS_AT_ONCE = 4
_BUDGET_BYTES = 2 << 30  # of all layers that one actor fits at once; one layer is fitted even if it needs more


def fitting_bytes(gates: GatePlan) -> int:
    """Bytes that fitting one layer's router takes: its states twice in bfloat16, and four matrices (hidden, hidden) in
    float64. 0 for modes that fit no routers."""
    return 4 * MOST_TOKENS * gates.hidden + 4 * 8 * gates.hidden**2 if MODES[gates.mode].fits_rows else 0


def most_layers_at_once(gates: GatePlan) -> int:
    """How many layers' routers one actor works on at once at most, however many cores it has."""
    each = fitting_bytes(gates)
    return max(1, min(_MOST_LAYERS_AT_ONCE, _BUDGET_BYTES // each)) if each else _MOST_LAYERS_AT_ONCE
