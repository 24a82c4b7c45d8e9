"""What few prompts do to routers, said while a merge is planned: by the measured tables of docs/routing.md."""

from __future__ import annotations

from collections.abc import Iterator

from raymoe.formatting import short_list
from raymoe.gate_modes import MODES, better_mode
from raymoe.planning.plan import GatePlan

__all__ = ["prompt_warnings"]

# Measured are 5 and 16 prompts. Fewer than this are nearer to the first.
_FEW = 8


def prompt_warnings(gates: GatePlan) -> Iterator[str]:
    """A warning if some experts have few prompts and the gate mode needs more. Empty for other gate modes."""
    mode = MODES[gates.mode]
    counts = {member.owner: len(member.positive) for member in gates.experts}
    few = [f"{owner} has {count}" for owner, count in counts.items() if count < _FEW]
    if mode.measured_accuracy is None or len(counts) < 2 or not few:
        return
    keywords, texts = mode.measured_accuracy
    better = ""
    if (other := better_mode(mode)) is not None and other.measured_accuracy is not None:
        better = "; gate_mode: {} sends {}% and {}%".format(other.name, *other.measured_accuracy)
    single = [owner for owner, count in counts.items() if count == 1]
    unjudged = ""
    if mode.single_prompt_note and single:
        unjudged = (
            f"With one prompt ({short_list(single)}) no prompt can be held out: {mode.name} {mode.single_prompt_note}. "
        )
    yield (
        f"few prompts ({short_list(few)}): in the measurement of docs/routing.md {gates.mode} sends {keywords}% of "
        "held-out "
        f"tokens first to the matching expert with five keywords per expert, and {texts}% with 16 texts per expert"
        f"{better}. {unjudged}Give each expert 16 prompts or more, a few "
        "sentences each"
    )
