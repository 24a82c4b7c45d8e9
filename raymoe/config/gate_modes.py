"""The gate modes: what each needs, before anything is computed. Torch-free, since planning asks here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["EMBEDDING", "MODES", "GateMode"]

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class GateMode:
    """`needs_prompts`: gates come from prompts. `needs_forward_pass`: a model has to read them, layer by layer.
    `is_fitted`: a layer's rows are fitted to what its router sees, of all experts' prompts at once."""

    name: str
    needs_prompts: bool
    needs_forward_pass: bool
    is_fitted: bool = False
    default_prompt_model: str = "base"

    def needs_parameter(self, name: str, layers: int, ffn: str) -> bool:
        """Whether this mode loads the parameter `name` of a model with that many layers, whose FFNs are called `ffn`.

        The gate of a layer comes from that layer's input, so the last layer is never run and neither is the head; where
        rows are fitted, it comes from what the layer's FFN gets, so the last layer's FFN is not run.
        """
        if name == EMBEDDING:
            return self.needs_prompts
        match = _LAYER.match(name)
        if not self.needs_forward_pass or match is None:
            return False
        return int(match[1]) < layers - 1 or (self.is_fitted and f".{ffn}." not in name)


MODES: Mapping[str, GateMode] = {
    mode.name: mode
    for mode in (
        GateMode(name="hidden", needs_prompts=True, needs_forward_pass=True),
        GateMode(name="hidden_avg", needs_prompts=True, needs_forward_pass=True),
        GateMode(
            name="ridge", needs_prompts=True, needs_forward_pass=True, is_fitted=True, default_prompt_model="grafted"
        ),
        GateMode(name="cheap_embed", needs_prompts=True, needs_forward_pass=False),
        GateMode(name="random", needs_prompts=False, needs_forward_pass=False),
        GateMode(name="uniform_random", needs_prompts=False, needs_forward_pass=False),
    )
}
