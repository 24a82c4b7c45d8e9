"""Checks that models fit together, as far as configs and headers show it; all problems are collected.

An expert contributes its FFN only, so it must match the base in the FFN's properties (widths, depth, activation).
Vocabulary, heads and RoPE may differ; a warning says where the merged model would behave differently.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from raymoe.architectures import DenseSpec, find_moe_architecture, read_spec
from raymoe.architectures.mixture_config import is_mixture
from raymoe.architectures.wrappers import find_wrapper
from raymoe.errors import Problem
from raymoe.formatting import short_list
from raymoe.sources.dtypes import FLOAT_DTYPES
from raymoe.sources.facts import ModelFacts
from raymoe.sources.unwrap import parts_summary
from raymoe.tensor_names import HEAD

_NAMED = 3  # per config
# In these keys, infinity means that there is no limit: transformers writes `time_step_limit: [0.0, Infinity]`.
_MAY_BE_INFINITE = ("_limit", "_limits")


def load_spec(facts: ModelFacts, where: str) -> tuple[DenseSpec | None, list[Problem]]:
    """The model's spec, or the problems that prevent it. A separate head counts, even if config.json ties it."""
    result = read_spec(facts.config, facts.label)
    if isinstance(result, DenseSpec):
        return replace(result, tied=result.tied and not facts.own_head), []
    return None, [Problem(where=f"{where} ({p.where})", what=p.what, remedy=p.remedy) for p in result]


def whole_mixture_problem(facts: ModelFacts, where: str) -> Problem | None:
    """The problem of a mixture where one dense model is needed; None for all other models. `where`: its config key."""
    if facts.mixture is not None and facts.mixture.expert is None:
        what, experts = f"this is a {facts.mixture.title}", facts.mixture.experts
    elif facts.mixture is None and (architecture := find_moe_architecture(facts.config)) and is_mixture(facts.config):
        experts = architecture.entry(facts.config, architecture.experts_key)[1]
        what = f"this is a {architecture.title} mixture of {experts!r:.20} experts"
    else:
        return None
    last = f" (up to {experts - 1})" if isinstance(experts, int) and experts > 1 else ""
    remedy = f"write expert: 0{last} beside source_model to use the FFNs of one of its experts"
    return Problem(where=f"{where} ({facts.label})", what=f"{what}, but no expert is named", remedy=remedy)


def are_of_one_family(facts: ModelFacts, spec: DenseSpec, other: ModelFacts, other_spec: DenseSpec) -> bool:
    """Whether two models have FFNs of one dense family. A mixture's are those of all families that it takes."""
    return bool(_families(facts, spec) & _families(other, other_spec))


def _families(facts: ModelFacts, spec: DenseSpec) -> frozenset[str]:
    return frozenset([spec.model_type, *(facts.mixture.families if facts.mixture else ())])


def is_tied_by_config(facts: ModelFacts) -> bool:
    """True if config.json ties the embedding to the output head, explicitly or by its family's default."""
    result = read_spec(facts.config, facts.label)
    return isinstance(result, DenseSpec) and result.tied


def check_expert(
    base: DenseSpec, expert: DenseSpec, where: str, *, allow_crimes: bool, are_of_one_family: bool = False
) -> list[Problem]:
    """Problems that prevent this expert's FFN from replacing the base's. `are_of_one_family`: one of the two is of a
    mixture that takes experts of the other's family."""
    problems = []
    if are_of_one_family:
        pass
    elif expert.model_type != base.model_type and not allow_crimes:
        what = f"model_type is {expert.model_type!r}, but the base's is {base.model_type!r}"
        remedy = "use models of one type, or --allow-crimes if their FFNs are meant to be alike"
        problems.append(Problem(where=where, what=what, remedy=remedy))
    elif expert.model_type != base.model_type and ffn_names(expert) != ffn_names(base):
        what = f"a {expert.model_type} model stores its FFN differently from a {base.model_type} model"
        problems.append(Problem(where=where, what=what, remedy="use models of one type"))
    for key, name in (
        ("layers", "num_hidden_layers"),
        ("hidden", "hidden_size"),
        ("intermediate", "intermediate_size"),
        ("hidden_act", "hidden_act"),
        ("mlp_bias", "mlp_bias"),
    ):
        got, expected = getattr(expert, key), getattr(base, key)
        if got != expected:
            what = f"{name} is {got}, but the base's is {expected}"
            remedy = "experts must have the base's depth, widths and activation; use fine-tunes of the same model"
            problems.append(Problem(where=where, what=what, remedy=remedy))
    if not problems and expert.ffn_widths != base.ffn_widths:
        what = "some of its layers have an FFN of another width than the base's (use_double_wide_mlp)"
        problems.append(Problem(where=where, what=what, remedy="use fine-tunes of the same model"))
    return problems


def ffn_names(spec: DenseSpec) -> list[str]:
    """Names of an FFN's weights. Biases are left out: they are compared separately."""
    return [row.name for row in spec.rows() if row.is_ffn and not row.role.endswith(".bias")]


