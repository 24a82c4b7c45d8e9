"""Which architecture of llama.cpp computes what a model computes.

llama.cpp's architectures are programs, and each takes some things for granted. What decides between them is how the
weights of a token's experts are made of the router's scores, and what a shared expert is multiplied by:

    llama       softmax over all experts, the highest k of them, made to sum to one; no shared expert
    qwen3moe    the same, with norms on queries and keys
    bailingmoe  the same (or not made to sum to one: `expert_weights_norm`), plus a shared expert
    qwen2moe    not made to sum to one, plus a shared expert times the sigmoid of its gate
    granitemoe  made to sum to one, with or without a shared expert, and Granite's multipliers
    hunyuan-moe the same, always with a shared expert, and norms on queries and keys behind the rotary embedding
    glm4moe     sigmoids in the place of the softmax, made to sum to one, plus a shared expert; norms on queries and
                keys where the file has them
    lfm2moe     sigmoids, made to sum to one; short convolutions in the place of attention on some layers
    cohere2moe  softmax, made to sum to one; attention and FFN side by side, windows on some layers
    deepseek2   sigmoids, made to sum to one, plus a shared expert; attention with latent keys and values
    granite_swa softmax, made to sum to one, with or without a shared expert; windows and RoPE on some layers, and sinks
    granitehybrid  the same with Mamba in the place of attention on some layers, RoPE on all others or on none
    qwen35moe   softmax, made to sum to one, plus a shared expert times the sigmoid of its gate; linear attention on
                some layers, a gate on attention's output on the others

So a merge does not always go into the architecture that has its name. A Qwen2-MoE of raymoe's whose shared expert is
empty is a `llama` (in qwen2moe its gate of zeros would come out as 0 / 0), a DeepSeek-MoE is a `llama` or, with its
shared expert, a `bailingmoe` (`deepseek` does not make the weights sum to one); so is ERNIE's. A merge that no
architecture computes exactly is refused: a file that loads and says something else is worse than none.

Source: `build_moe_ffn` in llama.cpp's src/llama-graph.cpp and the files of these names in src/models; the kinds of
rotary embedding are listed in `llama_model_rope_type` in src/llama-model.cpp.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from raymoe.architectures import DenseSpec
from raymoe.checkpoints.weight_table import RoutingRule
from raymoe.errors import Problem, ProblemReport

MAX_EXPERTS = 512  # LLAMA_MAX_EXPERTS in llama.cpp's src/llama-hparams.h

# Kinds of RoPE scaling that can be written, and the settings of each that are.
_ROPE_KEYS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "linear": frozenset({"factor"}),
        "dynamic": frozenset({"factor"}),
        "yarn": frozenset({"factor", "original_max_position_embeddings"}),
        "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    }
)
# Settings that may be there with these values, which are llama.cpp's too.
_ROPE_DEFAULTS: Mapping[str, object] = MappingProxyType(
    {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCppArchitecture:
    """What an architecture of llama.cpp has.

    `rope_is_interleaved`: its rotary embedding turns neighbours of a head (2i, 2i + 1), where transformers turns (i, i
    + d/2); rows of q and k are written in another order for it. `factors`: it reads a divisor for every rotary
    frequency.
    `score_function`: what it makes of the router's before the highest are chosen. `windows`: it has sliding windows, on
    the layers that the file names. `tied`: the output matrix may be left out, and is the embedding then. `scales`: its
    rotary embedding may be scaled. `has_partial_rotary`: it may turn a part of each head. `needs_shared`: every layer
    has a shared expert, if one of zeros. The rest are biases that it adds.
    """

    name: str
    score_function: str = "softmax"
    rope_is_interleaved: bool = False
    factors: bool = False
    windows: bool = False
    tied: bool = True
    scales: bool = True
    has_partial_rotary: bool = False
    needs_shared: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False


_ARCHITECTURES: Mapping[str, LlamaCppArchitecture] = MappingProxyType(
    {
        architecture.name: architecture
        for architecture in (
            LlamaCppArchitecture(
                name="llama", rope_is_interleaved=True, factors=True, qkv_bias=True, o_bias=True, mlp_bias=True
            ),
            LlamaCppArchitecture(name="bailingmoe", rope_is_interleaved=True, factors=True, tied=False),
            LlamaCppArchitecture(name="qwen2moe", tied=False, qkv_bias=True),
            LlamaCppArchitecture(name="qwen3moe"),
            LlamaCppArchitecture(name="granitemoe", rope_is_interleaved=True, factors=True, qkv_bias=True, o_bias=True),
            LlamaCppArchitecture(name="hunyuan-moe", factors=True, needs_shared=True, qkv_bias=True),
            LlamaCppArchitecture(
                name="glm4moe", score_function="sigmoid", has_partial_rotary=True, needs_shared=True, qkv_bias=True
            ),
            LlamaCppArchitecture(name="cohere2moe", rope_is_interleaved=True, factors=True, windows=True),
            LlamaCppArchitecture(name="lfm2moe", score_function="sigmoid"),
            LlamaCppArchitecture(
                name="deepseek2", score_function="sigmoid", rope_is_interleaved=True, scales=False, needs_shared=True
            ),
            LlamaCppArchitecture(
                name="granitehybrid", rope_is_interleaved=True, factors=True, qkv_bias=True, o_bias=True
            ),
            LlamaCppArchitecture(
                name="granite_swa", rope_is_interleaved=True, factors=True, windows=True, qkv_bias=True, o_bias=True
            ),
            LlamaCppArchitecture(name="qwen35moe", has_partial_rotary=True, needs_shared=True),
            LlamaCppArchitecture(name="qwen2", qkv_bias=True),
            LlamaCppArchitecture(name="qwen3"),
            LlamaCppArchitecture(
                name="granite", rope_is_interleaved=True, factors=True, qkv_bias=True, o_bias=True, mlp_bias=True
            ),
        )
    }
)
# Model types of transformers that are converted: dense ones with their architecture, and mixtures, see `_mixture`.
DENSE: Mapping[str, str] = MappingProxyType(
    {
        "llama": "llama",
        "mistral": "llama",
        "qwen2": "qwen2",
        "qwen3": "qwen3",
        "granite": "granite",
        "ernie4_5": "llama",
        "helium": "llama",
    }
)
MIXTURES = (
    "mixtral",
    "deepseek",
    "qwen2_moe",
    "qwen3_moe",
    "granitemoe",
    "granitemoeshared",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
    "glm4_moe",
    "cohere2_moe",
    "lfm2_moe",
    "deepseek_v3",
    "granitemoehybrid",
    "granitemoe_swa",
    "qwen3_5_moe_text",
)
# Families whose mixture has an architecture of its own, for whatever it is made of.
_OWN = {
    "cohere2": "cohere2moe",
    "granite": "granitemoe",
    "granite_swa": "granite_swa",
    "glm": "glm4moe",
    "granitemoehybrid": "granitehybrid",
    "hunyuan_v1_dense": "hunyuan-moe",
    "lfm2": "lfm2moe",
    "qwen3_5_text": "qwen35moe",
    "seed_oss": "glm4moe",
    "youtu": "deepseek2",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The architecture that a model is written for, and up to how many tokens it computes what the model computes.

    `permutes_heads`: rows of q and k change places. `shared`: a shared expert is written.
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
    found = DENSE[spec.model_type] if rule is None else _mixture(spec, rule, shared=shared and not shared_is_empty)
    if isinstance(found, _Reason):
        raise ProblemReport([Problem(where=label, what=found.what, remedy=found.remedy)])
    architecture = _ARCHITECTURES[found]
    reasons = [*_feature_reasons(spec, architecture), *_rope_reasons(spec, architecture), *_number_reasons(spec)]
    if rule is not None and rule.experts > MAX_EXPERTS:
        reasons.append(f"{rule.experts} experts: at most {MAX_EXPERTS}")
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


def _rope_is_interleaved(spec: DenseSpec) -> bool:
    """Whether the rotary embedding does in transformers too (`rotate_half` in the modelling files)."""
    if spec.model_type == "youtu":
        return bool(spec.extra["rope_interleave"])
    return spec.family.rope_is_interleaved


# What the floats of a GGUF file's metadata hold, and keys of configs that are written as such.
_LARGEST_REAL = 3.4028234663852886e38
_REALS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "logit_scale")

UNCHANGED_REMEDY = "convert a merge as raymoe wrote it"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reason:
    """Why no architecture will do."""

    what: str
    remedy: str = "run it with transformers, vLLM or SGLang"


def _mixture(spec: DenseSpec, rule: RoutingRule, *, shared: bool) -> str | _Reason:
    """The name of the architecture. Weights over all experts sum to one in any case."""
    sums_to_one = rule.renormalizes or rule.per_token == rule.experts
    if shared and spec.model_type == "cohere2":
        what = "it adds up its shared expert and the others; llama.cpp's cohere2moe takes the mean of both"
        return _Reason(what=what, remedy="merge without shared_experts")
    unequal = f"the weights of each token's {rule.per_token} experts do not sum to one"
    if spec.model_type in _OWN:
        if sums_to_one:
            return _OWN[spec.model_type]
        return _Reason(what=f"{unequal}, as a merge's do", remedy=UNCHANGED_REMEDY)
    if spec.model_type == "qwen3" and rule.score_function == "sigmoid":
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
    if spec.hidden_act != "silu":
        yield f"activation {spec.hidden_act!r}: it has silu"
    for flag, where in (("qkv_bias", "q, k and v"), ("o_bias", "attention's output"), ("mlp_bias", "the FFN")):
        if getattr(spec, flag) and not getattr(architecture, flag):
            yield f"a bias on {where}: it has none"
    if spec.extra.get("conv_bias"):
        yield "a bias on convolutions: it has none"
    if spec.partial_rotary != 1.0 and not architecture.has_partial_rotary:
        yield f"a rotary embedding of {spec.partial_rotary:g} of each head: it has one of whole heads"
    yield from _family_reasons(spec)
    if spec.explicit_head_dim and architecture.name in ("qwen2", "qwen2moe"):
        yield f"head_dim {spec.head_dim}: it is always hidden_size / num_attention_heads"


def _family_reasons(spec: DenseSpec) -> Iterator[str]:
    """What llama.cpp takes for granted in the architecture of one family."""
    extra = spec.extra
    if len(set(spec.kinds)) == 1:
        yield f"all layers of one kind, {spec.kinds[0]}: it has two"
    if spec.model_type == "cohere2" and not any(spec.sliding_layers):
        yield "no layer with a sliding window: it has RoPE on those, and the model on none"
    if spec.model_type == "youtu":
        if extra["q_lora_rank"] and (spec.layers in (26, 27) or (spec.layers, spec.vocab) == (48, 128256)):
            yield f"{spec.layers} layers: it takes such a model for one without latent queries (q_lora_rank)"
        if spec.rms_norm_eps != 1e-6:
            yield f"rms_norm_eps {spec.rms_norm_eps:g}: norms of latent numbers have it there, and 1e-06 in the model"
    if spec.model_type == "granite_swa":
        thetas = {theta for theta in extra["layer_rope_theta"] if theta}
        if not thetas:
            yield "no layer with a rotary embedding (layer_rope_theta): it has some"
        elif len(thetas) > 1:
            yield f"rotary embeddings of {len(thetas)} kinds (layer_rope_theta): it has one, or none, in each layer"
    if spec.model_type == "granitemoehybrid":
        inner = spec.size_of("mamba_n_heads*mamba_d_head")
        if inner != 2 * spec.hidden:
            yield f"{inner} channels of Mamba: it has twice the hidden_size, {2 * spec.hidden}"
        if extra["mamba_n_groups"] != 1:
            yield f"mamba_n_groups {extra['mamba_n_groups']}: it takes the norm of each group, the model that of all"
        if not extra["mamba_conv_bias"]:
            yield "no bias on Mamba's convolution: it has one"
        if extra["mamba_proj_bias"]:
            yield "a bias on Mamba's projections: it has none"
        if not _is_unlimited(extra["time_step_limit"]):
            yield f"time_step_limit {extra['time_step_limit']}: it has none"
    if spec.model_type == "qwen3_5_text" and extra["linear_key_head_dim"] != extra["linear_value_head_dim"]:
        keys, values = extra["linear_key_head_dim"], extra["linear_value_head_dim"]
        yield f"linear attention with keys of {keys} and values of {values}: it has both of one size"


def _is_unlimited(limit: Sequence[Any]) -> bool:
    """Whether steps in time may be anything from 0. transformers writes an infinity as an object."""
    lowest, highest = limit
    return float(lowest) == 0 and (isinstance(highest, Mapping) or float(highest) == math.inf)


def _rope_reasons(spec: DenseSpec, architecture: LlamaCppArchitecture) -> Iterator[str]:
    if spec.rope_scaling is None:
        return
    kind = spec.rope_scaling["rope_type"]
    known = _ROPE_KEYS.get(kind)
    supported = [name for name in _ROPE_KEYS if name == "dynamic" or (architecture.scales and name != "llama3")]
    supported += ["llama3"] if architecture.factors else []
    if known is None or kind not in supported:
        yield f"RoPE scaling {kind!r}: it knows {', '.join(supported)}"
        return
    if not spec.rope_scaling.get("factor"):
        yield f"RoPE scaling {kind!r} without a factor"
    both = spec.rope_scaling.get("mscale") and spec.rope_scaling.get("mscale_all_dim")
    if kind == "yarn" and both:
        yield "RoPE scaling 'yarn' with both mscale and mscale_all_dim"
    unset = object()
    for key, value in spec.rope_scaling.items():
        # Of images, and of yarn (where one of them alone has no effect).
        if (key == "alpha" and has_alpha(spec)) or key.startswith(("mrope_", "mscale")):
            continue
        if key not in (*known, "rope_type") and _ROPE_DEFAULTS.get(key, unset) != value:
            yield f"RoPE scaling {kind!r} with {key} {value!r}"


def _number_reasons(spec: DenseSpec) -> Iterator[str]:
    """Numbers that the file's 32 bits can't hold, which a config.json may say of no weight."""
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


def rope_base(spec: DenseSpec) -> float:
    """The base of rotary frequencies with Hunyuan's `alpha` in it."""
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
    return (
        spec.model_type.startswith("hunyuan") and scaling.get("rope_type") == "dynamic" and bool(scaling.get("alpha"))
    )


def _context(spec: DenseSpec, architecture: LlamaCppArchitecture) -> tuple[int, list[str]]:
    """The longest text on which llama.cpp computes what the model computes, and why it is no longer."""
    context, warnings = spec.max_positions, []
    if spec.rope_scaling is not None and spec.rope_scaling["rope_type"] == "dynamic" and not has_alpha(spec):
        warnings.append(
            f"dynamic RoPE scaling is left out: it begins after {context} tokens, the file's context length"
        )
    if spec.sliding_window is not None and spec.sliding_window < context and not architecture.windows:
        context = spec.sliding_window
        warnings.append(
            f"llama.cpp attends to all tokens, the model to the last {context}: the same up to {context} tokens, which "
            f"the file names as its context length"
        )
    return context, warnings
