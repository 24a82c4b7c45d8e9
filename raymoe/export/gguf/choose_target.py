"""Chooses the llama.cpp architecture that a model is written for, or gives every reason why there is none.

The architectures are rows of `llama_cpp_archs.ARCHITECTURES`. Code here never compares names of architectures or
families: their differences are fields of the row.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from raymoe.architectures import DenseSpec
from raymoe.architectures.rope import original_length, yarn_magnitude, yarn_magnitude_ratio
from raymoe.architectures.tensor_tables import ATTENTION
from raymoe.checkpoints.weight_table import RoutingRule
from raymoe.errors import Problem, ProblemReport
from raymoe.export.gguf.llama_cpp_archs import ARCHITECTURES, BY_FAMILY, DENSE, LlamaCppArchitecture
from raymoe.formatting import number_ranges

MAX_EXPERTS = 512  # LLAMA_MAX_EXPERTS in llama.cpp's src/llama-hparams.h

# Kinds of RoPE scaling that can be written, and the settings that are written for each.
_ROPE_KEYS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "linear": frozenset({"factor"}),
        "dynamic": frozenset({"factor"}),
        "yarn": frozenset({"factor", "original_max_position_embeddings"}),
        "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        "longrope": frozenset(
            {"short_factor", "long_factor", "factor", "attention_factor", "original_max_position_embeddings"}
        ),
    }
)
# Kinds whose factor may be left out: that of longrope follows from the lengths.
_WITHOUT_FACTOR = ("longrope",)
# Settings that may have only these values, which llama.cpp has too.
_ROPE_DEFAULTS: Mapping[str, object] = MappingProxyType(
    {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None}
)
# What the floats of a GGUF file's metadata hold, and keys of configs that are written as such.
_LARGEST_REAL = 3.4028234663852886e38
_REALS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "logit_scale")

UNCHANGED_REMEDY = "convert a merge as raymoe wrote it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The architecture that a model is written for.

    Attributes:
        architecture: The architecture.
        context: The longest text, in tokens, for which it computes what the model computes.
        rule: How the model turns router scores into weights. None for a dense model.
        permutes_heads: Rows of q and k are permuted within each head.
        shared: A shared expert is written.
        warnings: Where the file differs from the model.
    """

    architecture: LlamaCppArchitecture
    context: int
    rule: RoutingRule | None
    permutes_heads: bool
    shared: bool
    warnings: tuple[str, ...] = ()


def choose_target(spec: DenseSpec, rule: RoutingRule | None, *, shared_is_empty: bool, label: str) -> Target:
    """Raises ProblemReport with every reason why llama.cpp can't compute this model."""
    shared = rule is not None and rule.has_shared_expert
    architecture = (
        DENSE[spec.model_type] if rule is None else _mixture(spec, rule, shared=shared and not shared_is_empty)
    )
    if isinstance(architecture, _Reason):
        raise ProblemReport([Problem(where=label, what=architecture.what, remedy=architecture.remedy)])
    reasons = [*_feature_reasons(spec, architecture), *_rope_reasons(spec, architecture), *_number_reasons(spec)]
    if rule is not None and rule.experts > MAX_EXPERTS:
        reasons.append(f"{rule.experts} experts: at most {MAX_EXPERTS}")
    if rule is not None and rule.dense_layers:
        reasons += _dense_layer_reasons(rule.dense_layers, architecture)
    if rule is not None and rule.score_function != architecture.score_function:
        reasons.append(f"router scores by {rule.score_function}: it has {architecture.score_function}")
    if reasons:
        what = f"llama.cpp's architecture for it, {architecture.name}, can't hold this model: {'; '.join(reasons)}"
        raise ProblemReport([Problem(where=label, what=what, remedy="run it with transformers, vLLM or SGLang")])
    context, warnings = _context(spec, architecture)
    return Target(
        architecture=architecture,
        context=context,
        rule=rule,
        permutes_heads=architecture.rope_is_interleaved and not _rope_is_interleaved(spec),
        shared=shared and (architecture.needs_shared or not shared_is_empty),
        warnings=tuple(warnings),
    )


def _dense_layer_reasons(layers: Sequence[int], architecture: LlamaCppArchitecture) -> Iterator[str]:
    if not architecture.may_begin_dense:
        yield f"layers without experts ({number_ranges(layers)}): all of its layers have experts"
    elif layers[-1] != len(layers) - 1:
        yield f"layers without experts ({number_ranges(layers)}): only its first layers may have none"


