"""Names of tensors that every dense family has, as `transformers` writes them."""

from __future__ import annotations

import re

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = "model.layers.{layer}."

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor is in; None for the embedding, the last norm and the head."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None
