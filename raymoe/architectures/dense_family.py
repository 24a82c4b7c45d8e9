"""What a dense family is: which tensors a layer has, under which names, with which shapes.

A row names a tensor's *role* (`attn.q`, `ffn.down`, ...). Hosts map roles to their own names, so a family and a host
meet in roles and nowhere else, and adding either is adding a table. Shapes are written in symbols that `DenseSpec`
resolves to numbers; `when` names the `DenseSpec` flag without which the row does not exist (`!flag`: with which).

Some families store several matrices as one (Phi-3 has q, k and v in `qkv_proj`). Such a row `fused` them: blocks of its
rows, each with a role of its own. The families themselves are in families.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

FFN_ROLES = ("ffn.gate", "ffn.up", "ffn.down")

Windows = Callable[[Mapping[str, Any], int], tuple[int | None, tuple[bool, ...]]]
"""From a config and a number of layers to the sliding window and the layers that it holds for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRow:
    """One kind of tensor: `name` may hold `{layer}`; `shape` is in symbols of `DenseSpec.size_of`.

    `kind`: only layers of that kind have it, in families whose layers differ. `fused`: what the tensor is made of,
    as (role, symbol of its number of rows) from the first row on.
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
    """What transformers' own code of a linear attention or state-space layer holds, without kernels of other libraries.

    Each sequence is padded to a multiple of `chunk` tokens. `numbers` are those in float32 that are held at most per
    padded token; measured, since they are those of many intermediate tensors.
    """

    chunk: int
    numbers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseFamily:
    """One dense model type of transformers.

    `defaults` are the values that transformers assumes for keys missing from a config.json; they matter, since a
    config saved by an older version leaves out what was the default then.
    `keys` are the family's own names of keys that most families name alike (`norm_eps` for `rms_norm_eps`); of several
    the first that a config has.
    `switches` are the config keys that switch a feature of `DenseSpec` on; `fixed` are features that the family has by
    construction. `carried` are keys of the family's own that its hosts have too, under the same names.
    `windows` finds the layers with a sliding window, `kinds` the kind of each layer where layers differ; both may
    follow from `layer_types`. `scan` tells what layers of kind `LINEAR` hold, from the values of `carried`.
    `has_partial_rotary`: its RoPE may turn a part of each head only. `rope_is_interleaved`: it turns dimension 0 of a
    head with 1, 2 with 3, ..., where others turn the first half with the second. `limits` says what about a config no
    host can hold; `adjust` gives values that follow from others. `dropped` are keys that say nothing of a mixture.
    `mixture_keys` are those of `MIXTURE_KEYS` (moe_architecture.py) that its configuration class has too.
    `ignored` are names (suffixes) that old checkpoints carry and that no model reads.
    `ffn` and `final_norm` are the names of those modules in transformers' model of this family.
    """

    model_type: str
    title: str
    rows: tuple[TensorRow, ...]
    defaults: Mapping[str, Any]
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    switches: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, bool] = field(default_factory=dict)
    carried: tuple[str, ...] = ()
    windows: Windows = _no_windows
    reads_layer_types: bool = False
    kinds: Callable[[Mapping[str, Any], int], tuple[str, ...]] | None = None
    scan: Callable[[Mapping[str, Any]], Scan] | None = None
    has_partial_rotary: bool = False
    rope_is_interleaved: bool = False
    limits: Callable[[Mapping[str, Any]], list[str]] = lambda config: []
    adjust: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: {}
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq", "self_attn.masked_bias", "self_attn.bias")
    dropped: tuple[str, ...] = ()
    mixture_keys: tuple[str, ...] = ()
    ffn: str = "mlp"
    final_norm: str = "norm"

    @property
    def has_sinks(self) -> bool:
        """Whether its attention has sinks, which PyTorch's scaled dot product attention knows nothing of."""
        return any(row.role == "attn.sinks" for row in self.rows)
