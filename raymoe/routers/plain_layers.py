"""The layers of the usual dense decoder in plain PyTorch.

A layer is the one of Llama and its relatives: RMSNorm before attention and before the FFN, attention with grouped keys
and values and RoPE, a gated FFN. Modules have transformers' names, so that a checkpoint's tensors load into them. What
differs between families comes from `DenseSpec`: biases, norms of q and k, fused matrices, RoPE of all kinds, layers
without RoPE, multipliers. `DenseFamily.has_plain_layers` says which families compute just this.

transformers has the same layers, but importing them takes several seconds (generation, torch.compile and much else come
along), more than prompts take to be read by a small model. Importing this takes nothing beyond torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from raymoe.architectures import DenseSpec, read_spec
from raymoe.routers.rope_frequencies import depends_on_length, rope_frequencies

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""By transformers' names of activation functions."""

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, (1, tokens, rotary_dim), in the dtype of hidden states."""


def plain_spec(config: Mapping[str, Any]) -> DenseSpec | None:
    """The spec of a dense model if these layers compute it."""
    spec = read_spec(config, "the model")
    if not isinstance(spec, DenseSpec) or not spec.family.has_plain_layers or spec.hidden_act not in ACTIVATIONS:
        return None
    return spec


class PlainDecoder(torch.nn.Module):  # type: ignore[misc]  # torch is Any to mypy here
    """Layers, RoPE and last norm of a model, without weights. Use it on the device `meta`."""

    def __init__(self, spec: DenseSpec) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(DecoderLayer(spec, layer) for layer in range(spec.layers))
        self.norm = torch.nn.RMSNorm(spec.hidden, eps=spec.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(spec)


class RotaryEmbedding(torch.nn.Module):  # type: ignore[misc]
    """Cosines and sines of positions."""

    def __init__(self, spec: DenseSpec) -> None:
        super().__init__()
        self._spec = spec

    @property
    def depends_on_length(self) -> bool:
        return depends_on_length(self._spec)

    def forward(self, hidden_BTH: torch.Tensor, positions: torch.Tensor) -> Rotation:
        """Of the positions (1, tokens) 0, 1, ..., on the device and in the dtype of hidden states."""
        frequencies, factor = rope_frequencies(self._spec, positions.shape[-1])
        angles = positions[..., None].float() * frequencies.to(positions.device)
        if self._spec.family.rope_is_interleaved:
            angles = angles.repeat_interleave(2, dim=-1)
        else:
            angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * factor).to(hidden_BTH.dtype), (angles.sin() * factor).to(hidden_BTH.dtype)


class DecoderLayer(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, spec: DenseSpec, layer: int) -> None:
        super().__init__()
        self.input_layernorm = torch.nn.RMSNorm(spec.hidden, eps=spec.rms_norm_eps)
        self.self_attn = Attention(spec, layer)
        self.post_attention_layernorm = torch.nn.RMSNorm(spec.hidden, eps=spec.rms_norm_eps)
        self.mlp = FusedFeedForward(spec) if _is_fused(spec, "ffn.gate") else FeedForward(spec)
        self._multiplier = spec.extra.get("residual_multiplier", 1.0)

    def forward(
        self,
        hidden_BTH: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None,
        position_embeddings: Rotation,
        **_: Any,
    ) -> torch.Tensor:
        """The layer's output, (batch, tokens, hidden). The mask is as in `Attention.forward`."""
        output = self.self_attn(self.input_layernorm(hidden_BTH), attention_mask, position_embeddings)
        hidden_BTH = hidden_BTH + self._scaled(output)
        return hidden_BTH + self._scaled(self.mlp(self.post_attention_layernorm(hidden_BTH)))

    def _scaled(self, output_BTH: torch.Tensor) -> torch.Tensor:
        return output_BTH if self._multiplier == 1.0 else output_BTH * self._multiplier


