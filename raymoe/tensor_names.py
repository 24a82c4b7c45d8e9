"""Names of tensors that every dense family has, as `transformers` writes them."""

from __future__ import annotations

import re

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = "model.layers.{layer}."
# What layers of Gemma 4 E2B and E4B are given besides hidden states is made of these.
LAYER_EMBEDDINGS = "model.embed_tokens_per_layer.weight"
LAYER_PROJECTION = "model.per_layer_model_projection.weight"
LAYER_PROJECTION_NORM = "model.per_layer_projection_norm.weight"
LAYER_INPUTS = (LAYER_EMBEDDINGS, LAYER_PROJECTION, LAYER_PROJECTION_NORM)

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor is in; None for the embedding, the last norm and the head."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None
