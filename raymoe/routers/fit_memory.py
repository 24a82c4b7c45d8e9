"""How much memory fitting a layer's router takes, and how many layers an actor may fit at once. Torch-free.

Each layer is fitted alone, so that the routers do not depend on how many are fitted at once.
"""

from __future__ import annotations

from raymoe.config.gate_modes import MODES
from raymoe.planning.plan import GatePlan
from raymoe.routers.activations import FOLDS, MAX_TOKENS_PER_EXPERT

__all__ = ["CHOICE_SIZE", "CHUNK", "fitting_bytes", "max_layers_at_once"]

_MAX_LAYERS_AT_ONCE = 4
_BUDGET_BYTES = 2 << 30  # of all layers that one actor fits at once; one layer is fitted even if it needs more
# Tokens that are summed at once, and the largest system that is solved for each fold and each regularisation.
CHUNK, CHOICE_SIZE = 4096, 1024
_F64 = 8
_SAFETY_FACTOR = 1.08  # what libraries pack matrices into, measured


def fitting_bytes(gates: GatePlan, tokens: int = MAX_TOKENS_PER_EXPERT) -> int:
    """Bytes that fitting one layer's router to so many tokens takes at most (see ridge.py): their states twice in
    bfloat16, chunks of them and systems (hidden, hidden) in float64. 0 for modes that fit no routers."""
    if not MODES[gates.mode].is_fitted:
        return 0
    tokens, hidden = min(tokens, MAX_TOKENS_PER_EXPERT), gates.hidden
    if tokens < hidden:  # the dual form
        working = 3 * _F64 * tokens * hidden + 4 * _F64 * tokens**2
    else:
        working = max(_sums_bytes(min(tokens, CHUNK), hidden, systems=2), _F64 * (CHUNK * hidden + 4 * hidden**2))
        if (
            hidden <= CHOICE_SIZE
        ):  # systems without each fold are made of all tokens, beside the states that it leaves out
            fold = tokens // FOLDS
            working = max(working, _sums_bytes(min(fold, CHUNK), hidden, systems=7) + (_F64 + 2 * 2) * fold * hidden)
    return round(_SAFETY_FACTOR * (2 * 2 * tokens * hidden + working))


def _sums_bytes(chunk: int, hidden: int, *, systems: int) -> int:
    """A chunk of states as it is weighted, the one before it, and so many systems."""
    return _F64 * (3 * chunk * hidden + systems * hidden**2)


def max_layers_at_once(gates: GatePlan) -> int:
    """How many layers' routers one actor works on at once at most, however many cores it has."""
    each = fitting_bytes(gates)
    most = min(_MAX_LAYERS_AT_ONCE, max(1, gates.layers))
    return max(1, min(most, _BUDGET_BYTES // each)) if each else most
