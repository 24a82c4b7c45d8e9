"""The tensors of a GGUF file: names, shapes and types, and which tensors of the model each one is made of.

Every matrix of a layer's experts is one tensor, (experts, out, in): the experts' own, one behind the other.
Shapes are row-major as in safetensors; GGUF itself names the dimensions in the other order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raymoe.architectures import DenseSpec
from raymoe.evaluation.models import RoutingRule
from raymoe.gguf.options import TYPES, TensorType
from raymoe.gguf.targets import Target
from raymoe.sources.types import TensorEntry

__all__ = ["GgufTensor", "file_tensors", "rope_factors"]

Float32 = npt.NDArray[np.float32]

# Roles of a dense model (architectures/dense.py) and of a mixture (evaluation/models.py), and llama.cpp's names:
# LLM_TENSOR_NAMES in its src/llama-arch.cpp.
_BACKBONE = {
    "embed": "token_embd.weight",
    "norm.input": "blk.{layer}.attn_norm.weight",
    "attn.q": "blk.{layer}.attn_q.weight",
    "attn.q.bias": "blk.{layer}.attn_q.bias",
    "attn.k": "blk.{layer}.attn_k.weight",
    "attn.k.bias": "blk.{layer}.attn_k.bias",
    "attn.v": "blk.{layer}.attn_v.weight",
    "attn.v.bias": "blk.{layer}.attn_v.bias",
    "attn.o": "blk.{layer}.attn_output.weight",
    "attn.o.bias": "blk.{layer}.attn_output.bias",
    "attn.q_norm": "blk.{layer}.attn_q_norm.weight",
    "attn.k_norm": "blk.{layer}.attn_k_norm.weight",
    "conv.kernel": "blk.{layer}.shortconv.conv.weight",
    "conv.in": "blk.{layer}.shortconv.in_proj.weight",
    "conv.out": "blk.{layer}.shortconv.out_proj.weight",
    "norm.post": "blk.{layer}.ffn_norm.weight",
    "norm.final": "output_norm.weight",
    "lm_head": "output.weight",
}
# What some architectures call otherwise.
_OWN_NAMES = {
    "glm4moe": {"norm.post": "blk.{layer}.post_attention_norm.weight"},
    "lfm2moe": {"norm.final": "token_embd_norm.weight"},
}
_FFN = {
    f"ffn.{matrix}{ending}": f"blk.{{layer}}.ffn_{matrix}.{'bias' if ending else 'weight'}"
    for matrix in ("gate", "up", "down")
    for ending in ("", ".bias")
}
_ROTATED = ("attn.q", "attn.q.bias", "attn.k", "attn.k.bias")
_KERNEL = ".shortconv.conv.weight"
_MATRICES = ("gate", "up", "down")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """`sources` one behind the other are the tensor, or `values` are where there are none.

    `head`: rows of a head of q or k, which change places with each other (see `values.interleaved`); 0 where they stay.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    sources: tuple[TensorEntry, ...] = ()
    head: int = 0
    values: tuple[float, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.type.nbytes(math.prod(self.shape))


def file_tensors(
    spec: DenseSpec, target: Target, weights: Mapping[str, TensorEntry], wanted: TensorType
) -> tuple[GgufTensor, ...]:
    """All tensors of the file: those of no layer, then layer by layer."""
    tensors = [_tensor(name, sources, wanted, head) for name, sources, head in _dense_rows(spec, target, weights)]
    if target.rule is not None:
        for layer in range(spec.layers):
            mlp = f"model.layers.{layer}.{spec.family.ffn}."
            for name, sources in _mixture(layer, mlp, target.rule, target, weights):
                tensors.append(_tensor(name, sources, wanted))
    tensors += _constants(spec, target)
    return tuple(sorted(tensors, key=_layer_of))


def _tensor(name: str, sources: Sequence[TensorEntry], wanted: TensorType, head: int = 0) -> GgufTensor:
    shape = (len(sources), *sources[0].shape) if "_exps." in name else sources[0].shape
    if name.endswith("ffn_gate_inp_shexp.weight"):
        shape = shape[-1:]  # one row, which llama.cpp has as a vector
    if name.endswith(_KERNEL):
        shape = (shape[0], shape[-1])  # of one channel each
    return GgufTensor(name=name, shape=shape, type=_type_of(name, shape, wanted), sources=tuple(sources), head=head)


def _dense_rows(
    spec: DenseSpec, target: Target, weights: Mapping[str, TensorEntry]
) -> Iterator[tuple[str, list[TensorEntry], int]]:
    """(name in the file, sources, rows of a head that change places) of all but a mixture's FFN."""
    for row, layer, name in spec.tensors():
        if row.is_ffn and target.rule is not None:
            continue
        names = _FFN if row.is_ffn else _BACKBONE | _OWN_NAMES.get(target.architecture.name, {})
        output = names[row.role].format(layer=layer)
        yield output, [weights[name]], spec.head_dim if target.reorders and row.role in _ROTATED else 0
        if row.role == "embed" and spec.tied and not target.architecture.tied:
            yield _BACKBONE["lm_head"], [weights[name]], 0


def _mixture(
    layer: int, mlp: str, rule: RoutingRule, target: Target, weights: Mapping[str, TensorEntry]
) -> Iterator[tuple[str, list[TensorEntry]]]:
    """(name in the file, sources) of what a layer has in the place of its FFN."""
    block = f"blk.{layer}.ffn_"
    yield f"{block}gate_inp.weight", [weights[f"{mlp}router"]]
    for matrix in _MATRICES:
        yield f"{block}{matrix}_exps.weight", [weights[f"{mlp}experts.{e}.{matrix}"] for e in range(rule.experts)]
    if target.shared:
        if rule.gates_shared:
            yield f"{block}gate_inp_shexp.weight", [weights[f"{mlp}shared_router"]]
        for matrix in _MATRICES:
            yield f"{block}{matrix}_shexp.weight", [weights[f"{mlp}shared.{matrix}"]]


def _constants(spec: DenseSpec, target: Target) -> Iterator[GgufTensor]:
    """Tensors whose values follow from the config."""
    factors = rope_factors(spec) if target.architecture.factors else None
    if factors is not None:
        yield _of_values("rope_freqs.weight", factors.tolist())
    if target.architecture.name in ("glm4moe", "lfm2moe") and target.rule is not None:
        # An addition to the scores by which experts are chosen; a merge's is zero (`model.open_model` sees to that).
        for layer in range(spec.layers):
            yield _of_values(f"blk.{layer}.exp_probs_b.bias", [0.0] * target.rule.experts)


def _of_values(name: str, values: Sequence[float]) -> GgufTensor:
    return GgufTensor(name=name, shape=(len(values),), type=TYPES["f32"], values=tuple(values))


def _layer_of(tensor: GgufTensor) -> int:
    parts = tensor.name.split(".")
    return int(parts[1]) if parts[0] == "blk" else -1


def _type_of(name: str, shape: tuple[int, ...], wanted: TensorType) -> TensorType:
    """Vectors, routers and kernels are small and sensitive: always f32, as llama.cpp's own converter has them.

    In a file of 4 bits, embedding and output matrix have 8. Rows that are no whole number of blocks stay f16.
    """
    if len(shape) == 1 or "ffn_gate_inp" in name or name.endswith(_KERNEL):
        return TYPES["f32"]
    if wanted.is_quantised and shape[-1] % wanted.block:
        return TYPES["f16"]
    if wanted.name == "q4_0" and name in ("token_embd.weight", "output.weight"):
        return TYPES["q8_0"]
    return wanted


def rope_factors(spec: DenseSpec) -> Float32 | None:
    """What each rotary frequency is divided by with Llama 3's scaling, (head_dim / 2,). None without it.

    Waves much shorter than the original context stay, much longer ones are stretched by `factor`, those between by a
    blend of both. Source: `_compute_llama3_parameters` in transformers' modeling_rope_utils.py.
    """
    scaling: Mapping[str, Any] | None = spec.rope_scaling
    if scaling is None or scaling["rope_type"] != "llama3":
        return None
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = spec.rope_theta ** -(np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim)
    # How many waves fit into the original context: all of them with `high` and more, none with `low` and less.
    waves = scaling["original_max_position_embeddings"] * turns / (2 * math.pi)
    kept = np.clip((waves - low) / (high - low), 0.0, 1.0)
    factors: Float32 = (1.0 / ((1.0 - kept) / scaling["factor"] + kept)).astype(np.float32)
    return factors