def expert_warnings(base: DenseSpec, expert: DenseSpec, where: str, *, are_of_one_family: bool = False) -> list[str]:
    """Differences that are lost in the merged model, which has the base's attention and embeddings.
    `are_of_one_family` as for `check_expert`."""
    warnings = []
    if expert.model_type != base.model_type and not are_of_one_family:
        warnings.append(
            f"{where}: its FFNs are those of a {expert.model_type} model, in the layers of a {base.model_type} model"
        )
    if (expert.rope_theta, expert.rope_scaling) != (base.rope_theta, base.rope_scaling):
        warnings.append(f"{where}: its RoPE settings differ from the base's; the base's are used")
    if (expert.kinds, expert.sliding_window, expert.sliding_layers) != (
        base.kinds,
        base.sliding_window,
        base.sliding_layers,
    ):
        warnings.append(f"{where}: its layers have other attention or windows than the base's, which are used")
    same = expert.extra.keys() & base.extra.keys()
    if other := sorted(key for key in same if expert.extra[key] != base.extra[key]):
        warnings.append(f"{where}: {', '.join(other)} differ from the base's, which are used")
    if expert.vocab != base.vocab:
        warnings.append(
            f"{where}: its vocabulary has {expert.vocab} tokens, the base's {base.vocab}; the base's is used"
        )
    if expert.max_positions != base.max_positions:
        warnings.append(
            f"{where}: max_position_embeddings {expert.max_positions} differs from the base's {base.max_positions}, "
            "which is used"
        )
    if expert.rms_norm_eps != base.rms_norm_eps:
        warnings.append(f"{where}: rms_norm_eps {expert.rms_norm_eps} differs from the base's {base.rms_norm_eps}")
    return warnings


def text_part_warnings(facts: ModelFacts, where: str, *, is_text_base: bool = False) -> list[str]:
    """What a mixture leaves out of an image-text model, and of an adapter of one. `is_text_base`: it is the base of a
    mixture that reads text only."""
    warnings = []
    if is_text_base and facts.rest and (wrapper := find_wrapper(facts.wrapper_config)):
        title = wrapper.title
        warnings.append(
            f"{where} ({facts.label}): the mixture has the text model of this {title} checkpoint only. Left out: "
            f"{parts_summary(facts.rest)}"
        )
    if facts.adapter and facts.adapter.outside:
        parts = short_list(list(dict.fromkeys(facts.adapter.outside.values())))
        warnings.append(
            f"{where}: its adapter {facts.adapter.label} also changes {parts} ({len(facts.adapter.outside)} tensors). "
            "These changes are not in the merge: an adapter is applied to the text model only"
        )
    return warnings


def check_tensors(facts: ModelFacts, spec: DenseSpec, where: str, *, ffn_only: bool) -> list[Problem]:
    """Problems of missing tensors, shapes that differ from the config, and tensors that no row of the table names."""
    label = f"{where} ({facts.label})"
    expected = {name: (row, spec.shape_of(row)) for row, _, name in spec.tensors()}
    needed = {name: shape for name, (row, shape) in expected.items() if (facts.has_ffn if row.is_ffn else not ffn_only)}
    tensors = facts.index.tensors
    problems = []
    missing = [name for name in needed if name not in tensors]
    if missing:
        what = f"{len(missing)} tensor(s) missing: {short_list(missing)}"
        remedy = "the checkpoint must hold what its config.json describes"
        if missing == [HEAD]:
            remedy = "set tie_word_embeddings: true in its config.json if the model ties its embeddings"
        problems.append(Problem(where=label, what=what, remedy=remedy))
    wrong = [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in needed.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if wrong:
        what = (
            f"{len(wrong)} tensor(s) with a shape that config.json does not give: {short_list(wrong, separator='; ')}"
        )
        remedy = "weights and config.json must be of the same model"
        if all(0 in tensors[name].shape for name in needed if name in tensors and tensors[name].shape != needed[name]):
            remedy = "DeepSpeed's ZeRO-3 leaves empty tensors: save the model again with gathered weights"
        problems.append(Problem(where=label, what=what, remedy=remedy))
    dtypes = sorted({tensors[n].dtype for n in needed if n in tensors and tensors[n].dtype not in FLOAT_DTYPES})
    if dtypes:
        remedy = "use an unquantized checkpoint (bfloat16, float16 or float32)"
        problems.append(Problem(where=label, what=f"weights of type {', '.join(dtypes)}", remedy=remedy))
    unmapped = _unmapped(facts, spec, expected.keys())
    if unmapped:
        what = f"{len(unmapped)} tensor(s) that a {spec.model_type} model does not have: {short_list(unmapped)}"
        remedy = "raymoe never drops a weight silently; is config.json the right one for this checkpoint?"
        problems.append(Problem(where=label, what=what, remedy=remedy))
    return problems


def _unmapped(facts: ModelFacts, spec: DenseSpec, known: object) -> list[str]:
    return [n for n in facts.index.tensors if n not in known and not spec.ignores(n)]  # type: ignore[operator]


def find_non_finite(models: Mapping[str, ModelFacts]) -> Iterator[tuple[str, str]]:
    """(where, what) for each number of `models`' configs that is NaN or infinite, by the model's place in the
    config."""
    for place, facts in models.items():
        found = list(_non_finite(facts.config, ""))
        for key, value in found[:_NAMED]:
            yield f"{place} ({facts.label})", f"{key} in its config.json is {'NaN' if math.isnan(value) else value}"
        if len(found) > _NAMED:
            yield (
                f"{place} ({facts.label})",
                f"{len(found) - _NAMED} more numbers in its config.json are not finite",
            )


def _non_finite(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value) or not key.partition("[")[0].endswith(_MAY_BE_INFINITE):
            yield key, value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _non_finite(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _non_finite(each, f"{key}[{number}]")
