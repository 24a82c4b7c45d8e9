"""The gate modes: what each needs, before anything is computed. Torch-free, since planning asks here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["MODES", "GateMode"]

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class GateMode:
    """`needs_prompts`: gates come from prompts. `reads_layers`: a model has to read them, layer by layer."""

    name: str
    needs_prompts: bool
    reads_layers: bool
    default_prompt_model: str = "base"

    def reads(self, name: str, layers: int) -> bool:
        """Whether this mode loads the parameter `name` of a model with that many layers.

        The gate of a layer comes from that layer's input, so the last layer is never run and neither is the head.
        """
        if name == EMBEDDING:
            return self.needs_prompts
        match = _LAYER.match(name)
        return self.reads_layers and match is not None and int(match[1]) < layers - 1


MODES: Mapping[str, GateMode] = {
    mode.name: mode
    for mode in (
        GateMode(name="hidden", needs_prompts=True, reads_layers=True),
        GateMode(name="hidden_avg", needs_prompts=True, reads_layers=True),
        GateMode(name="cheap_embed", needs_prompts=True, reads_layers=False),
        GateMode(name="random", needs_prompts=False, reads_layers=False),
        GateMode(name="uniform_random", needs_prompts=False, reads_layers=False),
    )
}