class FeedForward(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, spec: DenseSpec) -> None:
        super().__init__()
        sizes = spec.hidden, spec.intermediate
        self.gate_proj = torch.nn.Linear(*sizes, bias=spec.mlp_bias)
        self.up_proj = torch.nn.Linear(*sizes, bias=spec.mlp_bias)
        self.down_proj = torch.nn.Linear(*reversed(sizes), bias=spec.mlp_bias)
        self._activation = ACTIVATIONS[spec.hidden_act]

    def forward(self, state_BTH: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(self._activation(self.gate_proj(state_BTH)) * self.up_proj(state_BTH))
        return output


class FusedFeedForward(torch.nn.Module):  # type: ignore[misc]
    """The gate's and the up matrix's rows are one matrix."""

    def __init__(self, spec: DenseSpec) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Linear(spec.hidden, 2 * spec.intermediate, bias=spec.mlp_bias)
        self.down_proj = torch.nn.Linear(spec.intermediate, spec.hidden, bias=spec.mlp_bias)
        self._activation = ACTIVATIONS[spec.hidden_act]

    def forward(self, state_BTH: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(state_BTH).chunk(2, dim=-1)
        output: torch.Tensor = self.down_proj(self._activation(gate) * up)
        return output


class Attention(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, spec: DenseSpec, layer: int) -> None:
        super().__init__()
        self._interleaved, self._rotated = spec.family.rope_is_interleaved, spec.rotary_dim
        self._rotates = bool(spec.extra.get("no_rope_layers", (1,) * spec.layers)[layer])
        self._scale = spec.extra.get("attention_multiplier", spec.head_dim**-0.5)
        self._head_dim, self._groups = spec.head_dim, spec.heads // spec.kv_heads
        self._rows = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self._fused = _is_fused(spec, "attn.q")
        if self._fused:
            self.qkv_proj = torch.nn.Linear(spec.hidden, sum(self._rows), bias=spec.qkv_bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (
                torch.nn.Linear(spec.hidden, rows, bias=spec.qkv_bias) for rows in self._rows
            )
        self.o_proj = torch.nn.Linear(spec.heads * spec.head_dim, spec.hidden, bias=spec.o_bias)
        if spec.qk_norm:
            self.q_norm, self.k_norm = (torch.nn.RMSNorm(spec.head_dim, eps=spec.rms_norm_eps) for _ in "qk")
        self._norms_heads = spec.qk_norm

    def forward(self, state_BTH: torch.Tensor, mask: torch.Tensor | None, rotation: Rotation) -> torch.Tensor:
        """(batch, tokens, hidden). The mask (1, 1, tokens, tokens) is true where a token attends; without one, each
        attends to itself and those before it."""
        query, key, value = (self._by_head(part) for part in self._project(state_BTH))
        if self._norms_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        if self._rotates:
            query, key = self._rotate(query, rotation), self._rotate(key, rotation)
        grouped = self._groups > 1 and mask is None and self._head_dim <= _LARGEST_GROUPED
        if self._groups > 1 and not grouped:
            key, value = (part.repeat_interleave(self._groups, dim=1) for part in (key, value))
        output = F.scaled_dot_product_attention(
            query, key, value, mask, scale=self._scale, is_causal=mask is None, enable_gqa=grouped
        )
        merged: torch.Tensor = self.o_proj(output.transpose(1, 2).flatten(2))
        return merged

    def _project(self, state_BTH: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self._fused:
            return tuple(self.qkv_proj(state_BTH).split(self._rows, dim=-1))
        return self.q_proj(state_BTH), self.k_proj(state_BTH), self.v_proj(state_BTH)

    def _by_head(self, part: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, head_dim)."""
        return part.unflatten(-1, (-1, self._head_dim)).transpose(1, 2)

    def _rotate(self, heads: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        cosines, sines = (part[:, None] for part in rotation)
        rotated, rest = heads[..., : self._rotated], heads[..., self._rotated :]
        if self._interleaved:
            turned = torch.stack((-rotated[..., 1::2], rotated[..., 0::2]), dim=-1).flatten(-2)
        else:
            first, second = rotated.chunk(2, dim=-1)
            turned = torch.cat((-second, first), dim=-1)
        rotated = rotated * cosines + turned * sines
        return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


_LARGEST_GROUPED = 256
"""Wider heads have no fast kernel that takes fewer heads of keys than of queries."""


def _is_fused(spec: DenseSpec, role: str) -> bool:
    """Whether a matrix is stored as rows of a larger one."""
    return any(role == part for row in spec.family.rows for part, _ in row.fused)
