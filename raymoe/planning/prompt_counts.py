"""What few prompts do to routers, said while a merge is planned: by the measured tables of docs/routing.md."""

from __future__ import annotations

from collections.abc import Iterator

from raymoe.config.gate_modes import MODES
from raymoe.formatting import short_list
from raymoe.planning.plan import GatePlan

__all__ = ["MEASURED", "prompt_warnings"]

MEASURED = {"hidden": (37, 55), "hidden_avg": (33, 54), "ridge": (70, 96)}
"""Per gate mode, the percentage of held-out tokens whose first choice is right, with five keywords per expert and with
16 texts per expert: the first table of docs/routing.md."""

# Measured are 5 and 16 prompts. Fewer than this are nearer to the first.
_FEW = 8


def prompt_warnings(gates: GatePlan) -> Iterator[str]:
    """A warning if some experts have few prompts and the gate mode needs more. Empty for other gate modes."""
    mode = MODES[gates.mode]
    counts = {member.owner: len(member.positive) for member in gates.experts}
    few = [f"{owner} has {count}" for owner, count in counts.items() if count < _FEW]
    if gates.mode not in MEASURED or len(counts) < 2 or not few:
        return
    keywords, texts = MEASURED[gates.mode]
    better = "" if mode.is_fitted else f"; gate_mode: ridge sends {MEASURED['ridge'][0]}% and {MEASURED['ridge'][1]}%"
    single = [str(owner) for owner, count in counts.items() if count == 1]
    unjudged = (
        f"With one prompt ({short_list(single)}) no prompt can be held out: {gates.mode} takes a constant strictness "
        "and "
        "scale then, and can't foretell an accuracy. "
    )
    yield (
        f"few prompts ({short_list(few)}): in the measurement of docs/routing.md {gates.mode} sends {keywords}% of "
        "held-out "
        f"tokens first to the matching expert with five keywords per expert, and {texts}% with 16 texts per expert"
        f"{better}. {unjudged if mode.is_fitted and single else ''}Give each expert 16 prompts or more, a few "
        "sentences each"
    )
