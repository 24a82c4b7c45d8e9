"""Attention with sinks (Granite's) through PyTorch's scaled dot product attention, which has none.

A head's output is multiplied by sigmoid(logsumexp(its scores) - sink): as if there were one more key, with the sink as
its score and zero as its value. That key is added here, by one more dimension of queries (1) and keys (0, and the sink
over the scale for the new one), so that no matrix of scores is built per head.

Source: `eager_attention_forward` in transformers' models/granite_swa.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

ATTENTION_WITH_SINKS = "raymoe_sinks"
# Dimensions of a head in fast kernels.
_MULTIPLE = 8


def register_sink_attention() -> None:
    """Register this attention with transformers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_WITH_SINKS, _attention)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    s_aux: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Of (batch, heads, tokens, head_dim); the mask (1, 1, tokens, tokens) is true where a token attends.

    The output is (batch, tokens, heads, head_dim).
    """
    heads, width = query.shape[1], query.shape[3]
    key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, value))
    more = _MULTIPLE - width % _MULTIPLE
    query = pad(query, (0, more))
    query[..., width] = 1
    key = pad(key, (0, more, 0, 1))
    key[:, :, -1, width] = s_aux / scaling
    value, mask = pad(value, (0, more, 0, 1)), pad(attention_mask, (0, 1), value=True)
    output = scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return output[..., :width].transpose(1, 2), None
