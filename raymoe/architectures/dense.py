"""The dense families that experts come from: which tensors a layer has, under which names, with which shapes.

A row names a tensor's *role* (`attn.q`, `ffn.down`, ...). Hosts map roles to their own names, so a family and a host
meet in roles and nowhere else, and adding either is adding a table. Shapes are written in symbols that `DenseSpec`
resolves to numbers; `when` names the `DenseSpec` flag without which the row does not exist.

Names and shapes: transformers' modelling files of each family (`models/llama`, `models/mistral`, `models/qwen2`,
`models/qwen3`), which follow the layout of the checkpoints on the Hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FAMILIES", "FFN_ROLES", "DenseFamily", "TensorRow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRow:
    """One kind of tensor: `name` may hold `{layer}`; `shape` is in symbols of `DenseSpec.size_of`."""

    role: str
    name: str
    shape: tuple[str, ...]
    when: str = ""

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    @property
    def is_ffn(self) -> bool:
        return self.role.startswith("ffn.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseFamily:
    """One dense model type of transformers.

    `defaults` are the values that transformers assumes for keys missing from a config.json; they matter, since a
    config saved by an older version leaves out what was the default then.
    `fixed` are features that the family has by construction and no config key switches.
    `ignored` are names (suffixes) that old checkpoints carry and that no model reads.
    """

    model_type: str
    rows: tuple[TensorRow, ...]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, bool] = field(default_factory=dict)
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq", "self_attn.masked_bias", "self_attn.bias")


FFN_ROLES = ("ffn.gate", "ffn.up", "ffn.down")

_LAYER = "model.layers.{layer}."


def _attention(proj: str, out: str, inner: str, bias_flag: str) -> tuple[TensorRow, ...]:
    prefix = f"{_LAYER}self_attn.{proj}_proj."
    return (
        TensorRow(role=f"attn.{proj}", name=prefix + "weight", shape=(out, inner)),
        TensorRow(role=f"attn.{proj}.bias", name=prefix + "bias", shape=(out,), when=bias_flag),
    )


def _ffn(proj: str, out: str, inner: str) -> tuple[TensorRow, ...]:
    prefix = f"{_LAYER}mlp.{proj}_proj."
    return (
        TensorRow(role=f"ffn.{proj}", name=prefix + "weight", shape=(out, inner)),
        TensorRow(role=f"ffn.{proj}.bias", name=prefix + "bias", shape=(out,), when="mlp_bias"),
    )


# Rows in the order in which a model runs: neighbouring rows are neighbours in the files that transformers writes,
# so that a copy in this order reads its sources forwards.
_ROWS = (
    TensorRow(role="embed", name="model.embed_tokens.weight", shape=("vocab", "hidden")),
    TensorRow(role="norm.input", name=_LAYER + "input_layernorm.weight", shape=("hidden",)),
    *_ffn("down", "hidden", "intermediate"),
    *_ffn("gate", "intermediate", "hidden"),
    *_ffn("up", "intermediate", "hidden"),
    TensorRow(role="norm.post", name=_LAYER + "post_attention_layernorm.weight", shape=("hidden",)),
    TensorRow(role="attn.k_norm", name=_LAYER + "self_attn.k_norm.weight", shape=("head_dim",), when="qk_norm"),
    *_attention("k", "kv_out", "hidden", "qkv_bias"),
    *_attention("o", "hidden", "q_out", "o_bias"),
    TensorRow(role="attn.q_norm", name=_LAYER + "self_attn.q_norm.weight", shape=("head_dim",), when="qk_norm"),
    *_attention("q", "q_out", "hidden", "qkv_bias"),
    *_attention("v", "kv_out", "hidden", "qkv_bias"),
    TensorRow(role="norm.final", name="model.norm.weight", shape=("hidden",)),
    TensorRow(role="lm_head", name="lm_head.weight", shape=("vocab", "hidden"), when="untied"),
)

_COMMON_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "rope_theta": 10000.0,
    "mlp_bias": False,
    "attention_bias": False,
    "sliding_window": None,
}
_QWEN_DEFAULTS = {
    **_COMMON_DEFAULTS,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: Mapping[str, DenseFamily] = {
    family.model_type: family
    for family in (
        DenseFamily(
            model_type="llama",
            rows=_ROWS,
            defaults={
                **_COMMON_DEFAULTS,
                "max_position_embeddings": 2048,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
        ),
        DenseFamily(
            model_type="mistral",
            rows=_ROWS,
            defaults={
                **_COMMON_DEFAULTS,
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
        ),
        DenseFamily(
            model_type="qwen2",
            rows=_ROWS,
            defaults={**_QWEN_DEFAULTS, "num_key_value_heads": 32},
            fixed={"qkv_bias": True},
        ),
        DenseFamily(
            model_type="qwen3",
            rows=_ROWS,
            defaults={**_QWEN_DEFAULTS, "num_key_value_heads": 32, "head_dim": 128},
            fixed={"qk_norm": True},
        ),
    )
}
