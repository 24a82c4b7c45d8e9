"""Dense models and mixtures as tables of weights that `StreamedDecoder` can load.

A mixture is a dense decoder with another module in place of the FFN. So its weights have dense names, and weights of
the MoE block are under the FFN's name (`mlp.` in most families):

    mlp.experts.3.gate   mlp.experts.3.up   mlp.experts.3.down   mlp.router     (experts that are stored transposed:
    mlp.experts.3.gate_up_t                 mlp.experts.3.down_t                 columns of gate, then those of up)
    mlp.shared.gate      mlp.shared.up      mlp.shared.down      mlp.shared_router
    mlp.plain.gate       mlp.plain.up       mlp.plain.down       (layers without experts: their FFN, and nothing else)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from raymoe.architectures import FAMILIES, DenseSpec, MoeArchitecture, find_moe_architecture, read_spec
from raymoe.architectures.mixture_config import NoDenseModel, dense_config
from raymoe.architectures.moe_architecture import PER_TOKEN_KEY
from raymoe.architectures.rope import rope_value_problems
from raymoe.errors import Problem, ProblemReport, first_few
from raymoe.planning.compatibility import check_tensors, load_spec
from raymoe.planning.plan import HeadPermutation, WeightRef
from raymoe.planning.tensor_sources import adapter_problems, head_permutation, weight_refs
from raymoe.sources.dtypes import FLOAT_DTYPES
from raymoe.sources.facts import ModelFacts, TensorEntry, slice_rows
from raymoe.sources.mixture import ffn_entries

TRANSPOSED = ("gate_up_t", "down_t")
"""The names of an expert's weights if they are stored transposed: gate and up (hidden, 2 * width), down (width,
hidden)."""
_FUSED = "experts.gate_up_proj"
_EXPERT_WEIGHT = re.compile(r"\.experts\.(\d+)\.")
# The most experts in all layers together, if those of a layer are in one tensor. (If each has its own tensors, there
# are no more experts than tensors.) The largest mixtures have 60,000.
_MAX_FUSED = 200_000
_NAMED = 4  # of many missing tensors
_REMEDY = "name a merge as raymoe wrote it"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRule:
    """How a MoE architecture turns router scores into weights: `score_function` of all experts (softmax or sigmoid),
    then the highest `per_token` of them, made to sum to one if it `renormalizes`; a single one only if it
    `renormalizes_one`. `has_shared_gate`: the shared expert is weighted by the sigmoid of its own gate.
    `router_factor`: rows of the router are multiplied by it in the file.
    `dense_layers`: the layers without experts. `granularity`: how many experts are parts of one source's FFN, as its
    record says; they follow each other."""

    experts: int
    per_token: int
    renormalizes: bool
    has_shared_expert: bool
    has_shared_gate: bool
    activation: str
    score_function: str = "softmax"
    router_factor: float = 1.0
    renormalizes_one: bool = True
    dense_layers: tuple[int, ...] = ()
    granularity: int = 1

    @property
    def sources_per_token(self) -> int:
        """How many sources' FFNs work on a token, before any training."""
        return max(1, self.per_token // self.granularity)

    def moe_layers(self, layers: int) -> list[int]:
        """Those of `layers` layers that have experts."""
        return [layer for layer in range(layers) if layer not in self.dense_layers]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointModel:
    """A model to be streamed. `config` is a dense config.json; `rule` is None for a dense model.

    `head_permutation`: the order of the rows of q and k, if it is not that of the dense family.
    """

    label: str
    spec: DenseSpec
    config: Mapping[str, Any]
    weights: Mapping[str, WeightRef]
    rule: RoutingRule | None = None
    head_permutation: HeadPermutation | None = None


def dense_model(facts: ModelFacts, where: str) -> CheckpointModel:
    """A whole dense model, LoRA included. Raises ProblemReport if its files do not hold what its config says."""
    spec, problems = load_spec(facts, where)
    if spec is not None:
        problems += check_tensors(facts, spec, where, ffn_only=False)
        problems += adapter_problems(facts, spec, where, ffn_only=False)
    if problems or spec is None:
        raise ProblemReport(problems)
    is_permuted = facts.mixture is not None and facts.mixture.has_permuted_heads
    return CheckpointModel(
        label=facts.label,
        spec=spec,
        config=facts.config,
        weights=weight_refs(facts, spec),
        head_permutation=HeadPermutation(head_dim=spec.head_dim, rotary_dim=spec.rotary_dim) if is_permuted else None,
    )


def mixture_model(facts: ModelFacts) -> CheckpointModel:
    """A merged checkpoint. Raises ProblemReport if it has no architecture that raymoe writes, or lacks tensors."""
    found = find_moe_architecture(facts.config)
    if found is None:
        what = f"model_type is {facts.config.get('model_type')!r}, which is not a mixture that raymoe writes"
        raise ProblemReport([Problem(where=f"{facts.label}/config.json", what=what, remedy=_REMEDY)])
    architecture = found.as_stored(facts.index.tensors)
    # `read_spec` checks the dense config only, and not all keys that are read here.
    odd_values = rope_value_problems(facts.config, FAMILIES[architecture.dense_family].rope_kinds)
    where = f"{facts.label}/config.json"
    if problems := first_few(Problem(where=where, what=w, remedy=f"expected {expected}") for w, expected in odd_values):
        raise ProblemReport(problems)
    try:
        config = dense_config(architecture, facts.config)
    except NoDenseModel as missing:
        what = f"{missing}: no dense model has this attention to evaluate it with"
        raise ProblemReport([Problem(where=where, what=what)]) from None
    spec = read_spec(config, facts.label)
    if not isinstance(spec, DenseSpec):
        raise ProblemReport(spec)
    spec = replace(spec, tied=spec.tied and not facts.own_head)
    if bad_settings := sorted({row.role for row in spec.rows() if not row.is_ffn} - architecture.backbone.keys()):
        what = f"its config.json gives it {', '.join(bad_settings)}, which no merge has"
        raise ProblemReport([Problem(where=facts.label, what=what, remedy=_REMEDY)])
    rule = _routing_rule(architecture, facts, spec)
    tensors = facts.index.tensors
    if fault := _too_many_experts(architecture, spec, rule, tensors) or _missing_tensors(
        architecture, spec, rule, tensors
    ):
        raise ProblemReport([Problem(where=facts.label, what=fault, remedy=_REMEDY)])
    entries = dict(_entries(architecture, spec, rule, tensors))
    if bad_settings := sorted({entry.dtype for entry in entries.values()}.difference(FLOAT_DTYPES)):
        raise ProblemReport(
            [Problem(where=facts.label, what=f"weights of type {', '.join(bad_settings)}", remedy=_REMEDY)]
        )
    weights = {name: WeightRef(entry=entry) for name, entry in entries.items()}
    return CheckpointModel(
        label=facts.label,
        spec=spec,
        config=config,
        weights=weights,
        rule=rule,
        head_permutation=head_permutation(spec, architecture),
    )


def active_parameters(facts: ModelFacts, model: CheckpointModel, per_token: int) -> int:
    """Parameters that a mixture uses for a token if `per_token` experts work on it. Counted as in a merge's record."""
    idle = (
        math.prod(ref.entry.shape)
        for name, ref in model.weights.items()
        if (found := _EXPERT_WEIGHT.search(name)) is not None and int(found[1]) >= per_token
    )
    return sum(math.prod(entry.shape) for entry in facts.index.tensors.values()) - sum(idle)


def _routing_rule(architecture: MoeArchitecture, facts: ModelFacts, spec: DenseSpec) -> RoutingRule:
    config = facts.config
    (experts_key, experts), (per_token_key, per_token) = (
        architecture.entry(config, key) for key in (architecture.experts_key, PER_TOKEN_KEY)
    )
    if not isinstance(experts, int) or not isinstance(per_token, int) or not 1 <= per_token <= experts:
        what = f"{experts_key} is {experts!r} and {per_token_key} is {per_token!r}"
        raise ProblemReport([Problem(where=f"{facts.label}/config.json", what=what, remedy=_REMEDY)])
    # A softmax over the chosen experts, as in Mixtral, equals one over all experts that is made to sum to one again.
    renormalizes = not architecture.renormalize_key or bool(config.get(architecture.renormalize_key))
    return RoutingRule(
        experts=experts,
        per_token=per_token,
        renormalizes=renormalizes,
        has_shared_expert=bool(architecture.shared)
        and (not architecture.shared_key or bool(config.get(architecture.shared_key))),
        has_shared_gate=bool(architecture.shared_router),
        activation=spec.hidden_act,
        score_function=architecture.score_function,
        router_factor=architecture.router_factor(spec.hidden),
        renormalizes_one=architecture.renormalizes_one,
        dense_layers=_dense_layers(architecture, facts, spec),
    )


def _dense_layers(architecture: MoeArchitecture, facts: ModelFacts, spec: DenseSpec) -> tuple[int, ...]:
    """The layers without experts. Raises ProblemReport for values that no configuration class accepts."""
    try:
        chosen = set(architecture.moe_layers(facts.config))
    except TypeError:
        chosen = set()
    if not chosen:
        what = "its config.json gives experts to no layer, or says so in a form that is not known"
        raise ProblemReport([Problem(where=f"{facts.label}/config.json", what=what, remedy=_REMEDY)])
    return tuple(layer for layer in range(spec.layers) if layer not in chosen)


def _output_names(architecture: MoeArchitecture, spec: DenseSpec, rule: RoutingRule) -> Iterator[str]:
    """Every tensor that the checkpoint must have."""
    for row, layer, _ in spec.tensors():
        if not row.is_ffn:
            yield architecture.backbone[row.role].format(layer=layer)
    if architecture.layer_rule is not None:
        for layer in rule.dense_layers:
            yield from (name.format(layer=layer) for name in architecture.layer_rule.ffn.values())
    for layer in rule.moe_layers(spec.layers):
        yield architecture.router.format(layer=layer)
        for name in architecture.expert.values():
            each = range(rule.experts) if "{expert}" in name else (0,)  # or all experts of a layer in one tensor
            yield from (name.format(layer=layer, expert=expert) for expert in each)
        if rule.has_shared_expert:
            yield from (name.format(layer=layer) for name in architecture.shared.values())
            if rule.has_shared_gate:
                yield architecture.shared_router.format(layer=layer)


def _too_many_experts(
    architecture: MoeArchitecture, spec: DenseSpec, rule: RoutingRule, tensors: Mapping[str, TensorEntry]
) -> str | None:
    """A problem if the tensors can't hold the number of experts in config.json, which may be any number."""
    if _find_fused_tensor(architecture, tensors):
        return None
    layers = rule.moe_layers(spec.layers)
    what = f"config.json gives {rule.experts} experts to each of {len(layers)} layers"
    if not architecture.is_fused:
        # Each expert has a tensor at least in each layer.
        fits = rule.experts * len(layers) <= len(tensors)
        return None if fits else f"{what}, which {len(tensors)} tensors can't hold"
    if rule.experts * len(layers) > _MAX_FUSED:
        return f"{what} (at most {_MAX_FUSED:,} in all)"
    names = (name.format(layer=layer) for layer in layers for name in sorted({*architecture.expert.values()}))
    for name in names:
        shape = tensors[name].shape if name in tensors else (rule.experts, 1, 1)
        if len(shape) != 3 or shape[0] != rule.experts or 0 in shape:
            return f"{what}, and {name} has the shape {list(shape)}"
    return None


def _missing_tensors(
    architecture: MoeArchitecture, spec: DenseSpec, rule: RoutingRule, tensors: Mapping[str, TensorEntry]
) -> str | None:
    """The message for missing tensors, with the reason if transformers 5 has renamed the experts."""
    missing = (name for name in _output_names(architecture, spec, rule) if name not in tensors)
    first = list(islice(missing, _NAMED))
    if not first:
        return None
    if fused := _find_fused_tensor(architecture, tensors):
        how = "transformers saves them so with save_original_format=False"
        return f"all experts of a layer are in one tensor ({fused}): {how}"
    return f"{len(first) + sum(1 for _ in missing)} tensor(s) missing: {', '.join(first)}"


def _find_fused_tensor(architecture: MoeArchitecture, tensors: Mapping[str, TensorEntry]) -> str | None:
    """A tensor with all experts of a layer, if the architecture has one tensor per expert."""
    if any(name.endswith(_FUSED) for name in architecture.expert.values()):
        return None
    return next((name for name in tensors if name.endswith(_FUSED)), None)


def _entries(
    architecture: MoeArchitecture, spec: DenseSpec, rule: RoutingRule, tensors: Mapping[str, TensorEntry]
) -> Iterator[tuple[str, TensorEntry]]:
    """(name, location) of everything that is loaded."""
    for row, layer, name in spec.tensors():
        if not row.is_ffn:
            yield name, tensors[architecture.backbone[row.role].format(layer=layer)]
    if architecture.layer_rule is not None:
        for layer in rule.dense_layers:
            for role, entry in ffn_entries(architecture.layer_rule.ffn, tensors, layer, 0):
                yield f"model.layers.{layer}.{spec.family.ffn}.plain.{role}", entry
    for layer in rule.moe_layers(spec.layers):
        prefix = f"model.layers.{layer}.{spec.family.ffn}."
        yield f"{prefix}router", tensors[architecture.router.format(layer=layer)]
        for expert in range(rule.experts):
            of_expert = _transposed_ffn if architecture.transposes_experts else ffn_entries
            for role, entry in of_expert(architecture.expert, tensors, layer, expert):
                yield f"{prefix}experts.{expert}.{role}", entry
        if rule.has_shared_expert:
            for role, entry in ffn_entries(architecture.shared, tensors, layer, 0):
                yield f"{prefix}shared.{role}", entry
            if rule.has_shared_gate:
                yield f"{prefix}shared_router", tensors[architecture.shared_router.format(layer=layer)]


def _transposed_ffn(
    names: Mapping[str, str], tensors: Mapping[str, TensorEntry], layer: int, expert: int
) -> Iterator[tuple[str, TensorEntry]]:
    """(gate_up_t or down_t, its entry) of one expert. The tensors hold all experts of a layer."""
    for name, role in ((TRANSPOSED[0], "ffn.gate"), (TRANSPOSED[1], "ffn.down")):
        entry = tensors[names[role].format(layer=layer)]
        _, rows, width = entry.shape
        flat = replace(entry, shape=(entry.shape[0] * rows, width))
        yield name, slice_rows(flat, expert * rows, (expert + 1) * rows)