def _rope_is_interleaved(spec: DenseSpec) -> bool:
    """Whether RoPE is interleaved in transformers too (`rotate_half` in its modeling files). Some configs set it."""
    return bool(spec.extra.get("rope_interleave", spec.family.rope_is_interleaved))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reason:
    """The reason why no architecture fits."""

    what: str
    remedy: str = "run it with transformers, vLLM or SGLang"


def _mixture(spec: DenseSpec, rule: RoutingRule, *, shared: bool) -> LlamaCppArchitecture | _Reason:
    """The architecture of the family's merges, or the one with this merge's features.

    Weights over all experts sum to one in any case.
    """
    sums_to_one = rule.renormalizes or rule.per_token == rule.experts
    unequal = f"the weights of each token's {rule.per_token} experts do not sum to one"
    of_family = BY_FAMILY.get(spec.model_type)
    if of_family is None:
        found = _by_routing(spec, rule, unequal, sums_to_one=sums_to_one, shared=shared)
        return found if isinstance(found, _Reason) else ARCHITECTURES[found]
    if shared and of_family.averages_shared:
        what = f"it adds up its shared expert and the others; llama.cpp's {of_family.name} takes the mean of both"
        return _Reason(what=what, remedy="merge without shared_experts")
    if not sums_to_one:
        return _Reason(what=f"{unequal}, as a merge's do", remedy=UNCHANGED_REMEDY)
    return ARCHITECTURES[of_family.attention_only] if of_family.attention_only and _is_plain(spec) else of_family


def _is_plain(spec: DenseSpec) -> bool:
    """Whether all layers have attention with RoPE."""
    return set(spec.kinds) == {ATTENTION} and spec.extra.get("position_embedding_type", "rope") == "rope"


def _by_routing(spec: DenseSpec, rule: RoutingRule, unequal: str, *, sums_to_one: bool, shared: bool) -> str | _Reason:
    """The name of the architecture that turns router scores into weights as this merge does."""
    if rule.score_function == "sigmoid":
        return "glm4moe"
    if shared and rule.has_shared_gate:
        if sums_to_one and rule.per_token != rule.experts:
            what = (
                f"it has a shared expert with a gate, and the weights of each token's {rule.per_token} experts sum to "
                f"one (norm_topk_prob); llama.cpp has no architecture for both"
            )
            remedy = f"merge without shared_experts, or with experts_per_token: {rule.experts}"
            return _Reason(what=what, remedy=remedy)
        return "qwen2moe"
    if shared:
        return "bailingmoe"
    if not sums_to_one:
        return _Reason(what=f"{unequal}, and there is no shared expert; llama.cpp has no architecture for both")
    return "qwen3moe" if spec.qk_norm else "llama"


def _feature_reasons(spec: DenseSpec, architecture: LlamaCppArchitecture) -> Iterator[str]:
    if spec.hidden_act != architecture.activation:
        yield f"activation {spec.hidden_act!r}: it has {architecture.activation}"
    for model_has_it, has_it, where in (
        (spec.qkv_bias, architecture.has_qkv_bias, "q, k and v"),
        (spec.o_bias, architecture.has_o_bias, "attention's output"),
        (spec.mlp_bias, architecture.has_mlp_bias, "the FFN"),
    ):
        if model_has_it and not has_it:
            yield f"a bias on {where}: it has none"
    if spec.extra.get("conv_bias"):
        yield "a bias on convolutions: it has none"
    if spec.partial_rotary != 1.0 and not architecture.has_partial_rotary:
        yield f"partial rotary embedding ({spec.partial_rotary:g} of each head): it rotates whole heads only"
    if len(set(spec.layer_types)) == 1 and spec.model_type in architecture.families:
        yield f"all layers of one kind, {spec.layer_types[0]}: it has two"
    yield from architecture.unsupported_reasons(spec)
    if spec.explicit_head_dim and not architecture.has_head_dim:
        yield f"head_dim {spec.head_dim}: it is always hidden_size / num_attention_heads"


