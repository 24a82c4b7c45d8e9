"""The gate modes: how router rows are made. One class per mode, in one file of `modes/` each.

    modes/NAME.py    MODE = Name()       the mode: what it needs, what it keeps, how it makes rows
    base.py          GateMode            the interface of a mode, with shapes; what most modes have in common
    the rest         helpers of modes    unit vectors, least squares, captured activations and fitted rows

The config, the plan and `routers/` use modes, so a mode imports none of them. It gets arrays and functions, and returns
arrays. `routers/` and `runtime/` read weights, run layers and schedule work in the same way for all modes. That is why
one file is enough for a new mode: docs/contributing/gate-mode.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules

from raymoe.gate_modes import modes
from raymoe.gate_modes.base import GateMode

__all__ = ["ALIASES", "DEFAULT_MODE", "MODES", "GateMode", "better_mode"]


def _find_modes() -> dict[str, GateMode]:
    """All modes by name: first those that run a model, then those that read prompts, then those that draw rows."""
    found: list[GateMode] = [
        import_module(f"{modes.__name__}.{module.name}").MODE for module in iter_modules(modes.__path__)
    ]
    found.sort(key=lambda mode: (not mode.needs_forward_pass, not mode.needs_prompts, mode.name))
    return {mode.name: mode for mode in found}


MODES: Mapping[str, GateMode] = _find_modes()
"""The modes by the name that `gate_mode` has in a config."""

ALIASES: Mapping[str, str] = {alias: mode.name for mode in MODES.values() for alias in mode.aliases}
"""Other names that a config may use, and the names of those modes."""

DEFAULT_MODE = "hidden"
"""The mode of a config without `gate_mode`, as in mergekit-moe. Evaluation compares merges with it."""


def better_mode(mode: GateMode) -> GateMode | None:
    """The mode that routes best in the measurement of docs/research/routing.md; None if `mode` is that mode.

    Example:
        >>> better_mode(MODES["hidden"]).name
        'ridge'
    """
    best = max(MODES.values(), key=lambda other: other.measured_accuracy or (0, 0))
    return None if mode is best else best
