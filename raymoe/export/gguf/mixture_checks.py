"""Checks that raymoe can have written a mixture. One that a GGUF file can't represent exactly is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from math import isclose
from typing import Any

import numpy as np

from raymoe.architectures import MoeShape, find_moe_architecture
from raymoe.architectures.rope import is_number
from raymoe.checkpoints.weight_table import CheckpointModel
from raymoe.errors import Problem, ProblemReport
from raymoe.export.gguf.choose_target import UNCHANGED_REMEDY
from raymoe.sources.facts import ModelFacts, TensorEntry
from raymoe.storage.transform import NUMPY_DTYPES

ReadChunks = Callable[[TensorEntry], Iterator[memoryview]]
"""The bytes of a tensor in order; each chunk is valid until the next one is asked for."""

# The bias that ERNIE, GLM and DeepSeek add to router scores for the choice of experts. In a merge it is 0.
_SCORE_BIAS = "e_score_correction_bias"
# Settings of mixtures that raymoe writes with these values, or not at all. LFM2's factor, at most 1.000002, compensates
# for a number that transformers adds to a sum and llama.cpp does not.
_NEUTRAL_VALUES = {"routed_scaling_factor": 1.0, "n_group": 1}
_TOLERANCE = 3e-6
# Keys of a MoE config that need no check: the dense model or `_shapes` covers them, or they do not affect the
# probabilities of tokens.
_CHECKED_KEYS = frozenset(
    {
        *("attention_bias", "head_dim", "layer_types", "partial_rotary_factor", "rope_parameters", "rope_scaling"),
        *("max_window_layers", "sliding_window", "use_qk_norm", "use_sliding_window"),
        *("attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier", "layer_rope_theta"),
        *("layer_norm_eps", "norm_eps", "moe_intermediate_size", "n_shared_experts", "num_shared_experts"),
        *("shared_expert_intermediate_size", "shared_intermediate_size"),
        *("auto_map", "num_nextn_predict_layers", "output_router_logits"),
    }
)
_MAX_SHOWN = 4


def is_zero(entry: TensorEntry, chunks: ReadChunks) -> bool:
    """Whether every number of a tensor is zero. Stops reading at the first other number."""
    return not any(np.frombuffer(chunk, dtype=np.uint8).any() for chunk in chunks(entry))


def check_mixture(facts: ModelFacts, model: CheckpointModel, chunks: ReadChunks) -> None:
    """Raises ProblemReport if a file could not represent this mixture exactly.

    A bias of zeros on router scores may be left out. Tensors, sizes and settings that raymoe does not write are
    refused. A setting that the config leaves out counts as the value that raymoe writes.
    """
    used, implied = {ref.entry.name for ref in model.weights.values()}, _implied_tensors(facts, model)
    left = []
    for name, entry in sorted(facts.index.tensors.items()):
        if name in used or model.spec.ignores(name):
            continue
        if not _is_implied(name, entry, implied, facts, chunks):
            left.append(name)
    found = [f"{len(left)} tensor(s) can't be written to the file: {', '.join(left[:4])}"] if left else []
    for name, expected in _shapes(model):
        if (shape := model.weights[name].entry.shape) != expected:
            found.append(f"{model.weights[name].entry.name} has shape {shape}, expected {expected}")
    for key, written in _expected_settings(facts, model).items():
        value = facts.config.get(key)
        if value is not None and not _matches(value, written):
            found.append(f"{key} is {json.dumps(value):.80}, and only {json.dumps(written):.80} is converted")
    if found:
        raise ProblemReport(
            [Problem(where=facts.label, what=what, remedy=UNCHANGED_REMEDY) for what in found[:_MAX_SHOWN]]
        )


def _implied_tensors(facts: ModelFacts, model: CheckpointModel) -> dict[str, float | str]:
    """Tensors that follow from others or from the config, by name: all their numbers, or the tensor with the same."""
    rule, architecture = model.rule, find_moe_architecture(facts.config)
    assert rule is not None and architecture is not None
    rows = architecture.constants(model.spec, MoeShape(experts=rule.experts, experts_per_token=rule.per_token))
    found: dict[str, float | str] = {}
    for layer in range(model.spec.layers):
        for role, names in architecture.copies.items():
            found |= {name.format(layer=layer): architecture.backbone[role].format(layer=layer) for name in names}
        has_experts = layer not in rule.dense_layers
        found |= {row.name.format(layer=layer): row.value for row in rows if has_experts or row.is_of_attention}
    return found


def _is_implied(
    name: str, entry: TensorEntry, implied: Mapping[str, float | str], facts: ModelFacts, chunks: ReadChunks
) -> bool:
    """Whether a tensor holds what raymoe writes there."""
    if name.endswith(_SCORE_BIAS):
        return is_zero(entry, chunks)
    expected = implied.get(name)
    if expected is None or entry.dtype not in NUMPY_DTYPES:
        return False
    if isinstance(expected, str):
        return b"".join(chunks(entry)) == b"".join(chunks(facts.index.tensors[expected]))
    value = np.array(expected, dtype=NUMPY_DTYPES[entry.dtype])
    return all((np.frombuffer(chunk, dtype=value.dtype) == value).all() for chunk in chunks(entry))


def _expected_settings(facts: ModelFacts, model: CheckpointModel) -> dict[str, Any]:
    """The config keys that change what transformers computes, with the values that raymoe writes."""
    rule, architecture = model.rule, find_moe_architecture(facts.config)
    assert rule is not None and architecture is not None
    shape = MoeShape(experts=rule.experts, experts_per_token=rule.per_token, shared=int(rule.has_shared_expert))
    # `choose_target` checks the keys of the routing rule.
    read = _CHECKED_KEYS | {architecture.experts_key, architecture.shared_key, architecture.renormalize_key}
    switches = {key: value for key, value in architecture.config(model.spec, shape).items() if key not in read}
    if not rule.has_shared_expert:
        switches.pop("shared_expert_combination_strategy", None)
    return {**switches, **_NEUTRAL_VALUES}


def _matches(value: Any, written: Any) -> bool:
    numbers = is_number(value) and is_number(written)
    return isclose(value, written, rel_tol=_TOLERANCE) if numbers else bool(value == written)


def _shapes(model: CheckpointModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, required shape) of each tensor. The first expert sets the width of experts."""
    spec, rule = model.spec, model.rule
    assert rule is not None
    for row, _, name in spec.tensors():
        if not row.is_ffn:
            yield name, spec.shape_of(row)
    for layer in rule.dense_layers:
        prefix = f"model.layers.{layer}.{spec.family.ffn}.plain"
        inner = model.weights[f"{prefix}.up"].entry.shape[0]
        yield f"{prefix}.gate", (inner, spec.hidden)
        yield f"{prefix}.down", (spec.hidden, inner)
    first, *_ = layers = rule.moe_layers(spec.layers)
    width = model.weights[f"model.layers.{first}.{spec.family.ffn}.experts.0.up"].entry.shape[0]
    for layer in layers:
        prefix = f"model.layers.{layer}.{spec.family.ffn}."
        yield f"{prefix}router", (rule.experts, spec.hidden)
        for expert in range(rule.experts):
            yield f"{prefix}experts.{expert}.gate", (width, spec.hidden)
            yield f"{prefix}experts.{expert}.up", (width, spec.hidden)
            yield f"{prefix}experts.{expert}.down", (spec.hidden, width)
