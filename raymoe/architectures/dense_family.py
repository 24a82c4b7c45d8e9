"""What a dense family is: which tensors a layer has, under which names, with which shapes.

A `TensorRow` is one kind of tensor. Its *role* (`attn.q`, `ffn.down`, ...) says what it is in a layer. A MoE
architecture maps roles to its own names, so roles are all that a family and a MoE architecture share, and a new one of
either needs only a table. The families are in families.py, their rows in tensor_tables.py. How a row is written:

    name    `{layer}` stands for the number of the layer; a tensor without it exists once
                                                         "model.layers.{layer}.mlp.up_proj.weight"
    shape   symbols, which `DenseSpec.size_of` turns into numbers: its sizes (vocab, hidden, intermediate, layers,
            heads, head_dim), q_out (heads * head_dim), kv_out (key/value heads * head_dim), a key of
            `DenseFamily.carried`, a number, and products (*) and sums (+) of these, without brackets
                                                         ("q_out+2*kv_out", "hidden"), ("hidden", "1", "conv_L_cache")
    when    a flag: a boolean of `DenseSpec` (qkv_bias, untied) or a key of `DenseFamily.carried`. The row exists if it
            is set, and with "!" if it is not; 0, false and null are not set
                                                         "mlp_bias", "q_lora_rank", "!q_lora_rank"
    kind    the kind of layer that has it, as `DenseFamily.kinds` names them; empty: all layers
                                                         "full_attention"
    fused   the matrices that are stored as one, from the first row on: their roles, and how many rows each has
                                                         (("attn.q", "q_out"), ("attn.k", "kv_out"), ...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

FFN_ROLES = ("ffn.gate", "ffn.up", "ffn.down")

Windows = Callable[[Mapping[str, Any], int], tuple[int | None, tuple[bool, ...]]]
"""Takes a config and a number of layers; returns the sliding window, and whether each layer has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRow:
    """One kind of tensor. The head of this module says how rows are written.

    Attributes:
        role: What it is in a layer. A role of an FFN begins with `ffn.`, one of a norm of the residual stream with
            `norm.`.
        name: Its name in a checkpoint, with `{layer}` if each layer has one.
        shape: Its shape, in symbols.
        when: The flag without which the row does not exist.
        kind: The kind of layer that has it.
        fused: Roles and rows of the matrices that it is made of.
    """

    role: str
    name: str
    shape: tuple[str, ...]
    when: str = ""
    kind: str = ""
    fused: tuple[tuple[str, str], ...] = ()

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    @property
    def is_ffn(self) -> bool:
        return self.role.startswith("ffn.")


def _no_windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[bool, ...]]:
    return None, (False,) * layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """Memory of a linear attention or state-space layer in transformers' own code, without kernels of other libraries.

    Attributes:
        chunk: Each sequence is padded to a multiple of this number of tokens.
        numbers: The most float32 numbers held per padded token. Measured, since they belong to many intermediate
            tensors.
    """

    chunk: int
    numbers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseFamily:
    """One dense model type of transformers.

    Attributes:
        model_type: Its `model_type` in config.json.
        title: Its name in messages and docs.
        class_name: Its class in transformers, the entry of `architectures` in config.json. Empty for families that no
            mixture is read as.
        rows: Its tensors, in the order in which transformers writes them.
        defaults: Values that transformers assumes for keys that a config.json leaves out. A config saved by an older
            version leaves out what was the default then.
        keys: The family's names of keys that most families call otherwise (`norm_eps` for `rms_norm_eps`): usual key
            to names. The first name that a config has counts.
        switches: Features of `DenseSpec` (qkv_bias, o_bias, mlp_bias, qk_norm), and the config key that switches each
            on.
        fixed: Features of `DenseSpec` that every model of the family has, or lacks.
        carried: Keys of the family's own that its MoE architectures have under the same names. They are in
            `DenseSpec.extra`, for rows too.
        windows: From a config and a number of layers to the sliding window, and whether each layer has it.
        reads_layer_types: `windows` or `kinds` follow from the key `layer_types`, which has to name every layer.
        kinds: From a config and a number of layers to the kind of each layer. None if all layers are alike.
        scan: From the values of `carried` to what layers of kind `LINEAR` hold while they run.
        has_partial_rotary: Its RoPE may rotate a part of each head only.
        rope_kinds: The kinds of layers that each have RoPE settings of their own. Empty: all layers have the same.
        rope_is_interleaved: Its RoPE rotates dimension 0 of a head with 1, 2 with 3, ..., and not the first half with
            the second.
        has_rope_alpha: Its `dynamic` RoPE scaling may have `alpha`, which makes the base of RoPE larger from the first
            token on.
        norms_add_one: Its norms multiply by 1 + weight, except those of linear attention.
        has_plain_layers: Its layers are those of routers/plain_layers.py, so that transformers need not be imported.
        scales_embeddings: Its embeddings are multiplied by the square root of their width, rounded to their dtype.
        limits: Reasons why no MoE architecture can represent a config, one text per reason.
        adjust: Config values that follow from others.
        ignored: Suffixes of tensor names in old checkpoints that no model reads.
        ignored_in: The same for layers of one kind, which other layers have a use for.
        dropped: Keys without a meaning, or with another meaning, in the config.json of a mixture.
        mixture_keys: Those of `MIXTURE_KEYS` (moe_architecture.py) that its configuration class has too.
        reads_tokenizer_as_is: transformers 5 reads a tokenizer.json of this model type as it is, whatever class the
            tokenizer's config names. For others, it makes a LlamaTokenizer anew.
        ffn: The name of the FFN in transformers' layers.
        final_norm: The name of the last norm in transformers' model.
    """

    model_type: str
    title: str
    rows: tuple[TensorRow, ...]
    defaults: Mapping[str, Any]
    class_name: str = ""
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    switches: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, bool] = field(default_factory=dict)
    carried: tuple[str, ...] = ()
    windows: Windows = _no_windows
    reads_layer_types: bool = False
    kinds: Callable[[Mapping[str, Any], int], tuple[str, ...]] | None = None
    scan: Callable[[Mapping[str, Any]], Scan] | None = None
    has_partial_rotary: bool = False
    rope_kinds: tuple[str, ...] = ()
    rope_is_interleaved: bool = False
    has_rope_alpha: bool = False
    norms_add_one: bool = False
    has_plain_layers: bool = False
    scales_embeddings: bool = False
    limits: Callable[[Mapping[str, Any]], list[str]] = lambda config: []
    adjust: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: {}
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq", "self_attn.masked_bias", "self_attn.bias")
    ignored_in: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    mixture_keys: tuple[str, ...] = ()
    reads_tokenizer_as_is: bool = False
    ffn: str = "mlp"
    final_norm: str = "norm"

    @property
    def has_sinks(self) -> bool:
        """Whether its attention has sinks, which PyTorch's scaled dot product attention does not support."""
        return any(row.role == "attn.sinks" for row in self.rows)

    @property
    def has_latent_attention(self) -> bool:
        """Whether keys and values of its attention are made of a few latent numbers (DeepSeek's)."""
        return any(row.role == "mla.kv_a" for row in self.rows)
