"""The tensors of a GGUF file: names, shapes and types, and which tensors of the model each one is made of.

Each matrix of a layer's experts is one tensor, (experts, out, in), with the experts' matrices in order.
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
from raymoe.architectures.tensor_tables import ATTENTION
from raymoe.checkpoints.weight_table import RoutingRule
from raymoe.export.gguf.choose_target import Target, is_longrope
from raymoe.export.gguf.options import TYPES, TensorType
from raymoe.export.gguf.tensor_map import TensorMapping, map_tensor
from raymoe.export.gguf.tensor_ops import IDENTITY, TensorOp
from raymoe.sources.facts import TensorEntry

Float32 = npt.NDArray[np.float32]

_MATRICES = ("gate", "up", "down")
# Small and sensitive, as are vectors: routers and kernels of convolutions.
_ALWAYS_F32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", ".shortconv.conv.weight", ".ssm_conv1d.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """The tensor is the concatenation of `sources`, each with `op`; or `values`, repeated, if there are no sources."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    sources: tuple[TensorEntry, ...] = ()
    op: TensorOp = IDENTITY
    values: tuple[float, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.type.nbytes(math.prod(self.shape))


def file_tensors(
    spec: DenseSpec, target: Target, weights: Mapping[str, TensorEntry], wanted: TensorType
) -> tuple[GgufTensor, ...]:
    """All tensors of the file: those outside layers, then layer by layer."""
    mappings = list(_dense_mappings(spec, target, weights))
    if target.rule is not None:
        for layer in target.rule.dense_layers:
            plain = f"model.layers.{layer}.{spec.family.ffn}.plain."
            entries = {matrix: weights[plain + matrix] for matrix in _MATRICES}
            mappings += [TensorMapping(f"blk.{layer}.ffn_{m}.weight", (e,), e.shape) for m, e in entries.items()]
        for layer in target.rule.moe_layers(spec.layers):
            mlp = f"model.layers.{layer}.{spec.family.ffn}."
            mappings += _moe_mappings(f"blk.{layer}.ffn_", mlp, target.rule, target, weights)
    tensors = [
        GgufTensor(
            name=mapping.name,
            shape=mapping.shape,
            type=_type_of(mapping.name, mapping.shape, wanted),
            sources=mapping.sources,
            op=mapping.op,
        )
        for mapping in mappings
    ]
    tensors += _constants(spec, target)
    return tuple(sorted(tensors, key=_layer_of))


def _dense_mappings(spec: DenseSpec, target: Target, weights: Mapping[str, TensorEntry]) -> Iterator[TensorMapping]:
    """All tensors except a mixture's FFN."""
    for row, layer, name in spec.tensors():
        if row.is_ffn and target.rule is not None:
            continue
        yield from map_tensor(spec, target, row, layer, weights[name])
        if row.role == "embed" and spec.tied and not target.architecture.may_tie:
            yield TensorMapping("output.weight", (weights[name],), weights[name].shape)


def _moe_mappings(
    block: str, mlp: str, rule: RoutingRule, target: Target, weights: Mapping[str, TensorEntry]
) -> Iterator[TensorMapping]:
    """The tensors of a layer's MoE block."""

    def of(name: str, *sources: str) -> TensorMapping:
        entries = tuple(weights[mlp + source] for source in sources)
        return TensorMapping(block + name, entries, entries[0].shape)

    yield of("gate_inp.weight", "router")
    for matrix in _MATRICES:
        stacked = of(f"{matrix}_exps.weight", *(f"experts.{expert}.{matrix}" for expert in range(rule.experts)))
        yield stacked._replace(shape=(rule.experts, *stacked.shape))
    if not target.shared:
        return
    if rule.has_shared_gate:
        gate = of("gate_inp_shexp.weight", "shared_router")
        yield gate._replace(shape=gate.shape[-1:])  # one row, which llama.cpp has as a vector
    if target.architecture.fuses_shared:
        together = of("up_shexp.weight", "shared.gate", "shared.up")
        yield together._replace(shape=(2 * together.shape[0], together.shape[1]))
        yield of("down_shexp.weight", "shared.down")
    else:
        yield from (of(f"{matrix}_shexp.weight", f"shared.{matrix}") for matrix in _MATRICES)


def _constants(spec: DenseSpec, target: Target) -> Iterator[GgufTensor]:
    """Tensors with values that follow from the config."""
    factors = rope_factors(spec) if target.architecture.has_rope_factors else None
    if target.architecture.heads_per_kind:
        factors = _factors_of_windowless_layers(spec)
    if factors is not None:
        yield _constant_tensor("rope_freqs.weight", factors.tolist())
    if is_longrope(spec):
        for length in ("long", "short"):
            yield _constant_tensor(f"rope_factors_{length}.weight", (spec.rope_scaling or {})[f"{length}_factor"])
    if target.architecture.score_function == "sigmoid" and target.rule is not None:
        # The bias on the scores that choose experts; in a merge it is zero (`mixture_checks.check_mixture`).
        for layer in target.rule.moe_layers(spec.layers):
            yield _constant_tensor(f"blk.{layer}.exp_probs_b.bias", [0.0] * target.rule.experts)
    if target.rule is not None:
        for layer in range(spec.layers):
            for name, shape, value in target.architecture.constants(spec, target.rule.experts):
                yield GgufTensor(name=f"blk.{layer}.{name}", shape=shape, type=TYPES["f32"], values=(value,))


def _factors_of_windowless_layers(spec: DenseSpec) -> Float32:
    """Of proportional RoPE, which rotates a share of a head's pairs only: the others are divided to nothing."""
    head_dim, rope = spec.extra["global_head_dim"], spec.extra["rope_parameters"][ATTENTION]
    rotated = int(rope.get("partial_rotary_factor", 1.0) * head_dim // 2)
    return np.array([1.0] * rotated + [1e30] * (head_dim // 2 - rotated), dtype=np.float32)


def _constant_tensor(name: str, values: Sequence[float]) -> GgufTensor:
    return GgufTensor(name=name, shape=(len(values),), type=TYPES["f32"], values=tuple(values))


def _layer_of(tensor: GgufTensor) -> int:
    parts = tensor.name.split(".")
    return int(parts[1]) if parts[0] == "blk" else -1


def _type_of(name: str, shape: tuple[int, ...], wanted: TensorType) -> TensorType:
    """Vectors, routers and kernels are always f32, as in llama.cpp's own converter.

    In a 4-bit file, embedding and output matrix have 8 bits. Rows that are not a whole number of blocks are f16.
    """
    if max(shape) == math.prod(shape) or name.endswith(_ALWAYS_F32):
        return TYPES["f32"]
    if wanted.is_quantized and shape[-1] % wanted.block:
        return TYPES["f16"]
    if wanted.name == "q4_0" and name in ("token_embd.weight", "output.weight"):
        return TYPES["q8_0"]
    return wanted


def rope_factors(spec: DenseSpec) -> Float32 | None:
    """What each rotary frequency is divided by with Llama 3's scaling, (head_dim / 2,). None without it.

    Wavelengths much shorter than the original context stay, much longer ones are stretched by `factor`, and those
    between by a blend of both. Source: `_compute_llama3_parameters` in transformers' modeling_rope_utils.py.
    """
    scaling: Mapping[str, Any] | None = spec.rope_scaling
    if scaling is None or scaling["rope_type"] != "llama3":
        return None
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = spec.rope_theta ** -(np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim)
    # How many wavelengths fit into the original context. With `high` or more, a wavelength stays; with `low` or less,
    # it is stretched by the whole factor.
    original = scaling.get("original_max_position_embeddings") or spec.max_positions
    waves = original * turns / (2 * math.pi)
    kept = np.clip((waves - low) / (high - low), 0.0, 1.0)
    factors: Float32 = (1.0 / ((1.0 - kept) / scaling["factor"] + kept)).astype(np.float32)
    return factors