def _rope_reasons(spec: DenseSpec, architecture: LlamaCppArchitecture) -> Iterator[str]:
    if spec.rope_scaling is None:
        return
    kind = spec.rope_scaling["rope_type"]
    known = _ROPE_KEYS.get(kind)
    has_it = {
        "dynamic": True,  # it begins after the file's context
        "llama3": architecture.has_rope_factors,
        "longrope": architecture.has_longrope,
    }
    supported = [name for name in _ROPE_KEYS if has_it.get(name, architecture.scales_rope)]
    if known is None or kind not in supported:
        yield f"RoPE scaling {kind!r}: it knows {', '.join(supported)}"
        return
    if kind not in _WITHOUT_FACTOR and not spec.rope_scaling.get("factor"):
        yield f"RoPE scaling {kind!r} without a factor"
    unset = object()
    for key, value in spec.rope_scaling.items():
        # Keys of images, and of yarn (`yarn_attention_factor`).
        if (key == "alpha" and has_alpha(spec)) or key.startswith(("mrope_", "mscale")):
            continue
        if key not in (*known, "rope_type") and _ROPE_DEFAULTS.get(key, unset) != value:
            yield f"RoPE scaling {kind!r} with {key} {value!r}"


def _number_reasons(spec: DenseSpec) -> Iterator[str]:
    """Numbers of a config.json that do not fit into the 32 bits of a GGUF file."""
    scaling = spec.rope_scaling or {}
    reals = {
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta (with alpha)" if has_alpha(spec) else "rope_theta": rope_base(spec),
        "factor of RoPE": scaling.get("factor"),
        **{key: spec.extra.get(key) for key in _REALS},
    }
    for key, value in reals.items():
        if value is not None and abs(value) > _LARGEST_REAL and not math.isinf(value):
            yield f"{key} {value:.6g}: at most {_LARGEST_REAL:.6g}"
    wholes = {
        "max_position_embeddings": spec.max_positions,
        "sliding_window": spec.sliding_window,
        "original_max_position_embeddings": scaling.get("original_max_position_embeddings"),
    }
    for key, value in wholes.items():
        if value is not None and not (isinstance(value, int) and 0 <= value < 2**32):
            yield f"{key} {value:.6g}: a whole number below {2**32}"


def yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    """What llama.cpp's factor on queries and keys of yarn is multiplied by: it knows no `mscale`."""
    ratio = yarn_magnitude_ratio(scaling)
    return 1.0 if ratio is None else ratio / yarn_magnitude(scaling["factor"])


def is_longrope(spec: DenseSpec) -> bool:
    """Whether the model's RoPE has factors for short texts, and others for long ones."""
    return spec.rope_scaling is not None and spec.rope_scaling["rope_type"] == "longrope"


def rope_base(spec: DenseSpec) -> float:
    """The base of rotary frequencies, including Hunyuan's `alpha`."""
    if not has_alpha(spec):
        return spec.rope_theta
    # `compute_ntk_alpha_rope_parameters` of transformers' models/hunyuan_v1_moe
    alpha = spec.rope_scaling["alpha"] if spec.rope_scaling else 1
    try:
        stretched = spec.rope_theta * alpha ** (spec.head_dim / (spec.head_dim - 2))
    except (OverflowError, ZeroDivisionError):
        return sys.float_info.max
    return stretched if isinstance(stretched, float) else sys.float_info.max  # complex, of an alpha below 0


def has_alpha(spec: DenseSpec) -> bool:
    """Whether `dynamic` scaling is Hunyuan's: a larger theta from the first token on."""
    scaling = spec.rope_scaling or {}
    return spec.family.has_rope_alpha and scaling.get("rope_type") == "dynamic" and bool(scaling.get("alpha"))


def _context(spec: DenseSpec, architecture: LlamaCppArchitecture) -> tuple[int, list[str]]:
    """The longest text for which llama.cpp computes what the model computes, and the reasons for that limit."""
    context, warnings = spec.max_positions, []
    if spec.rope_scaling is not None and spec.rope_scaling["rope_type"] == "dynamic" and not has_alpha(spec):
        warnings.append(
            f"dynamic RoPE scaling is left out: it begins after {context} tokens, the file's context length"
        )
    if is_longrope(spec) and (original := int(original_length(spec.rope_scaling or {}, context))) < context:
        option = f"-c {context} --override-kv {architecture.name}.context_length=int:{context}"
        warnings.append(
            f"longrope has factors for texts of up to {original} tokens and others for longer ones. transformers "
            f"chooses by the text, llama.cpp by its context. The file names {original} tokens as its context length: "
            f"up to it, both compute the same, and longer texts are the same with {option}"
        )
        context = original
    if spec.sliding_window is not None and spec.sliding_window < context and not architecture.has_windows:
        context = spec.sliding_window
        warnings.append(
            f"llama.cpp attends to all tokens, the model to the last {context}: the same up to {context} tokens, which "
            f"the file names as its context length"
        )
    return context, warnings
