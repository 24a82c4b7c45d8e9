"""What a host can't hold is refused by name while planning, and never merged into something else."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raymoe
from raymoe.architectures import FAMILIES
from raymoe.architectures.unsupported_families import unsupported_reason
from raymoe.errors import ProblemReport
from raymoe.planning import MergeOptions
from tests.architectures.pairs import DYNAMIC, LLAMA3, MAMBA, MIXED_LAYERS, WINDOW, YARN
from tests.evaluation.streamed import open_mixture
from tests.pico import copy_model, merge_config, merge_without_ray, plan_problems, tensors_of

LONG = {
    "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    "original_max_position_embeddings": 64,
}
NO_ROPE = {"position_embedding_type": None}
PARTIAL = {"partial_rotary_factor": 0.5}
MIXED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}

# host asked for, family, keys of the dense config, keys of the merge config, what the report says
REFUSED: dict[str, tuple[str | None, str, dict[str, Any], dict[str, Any], str]] = {
    "mlp_bias, mixtral": ("mixtral", "llama", {"mlp_bias": True}, {}, r"Mixtral: mlp_bias"),
    "mlp_bias, qwen": ("qwen2_moe", "llama", {"mlp_bias": True}, {}, r"Qwen MoE: mlp_bias"),
    "mlp_bias, deepseek": ("deepseek", "llama", {"mlp_bias": True}, {}, r"DeepSeek MoE: mlp_bias"),
    "o bias, mixtral": ("mixtral", "llama", {"attention_bias": True}, {}, r"Mixtral: attention_bias.*output"),
    "o bias, qwen": ("qwen2_moe", "llama", {"attention_bias": True}, {}, r"Qwen MoE: attention_bias: .*output proj"),
    "head_dim, qwen": ("qwen2_moe", "llama", {"head_dim": 32}, {}, r"Qwen MoE: head_dim 32"),
    "head_dim, deepseek": ("deepseek", "llama", {"head_dim": 32}, {}, r"DeepSeek MoE: head_dim 32"),
    "window, deepseek": ("deepseek", "mistral", {"sliding_window": WINDOW}, {}, r"DeepSeek MoE: sliding_window 12"),
    "llama3, deepseek": ("deepseek", "llama", {"rope_scaling": LLAMA3}, {}, r"'llama3': it knows linear, dynamic$"),
    "yarn, deepseek": ("deepseek", "llama", {"rope_scaling": YARN}, {}, r"'yarn': it knows linear, dynamic$"),
    "mlp_bias, iquestcoder": ("mixtral", "iquestcoder", {"mlp_bias": True}, {}, r"Mixtral: mlp_bias"),
    "norms, cohere": (None, "cohere", {"use_qk_norm": True}, {}, r"use_qk_norm: Cohere 2's MoE has no norms"),
    "o bias, glm, qwen3": (
        "glm4_moe",
        "qwen3",
        {"attention_bias": True},
        {},
        r"GLM-4.5 MoE: bias of attention.s output",
    ),
    "window, glm, qwen3": ("glm4_moe", "qwen3", MIXED, {}, r"GLM-4.5 MoE: sliding"),
    "mixed, qwen3": ("qwen3_moe", "qwen3", MIXED, {}, r"Qwen3 MoE: sliding window on some layers only"),
    "one a token": ("deepseek", "llama", {}, {"experts_per_token": 1}, r"DeepSeek MoE: experts_per_token 1"),
    "mixed, mixtral": (
        "mixtral",
        "ministral",
        {"sliding_window": WINDOW, "layer_types": MIXED_LAYERS},
        {},
        r"Mixtral: sliding window on some layers only(.|\n)*another architecture \(qwen2_moe, granitemoe_swa can\)",
    ),
    "qwen3 in mixtral": (
        "mixtral",
        "qwen3",
        {},
        {},
        r"Mixtral: takes llama, mistral, internlm3, phi3, iquestcoder, ministral models only",
    ),
    "qwen2 in deepseek": (
        "deepseek",
        "qwen2",
        {},
        {},
        r"DeepSeek MoE: takes llama, mistral, internlm3, phi3, iquestcoder models only",
    ),
    "llama in qwen3": ("qwen3_moe", "llama", {}, {}, r"Qwen3 MoE: takes qwen3 models only"),
    "mlp_bias, granite": (None, "granite", {"mlp_bias": True}, {}, r"Granite MoE: mlp_bias"),
    "biases, ernie": (None, "ernie4_5", {"use_bias": True}, {}, r"ERNIE 4.5 MoE: mlp_bias.*attention_bias"),
    "biases, helium": (None, "helium", {"attention_bias": True}, {}, r"ERNIE 4.5 MoE: attention_bias: its q, k, v"),
    "head_dim, granite": (None, "granite", {"head_dim": 32}, {}, r"Granite MoE: head_dim 32"),
    "head_dim, olmo2": (None, "olmo2", {"head_dim": 32}, {}, r"FlexOlmo: head_dim 32"),
    "olmo2 in granite": ("granite", "olmo2", {}, {}, r"Granite MoE: takes granite, granitemoehybrid, llama, mistral"),
    "window, granite": ("granitemoe", "mistral", {"sliding_window": WINDOW}, {}, r"Granite MoE: sliding_window 12"),
    "olmo2 in mixtral": ("mixtral", "olmo2", {}, {}, r"Mixtral: takes llama, "),
    "longrope, deepseek": ("deepseek", "phi3", LONG, {}, r"'longrope': it knows linear, dynamic$"),
    "granite 4, mamba": ("granitemoe", "granitemoehybrid", MAMBA, {}, r"Granite MoE: 2 layers with Mamba: all of its"),
    "granite 4, no rope": ("granitemoe", "granitemoehybrid", NO_ROPE, {}, r"Granite MoE: position_embedding_type None"),
    "mlp_bias, smollm3": (None, "smollm3", {"mlp_bias": True}, {}, r"Granite MoE with windows: mlp_bias"),
    "granite 4, mixture": (
        None,
        "granitemoehybrid",
        {"num_local_experts": 2},
        {},
        r"mixture of 2 experts, but no expert is named\n.*write expert: 0 \(up to 1\)",
    ),
    "a part of each head": (
        "mixtral",
        "phi3",
        PARTIAL,
        {},
        r"Mixtral: partial_rotary_factor 0.5: it applies RoPE to whole",
    ),
    "o bias, glm": (
        "glm4_moe",
        "seed_oss",
        {"attention_out_bias": True},
        {},
        r"GLM-4.5 MoE: bias of attention's output",
    ),
    "mlp bias, glm": ("glm4_moe", "seed_oss", {"mlp_bias": True}, {}, r"GLM-4.5 MoE: mlp_bias"),
    "window, glm": ("glm4_moe", "mistral", {"sliding_window": WINDOW}, {}, r"GLM-4.5 MoE: sliding_window 12"),
    "unknown host": ("switch", "llama", {}, {}, r"unknown architecture 'switch'(.|\n)*mixtral \(Mixtral\), deepseek"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_host_cannot_hold_is_named(name: str, zoo: Callable[..., Path]) -> None:
    host, family, options, merge, pattern = REFUSED[name]
    dense = zoo(family, **options)
    report = plan_problems(merge_config(dense, [dense] * 2, mode="random", architecture=host, **merge))
    assert re.search(pattern, report, re.MULTILINE), report


@pytest.mark.parametrize(
    ("host", "family", "pattern"),
    [
        ("mixtral", "llama", r"Mixtral: shared_experts: it has none"),
        ("qwen3_moe", "qwen3", r"Qwen3 MoE: shared_experts: it has none"),
        ("flex_olmo", "olmo2", r"FlexOlmo: shared_experts: it has none"),
        ("granitemoe", "granite", r"Granite MoE: shared_experts: it has none"),
        ("lfm2_moe", "lfm2", r"LFM2 MoE: shared_experts: it has none"),
    ],
)
def test_hosts_without_shared_experts(host: str, family: str, pattern: str, zoo: Callable[..., Path]) -> None:
    dense = zoo(family)
    config = merge_config(dense, [dense] * 2, mode="random", architecture=host, shared=dense)
    assert re.search(pattern, plan_problems(config))


def test_two_shared_experts_are_too_many_where_the_width_is_fixed(zoo: Callable[..., Path]) -> None:
    dense = zoo("hunyuan_v1_dense")
    config = merge_config(dense, [dense] * 2, mode="random", architecture="hunyuan_v1_moe", shared=dense)
    config["shared_experts"] *= 2
    assert "Hunyuan MoE: 2 shared experts: it has one, as wide as an expert" in plan_problems(config)


def test_a_gated_shared_expert_needs_prompts_and_an_ungated_one_takes_none(zoo: Callable[..., Path]) -> None:
    dense = zoo("llama")
    config = merge_config(dense, [dense] * 2, architecture="qwen2_moe", shared=dense)
    assert re.search(r"Qwen MoE: a shared expert without positive_prompts", plan_problems(config))
    config = merge_config(dense, [dense] * 2, architecture="deepseek", shared=dense, shared_prompts=True)
    assert re.search(r"DeepSeek MoE: prompts of the shared expert: .*no gate", plan_problems(config))


def test_without_a_host_each_one_says_why_not(zoo: Callable[..., Path]) -> None:
    dense = zoo("llama", mlp_bias=True, head_dim=32)
    report = plan_problems(merge_config(dense, [dense] * 2, mode="random"))
    assert re.search(r"no MoE architecture can hold a llama base with 2 experts, 2 per token", report)
    assert re.search(r"Mixtral: mlp_bias", report)
    assert re.search(r"DeepSeek MoE: mlp_bias.*head_dim 32", report)
    assert re.search(r"Qwen MoE: mlp_bias.*head_dim 32", report)
    assert re.search(r"GLM-4.5 MoE: mlp_bias", report)
    assert "Qwen3 MoE" not in report, "hosts of other families have nothing to say"


@pytest.mark.parametrize(
    ("family", "name", "host"),
    [
        ("llama", None, "mixtral"),
        ("mistral", None, "mixtral"),
        ("qwen2", None, "qwen2_moe"),
        ("qwen3", None, "qwen3_moe"),
        ("llama", "Mixtral", "mixtral"),
        ("llama", "mix", "mixtral"),
        ("llama", "qwen", "qwen2_moe"),
        ("qwen2", "Qwen", "qwen2_moe"),
        ("qwen3", "qwen", "qwen3_moe"),
        ("qwen3", "qwen3", "qwen3_moe"),
        ("llama", "Qwen MoE", "qwen2_moe"),
        ("mistral", "deepseek", "deepseek"),
        ("llama", "DeepSeek MoE", "deepseek"),
        ("phi3", None, "mixtral"),
        ("internlm3", None, "mixtral"),
        ("olmo2", None, "flex_olmo"),
        ("granite", None, "granitemoe"),
        ("granite", "Granite", "granitemoe"),
        ("granitemoehybrid", None, "granitemoe"),
        ("smollm3", None, "granitemoe_swa"),
        ("granite_swa", None, "granitemoe_swa"),
        ("granitemoehybrid", "Granite MoE with Mamba", "granitemoehybrid"),
        ("ernie4_5", None, "ernie4_5_moe"),
        ("helium", "ernie", "ernie4_5_moe"),
        ("hunyuan_v1_dense", None, "hunyuan_v1_moe"),
        ("cohere2", None, "cohere2_moe"),
        ("cohere", None, "cohere2_moe"),
        ("cwm", None, "granitemoe_swa"),
        ("cwm", "qwen", "qwen2_moe"),
        ("llama", "granite", "granitemoe"),
        ("ministral", None, "mixtral"),
        ("iquestcoder", None, "mixtral"),
        ("qwen3", "glm", "glm4_moe"),
        ("lfm2", "LFM2", "lfm2_moe"),
        ("qwen3_5_text", None, "qwen3_5_moe"),
        ("youtu", None, "deepseek_v3"),
        ("seed_oss", None, "glm4_moe"),
        ("llama", "glm", "glm4_moe"),
    ],
)
def test_architecture_may_be_the_start_of_a_name(
    family: str, name: str | None, host: str, zoo: Callable[..., Path]
) -> None:
    dense = zoo(family)
    config = merge_config(dense, [dense] * 2, mode="random", architecture=name)
    assert raymoe.plan(config, allow_all_same=True).architecture == host


@pytest.mark.parametrize(
    ("options", "shared", "prompts", "host"),
    [
        ({}, False, False, "mixtral"),
        ({"attention_bias": True}, False, False, "deepseek"),
        ({}, True, False, "deepseek"),
        ({}, True, True, "qwen2_moe"),
    ],
)
def test_the_first_host_that_holds_everything_is_chosen(
    options: dict[str, Any], shared: bool, prompts: bool, host: str, zoo: Callable[..., Path]
) -> None:
    dense = zoo("llama", **options)
    config = merge_config(dense, [dense] * 2, shared=dense if shared else None, shared_prompts=prompts)
    assert raymoe.plan(config, allow_all_same=True).architecture == host


SOME_WINDOWS = {"sliding_window": WINDOW, "layer_types": MIXED_LAYERS}


@pytest.mark.parametrize(
    ("family", "options", "merge", "host"),
    [
        # Engines leave windows out of some architectures: of those that hold the model, another one comes first.
        ("ministral", SOME_WINDOWS, {}, "granitemoe_swa"),
        ("ministral", SOME_WINDOWS, {"shared": True, "shared_prompts": True}, "qwen2_moe"),
        ("qwen2", MIXED, {}, "qwen2_moe"),
        ("qwen2", {}, {}, "qwen2_moe"),
        ("granite", {}, {"shared": True}, "granitemoehybrid"),
        ("granite", {"rope_scaling": YARN}, {"shared": True}, "granitemoeshared"),
        (
            "granitemoehybrid",
            {**MAMBA, "position_embedding_type": "rope", "rope_scaling": YARN},
            {},
            "granitemoehybrid",
        ),
        # As mergekit has it, whatever engines compute.
        ("llama", {"rope_scaling": LLAMA3}, {}, "mixtral"),
        ("mistral", {"sliding_window": WINDOW}, {}, "mixtral"),
    ],
)
def test_a_host_that_engines_compute_otherwise_is_the_last_one(
    family: str, options: dict[str, Any], merge: dict[str, Any], host: str, zoo: Callable[..., Path]
) -> None:
    dense = zoo(family, **options)
    merge = {**merge, **({"shared": dense} if "shared" in merge else {})}
    mode = "hidden" if "shared_prompts" in merge else "random"
    assert raymoe.plan(merge_config(dense, [dense] * 2, mode=mode, **merge), allow_all_same=True).architecture == host


# --- models that don't fit together

OTHER: dict[str, tuple[str, dict[str, Any], str]] = {
    "depth": ("llama", {"num_hidden_layers": 2}, r"experts\[1\].*num_hidden_layers is 2, but the base's is 3"),
    "width": ("llama", {"hidden_size": 32}, r"experts\[1\].*hidden_size is 32, but the base's is 64"),
    "ffn width": ("llama", {"intermediate_size": 80}, r"experts\[1\].*intermediate_size is 80, but the base's is 96"),
    "activation": ("llama", {"hidden_act": "gelu"}, r"experts\[1\].*hidden_act is gelu, but the base's is silu"),
    "ffn bias": ("llama", {"mlp_bias": True}, r"experts\[1\].*mlp_bias is True, but the base's is False"),
    "type": ("mistral", {}, r"experts\[1\].*model_type is 'mistral', but the base's is 'llama'"),
}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("prompt_model", ["base", "expert", "grafted"])
def test_an_expert_that_does_not_fit_is_named(name: str, prompt_model: str, zoo: Callable[..., Path]) -> None:
    family, options, pattern = OTHER[name]
    base, other = zoo("llama"), zoo(family, seed=1, **options)
    report = plan_problems(merge_config(base, [base, other], prompt_model=prompt_model))
    assert re.search(pattern, report), report


def test_all_misfits_are_reported_together(zoo: Callable[..., Path]) -> None:
    experts = [zoo(family, seed=1, **options) for family, options, _ in list(OTHER.values())[:4]]
    report = plan_problems(merge_config(zoo("llama"), experts))
    assert re.search(r"experts\[0\].*num_hidden_layers", report)
    assert re.search(r"experts\[1\].*hidden_size", report)
    assert re.search(r"experts\[2\].*intermediate_size", report)
    assert re.search(r"experts\[3\].*hidden_act", report)


def test_another_type_is_taken_with_allow_crimes(zoo: Callable[..., Path]) -> None:
    config = merge_config(zoo("llama"), [zoo("mistral", seed=s) for s in (1, 2)], mode="random")
    assert raymoe.plan(config, MergeOptions(allow_crimes=True)).architecture == "mixtral"


def test_differences_that_do_not_matter_are_warned_of(zoo: Callable[..., Path]) -> None:
    other = zoo("llama", seed=1, vocab_size=432, rms_norm_eps=1e-4, rope_theta=10_000.0)
    warnings = "\n".join(raymoe.plan(merge_config(zoo("llama"), [zoo("llama", seed=2), other])).warnings)
    assert re.search(r"experts\[1\].*RoPE settings differ", warnings)
    assert re.search(r"experts\[1\].*vocabulary has 432 tokens, the base's 416", warnings)
    assert re.search(r"experts\[1\].*rms_norm_eps 0.0001 differs", warnings)
    assert "experts[0]" not in warnings


def test_a_head_beside_tied_embeddings_is_warned_of(zoo: Callable[..., Path], tmp_path: Path) -> None:
    tied = zoo("llama", tie_word_embeddings=True)
    head = tensors_of(tied)["model.embed_tokens.weight"] + 1
    other = copy_model(tied, tmp_path / "other", tensors={"lm_head.weight": head})
    for base, warned in ((tied, False), (other, True)):
        warnings = "\n".join(raymoe.plan(merge_config(base, [tied] * 2, mode="random"), allow_all_same=True).warnings)
        assert ("tie_word_embeddings is true, but lm_head.weight differs from the embedding" in warnings) is warned


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_neox", "no_such_type", None, 3])
@pytest.mark.parametrize("place", ["base_model", "experts[0]"])
def test_other_model_types_are_refused(
    model_type: object, place: str, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    dense = zoo("llama")
    if model_type is None:
        other = copy_model(dense, tmp_path / "other", drop_config=["model_type"])
    else:
        other = copy_model(dense, tmp_path / "other", config={"model_type": model_type})
    base, expert = (other, dense) if place == "base_model" else (dense, other)
    report = plan_problems(merge_config(base, [expert, dense], mode="random"))
    reason = unsupported_reason(model_type) if isinstance(model_type, str) else ""
    assert bool(reason) is (model_type in ("gemma2", "gpt_neox"))
    if reason:
        assert re.search(rf"{re.escape(place)}.*model_type is {model_type!r}: {re.escape(reason)}", report)
        assert "`raymoe archs`" in report
    else:
        assert re.search(rf"{re.escape(place)}.*model_type is {model_type!r}, which is no dense family", report)
        assert ", ".join(sorted(FAMILIES)) in report


@pytest.mark.parametrize(("host", "family"), [("glm4_moe", "seed_oss"), ("deepseek_v3", "youtu")])
def test_routers_that_compare_the_two_best_need_two_experts(host: str, family: str, zoo: Callable[..., Path]) -> None:
    dense = zoo(family)
    config = merge_config(dense, [dense], mode="random", architecture=host, experts_per_token=1)
    assert re.search(r"1 expert: its router compares the two best", plan_problems(config))


def test_an_expert_that_stores_its_ffn_otherwise_is_refused_with_allow_crimes_too(zoo: Callable[..., Path]) -> None:
    config = merge_config(zoo("llama"), [zoo("phi3", seed=s) for s in (1, 2)], mode="random")
    report = plan_problems(config, MergeOptions(allow_crimes=True))
    assert re.search(r"experts\[1\].*a phi3 model stores its FFN differently from a llama model", report)


@pytest.mark.parametrize(
    ("family", "config", "pattern"),
    [
        (
            "granitemoehybrid",
            {"layer_types": ["mamba", "rwkv", "mamba"]},
            r"layer_types has rwkv, which a granitemoehybrid",
        ),
        ("granitemoehybrid", {"mamba_d_state": 0}, r"mamba_d_state is 0"),
        ("granite_swa", {"layer_rope_theta": [1e4, 0]}, r"layer_rope_theta is \[10000.0, 0\]: not one number"),
        ("granite_swa", {"layer_types": ["attention"] * 3}, r"layer_types has attention, which a granite_swa model"),
        ("granite_swa", {"layer_rope_theta": [1e4, 0, -1]}, r"layer_rope_theta is .*: not one number, 0 or more"),
        ("youtu", {"num_key_value_heads": 2}, r"num_key_value_heads is 2: its attention has as many as .*, 4"),
        ("youtu", {"rope_interleave": "no"}, r"rope_interleave is 'no'\n.*true or false"),
        ("granitemoehybrid", {"mamba_n_heads": 8, "mamba_d_head": 4}, r"mamba_n_heads 8 of mamba_d_head 4 are not"),
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\]: not a list of 3 zeros and ones"),
        ("lfm2", {"layer_types": ["conv"] * 2}, r"layer_types has 2 entries, but num_hidden_layers is 3"),
        (
            "lfm2",
            {"layer_types": ["conv", "mamba", "conv"]},
            r"layer_types has mamba, which a lfm2 model does not have",
        ),
        ("cohere2", {"layer_types": ["full_attention"] * 4}, r"layer_types has 4 entries"),
        ("granite", {"residual_multiplier": "x"}, r"residual_multiplier is 'x'.*\n?.*expected a number"),
        ("granite", {"logits_scaling": 0}, r"logits_scaling is 0.*\n?.*expected a number over 0"),
        ("lfm2", {"conv_L_cache": "3"}, r"conv_L_cache is '3'"),
        ("cohere2", {"layer_norm_eps": 0}, r"rms_norm_eps is 0"),
        ("iquestcoder", {"clip_qkv": 8}, r"clip_qkv is 8: queries, keys and values are not clipped"),
        ("iquestcoder", {"use_sliding_window": True}, r"use_sliding_window is on: its attention has no windows"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, r"no_rope_layer_interval is 0"),
        ("lfm2", {"full_attn_idxs": 3}, r"full_attn_idxs is 3\n.*a list of numbers of layers"),
        ("lfm2", {"block_ffn_dim_multiplier": "x"}, r"block_ffn_dim_multiplier is 'x'"),
        ("granitemoehybrid", {"layer_types": [["mamba"]] * 3}, r"layer_types is .*\n.*a list of kinds"),
        ("granitemoehybrid", {"mamba_d_head": "all"}, r"mamba_d_head is 'all'"),
        ("granitemoehybrid", {"time_step_limit": 5}, r"time_step_limit is 5\n.*two numbers"),
        ("llama", {"head_dim": 15}, r"each head has 15 dimensions, an odd number"),
        ("glm", {"rope_parameters": None, "partial_rotary_factor": 0.1}, r"3 dimensions are no pairs"),
        ("glm", {"rope_parameters": None, "partial_rotary_factor": "half"}, r"partial_rotary_factor is 'half'"),
        ("glm", {"rope_parameters": None, "partial_rotary_factor": 1.5}, r"partial_rotary_factor is 1.5"),
    ],
)
def test_keys_of_one_family_are_checked(
    family: str, config: dict[str, Any], pattern: str, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    other = copy_model(zoo(family), tmp_path / "other", config=config)
    assert re.search(pattern, plan_problems(merge_config(other, [zoo(family)] * 2, mode="random")))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "64"),
        ("num_hidden_layers", 0),
        ("num_attention_heads", True),
        ("num_key_value_heads", 3),
        ("vocab_size", None),
        ("head_dim", -1),
        ("rope_parameters", 3),
        ("rope_scaling", ["linear"]),
        ("rope_theta", "high"),
        ("rms_norm_eps", 0),
        ("tie_word_embeddings", "false"),
        ("hidden_act", ["silu"]),
        ("sliding_window", "4096"),
        ("max_position_embeddings", 1.5),
    ],
)
def test_a_config_value_that_makes_no_sense_is_named(
    key: str, value: object, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    other = copy_model(zoo("mistral"), tmp_path / "other", config={key: value})
    report = plan_problems(merge_config(other, [zoo("mistral")] * 2, mode="random"))
    assert re.search(rf"base_model \(.*/other/config.json\): .*{key}", report), report


@pytest.mark.parametrize(
    ("rope", "pattern"),
    [
        ({"rope_type": "ntk", "factor": 2.0}, r"its RoPE is of type 'ntk'\n.*one of default, linear, dynamic, yarn"),
        ({"type": "linear"}, r"factor of its linear RoPE is None\n.*a number over 0"),
        ({"type": "dynamic", "factor": 0}, r"factor of its dynamic RoPE is 0\n"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
            r"high_freq_factor of its llama3 RoPE is None",
        ),
        ({"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0]}, r"long_factor .*\n.*8 numbers"),
        ({"rope_type": 3}, r"rope_type of its RoPE is 3\n.*text"),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": "x"}, r"rope_theta is 'x'"),
        ({"full_attention": {"rope_type": "default"}}, r"settings for full_attention layers alone"),
    ],
)
@pytest.mark.parametrize("host", ["mixtral", "deepseek"])
def test_a_rope_that_nothing_can_load(
    rope: dict[str, Any], pattern: str, host: str, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    drop = ("rope_parameters",)
    other = copy_model(zoo("llama"), tmp_path / "other", config={"rope_scaling": rope}, drop_config=drop)
    report = plan_problems(merge_config(other, [other] * 2, mode="random", architecture=host))
    assert re.search(pattern, report), report


def test_dynamic_rope_is_held_by_deepseek_and_mixtral_alike(zoo: Callable[..., Path]) -> None:
    dense = zoo("llama", rope_scaling=DYNAMIC)
    configs = {}
    for host in ("mixtral", "deepseek"):
        plan = raymoe.plan(merge_config(dense, [dense] * 2, mode="random", architecture=host), allow_all_same=True)
        configs[host] = plan.config["rope_scaling"]
    assert configs["mixtral"] == {"rope_type": "dynamic", "factor": 2.0}
    assert configs["deepseek"]["type"] == "dynamic"
    assert configs["deepseek"]["factor"] == 2.0


@pytest.mark.parametrize(("shared", "expected"), [(False, 1), (True, 0)])
def test_a_shared_expert_of_zeros_is_warned_of(shared: bool, expected: int, zoo: Callable[..., Path]) -> None:
    dense = zoo("seed_oss")
    config = merge_config(dense, [dense] * 2, mode="random", shared=dense if shared else None)
    warnings = raymoe.plan(config, allow_all_same=True).warnings
    assert [w for w in warnings if "one of zeros" in w] == [
        "GLM-4.5 MoE: without a shared expert there is one of zeros, as wide as the experts"
    ] * expected


def test_a_mixture_that_turns_a_part_of_each_head_and_has_norms_in_them_has_no_dense_model_to_evaluate_it_with(
    zoo: Callable[..., Path], tmp_path: Path
) -> None:
    """As GLM-4.5 itself has; no merge does."""
    dense = zoo("phi3", **PARTIAL)
    merge_without_ray(merge_config(dense, [dense] * 2, mode="random"), tmp_path / "plain")
    copy_model(tmp_path / "plain", tmp_path / "merged", config={"use_qk_norm": True})
    with pytest.raises(ProblemReport, match=r"partial_rotary_factor is 0.5: no dense model has this attention"):
        open_mixture(tmp_path / "merged")
