"""What a dense model may have besides plain attention: carried over exactly wherever the host can hold it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import raymoe
from raymoe.architectures import FAMILIES, MOE_ARCHITECTURES, DenseSpec, MoeShape, read_spec
from raymoe.architectures.moe_architecture import moe_config
from tests.architectures.pairs import (
    ALL_LAYERS,
    DYNAMIC,
    LINEAR,
    LLAMA3,
    MAMBA,
    MAX_DIFFERENCE,
    MIXED_LAYERS,
    PAIRS,
    WINDOW,
    YARN,
    Pair,
    load_merged,
)
from tests.pico import (
    VOCAB,
    copy_model,
    load_dense,
    logits_of,
    make_config,
    merge_config,
    merge_without_ray,
    tensors_of,
    token_ids,
)

pytestmark = pytest.mark.engines

TOKENS = 48
LONG = {
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * n for n in range(8)],
        "long_factor": [2.0 + n for n in range(8)],
    },
    "original_max_position_embeddings": 32,
    "max_position_embeddings": 96,
}
SHORT = {**LONG, "original_max_position_embeddings": 64}
HALF = {"partial_rotary_factor": 0.5}
ALPHA = {"rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": 1.0}}
TIED = {"tie_word_embeddings": True}

# host, family, keys of the dense config, the same keys as a model without the feature has them (None: can't be had)
HELD: dict[str, tuple[str, str, dict[str, Any], dict[str, Any] | None]] = {
    "mixtral tied": ("mixtral", "llama", TIED, None),
    "mixtral wide heads": ("mixtral", "llama", {"head_dim": 32}, None),
    "mixtral wide heads, mistral": ("mixtral", "mistral", {"head_dim": 32}, None),
    "mixtral llama3 rope": ("mixtral", "llama", {"rope_scaling": LLAMA3}, {"rope_scaling": None}),
    "mixtral linear rope": ("mixtral", "llama", {"rope_scaling": LINEAR}, {"rope_scaling": None}),
    "mixtral yarn": ("mixtral", "mistral", {"rope_scaling": YARN}, {"rope_scaling": None}),
    "mixtral window": ("mixtral", "mistral", {"sliding_window": WINDOW}, {"sliding_window": None}),
    "mixtral other theta": ("mixtral", "llama", {"rope_theta": 500.0}, {"rope_theta": 10_000.0}),
    "mixtral other epsilon": ("mixtral", "llama", {"rms_norm_eps": 0.1}, {"rms_norm_eps": 1e-5}),
    "mixtral gelu": ("mixtral", "llama", {"hidden_act": "gelu"}, {"hidden_act": "silu"}),
    "mixtral one kv head": ("mixtral", "llama", {"num_key_value_heads": 1}, None),
    "qwen2_moe tied": ("qwen2_moe", "qwen2", TIED, None),
    "qwen2_moe yarn": ("qwen2_moe", "qwen2", {"rope_scaling": YARN}, {"rope_scaling": None}),
    "qwen2_moe window": ("qwen2_moe", "qwen2", ALL_LAYERS, {"use_sliding_window": False, "layer_types": None}),
    "qwen2_moe window on some layers": (
        "qwen2_moe",
        "qwen2",
        {**ALL_LAYERS, "layer_types": MIXED_LAYERS},
        {"layer_types": ["sliding_attention"] * 3},
    ),
    "qwen2_moe cwm, no window": ("qwen2_moe", "cwm", {"layer_types": ["full_attention"] * 3}, None),
    "qwen2_moe cwm llama3 rope": ("qwen2_moe", "cwm", {"rope_scaling": LLAMA3}, None),
    "qwen2_moe mistral, windows on some layers": (
        "qwen2_moe",
        "mistral",
        {"sliding_window": WINDOW, "layer_types": MIXED_LAYERS},
        {"layer_types": ["sliding_attention"] * 3},
    ),
    "qwen2_moe ministral, one window": (
        "qwen2_moe",
        "ministral",
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 3},
        {"layer_types": ["full_attention"] * 3},
    ),
    "qwen2_moe mistral window": ("qwen2_moe", "mistral", {"sliding_window": WINDOW}, {"sliding_window": None}),
    "qwen2_moe llama3 rope": ("qwen2_moe", "llama", {"rope_scaling": LLAMA3}, {"rope_scaling": None}),
    "qwen2_moe linear rope": ("qwen2_moe", "llama", {"rope_scaling": LINEAR}, {"rope_scaling": None}),
    "qwen3_moe tied": ("qwen3_moe", "qwen3", TIED, None),
    "qwen3_moe wide heads": ("qwen3_moe", "qwen3", {"head_dim": 32}, None),
    "qwen3_moe biases": ("qwen3_moe", "qwen3", {"attention_bias": True}, None),
    "qwen3_moe yarn": ("qwen3_moe", "qwen3", {"rope_scaling": YARN}, {"rope_scaling": None}),
    "qwen3_moe window": ("qwen3_moe", "qwen3", ALL_LAYERS, {"use_sliding_window": False, "layer_types": None}),
    "mixtral phi3 long": ("mixtral", "phi3", LONG, {"rope_scaling": None}),
    "mixtral phi3 short": ("mixtral", "phi3", SHORT, {"rope_scaling": None}),
    "mixtral phi3 window": ("mixtral", "phi3", {"sliding_window": WINDOW}, {"sliding_window": None}),
    "mixtral phi3 tied": ("mixtral", "phi3", TIED, None),
    "mixtral phi3 wide heads": ("mixtral", "phi3", {"head_dim": 32}, None),
    "qwen2_moe phi3 long": ("qwen2_moe", "phi3", LONG, {"rope_scaling": None}),
    "flex_olmo biases": ("flex_olmo", "olmo2", {"attention_bias": True}, None),
    "flex_olmo linear rope": ("flex_olmo", "olmo2", {"rope_scaling": LINEAR}, {"rope_scaling": None}),
    "granitemoe tied": ("granitemoe", "granite", TIED, None),
    "granitemoe biases": ("granitemoe", "granite", {"attention_bias": True}, None),
    "granitemoe embedding": ("granitemoe", "granite", {"embedding_multiplier": 5.0}, {"embedding_multiplier": 1.0}),
    "granitemoe residual": ("granitemoe", "granite", {"residual_multiplier": 0.3}, {"residual_multiplier": 1.0}),
    "granitemoe attention": ("granitemoe", "granite", {"attention_multiplier": 0.5}, {"attention_multiplier": 1.0}),
    "granitemoe logits": ("granitemoe", "granite", {"logits_scaling": 0.5}, {"logits_scaling": 1.0}),
    "granitemoe llama tied": ("granitemoe", "llama", {**TIED, "attention_bias": True}, None),
    "granitemoe qwen2 tied": ("granitemoe", "qwen2", TIED, None),
    "granitemoe_swa ministral window": (
        "granitemoe_swa",
        "ministral",
        {"sliding_window": WINDOW, "layer_types": MIXED_LAYERS, "head_dim": 32},
        {"layer_types": ["full_attention"] * 3},
    ),
    "granitemoehybrid granite": (
        "granitemoehybrid",
        "granite",
        {"attention_bias": True, **TIED},
        None,
    ),
    "granitemoehybrid tied": ("granitemoehybrid", "granitemoehybrid", {**MAMBA, **TIED}, None),
    "granitemoehybrid biases": ("granitemoehybrid", "granitemoehybrid", {**MAMBA, "attention_bias": True}, None),
    "granitemoehybrid rope": (
        "granitemoehybrid",
        "granitemoehybrid",
        {**MAMBA, "position_embedding_type": "rope"},
        {"position_embedding_type": None},
    ),
    "granitemoehybrid other biases": (
        "granitemoehybrid",
        "granitemoehybrid",
        {**MAMBA, "mamba_proj_bias": True, "mamba_conv_bias": False},
        None,
    ),
    "granitemoehybrid groups": ("granitemoehybrid", "granitemoehybrid", {**MAMBA, "mamba_n_groups": 2}, None),
    "granitemoehybrid steps": (
        "granitemoehybrid",
        "granitemoehybrid",
        {**MAMBA, "time_step_limit": [0.5, 0.9]},
        {"time_step_limit": [0.0, 0.6]},
    ),
    "granitemoehybrid no mamba": ("granitemoehybrid", "granitemoehybrid", {"position_embedding_type": None}, None),
    "granitemoe_swa thetas": (
        "granitemoe_swa",
        "granite_swa",
        {"layer_rope_theta": [1e4, 0, 2e2]},
        {"layer_rope_theta": None},
    ),
    "granitemoe_swa one theta": ("granitemoe_swa", "granite_swa", {"layer_rope_theta": None}, None),
    "granitemoe_swa pattern": ("granitemoe_swa", "granite_swa", {"layer_types": None}, None),
    "granitemoe_swa own biases": ("granitemoe_swa", "granite_swa", {"attention_bias": True, **TIED}, None),
    "granitemoe_swa own heads": ("granitemoe_swa", "granite_swa", {"head_dim": 32}, None),
    "granitemoe_swa own window": ("granitemoe_swa", "granite_swa", {"sliding_window": 5}, {"sliding_window": 128}),
    "granitemoe_swa tied": ("granitemoe_swa", "smollm3", TIED, None),
    "granitemoe_swa biases": ("granitemoe_swa", "smollm3", {"attention_bias": True}, None),
    "granitemoe_swa wide heads": ("granitemoe_swa", "smollm3", {"head_dim": 32}, None),
    "granitemoe_swa interval": (
        "granitemoe_swa",
        "smollm3",
        {"no_rope_layers": None, "no_rope_layer_interval": 2},
        {"no_rope_layers": [1, 1, 1]},
    ),
    "granitemoe_swa window": (
        "granitemoe_swa",
        "smollm3",
        {"use_sliding_window": True, "sliding_window": WINDOW},
        {"layer_types": ["full_attention"] * 3},
    ),
    "ernie4_5_moe tied": ("ernie4_5_moe", "ernie4_5", TIED, None),
    "ernie4_5_moe narrow heads": ("ernie4_5_moe", "ernie4_5", {"head_dim": 16}, None),
    "hunyuan_v1_moe biases": ("hunyuan_v1_moe", "hunyuan_v1_dense", {"attention_bias": True}, None),
    "hunyuan_v1_moe alpha": ("hunyuan_v1_moe", "hunyuan_v1_dense", ALPHA, {"rope_scaling": None}),
    "cohere2_moe tied": ("cohere2_moe", "cohere2", TIED, None),
    "cohere2_moe biases": ("cohere2_moe", "cohere2", {"attention_bias": True}, None),
    "cohere2_moe cohere biases": ("cohere2_moe", "cohere", {"attention_bias": True}, None),
    "cohere2_moe cohere linear rope": ("cohere2_moe", "cohere", {"rope_scaling": LINEAR}, {"rope_scaling": None}),
    "cohere2_moe layers": (
        "cohere2_moe",
        "cohere2",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"layer_types": ["sliding_attention"] * 3},
    ),
    "lfm2_moe biases": ("lfm2_moe", "lfm2", {"conv_bias": True}, None),
    "lfm2_moe tied": ("lfm2_moe", "lfm2", TIED, None),
    "lfm2_moe plain width": ("lfm2_moe", "lfm2", {"block_auto_adjust_ff_dim": False}, None),
    "qwen3_5_moe tied": ("qwen3_5_moe", "qwen3_5_text", TIED, None),
    "qwen3_5_moe biases": ("qwen3_5_moe", "qwen3_5_text", {"attention_bias": True}, None),
    "qwen3_5_moe other theta": (
        "qwen3_5_moe",
        "qwen3_5_text",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}},
    ),
    "deepseek_v3 one q": ("deepseek_v3", "youtu", {"q_lora_rank": None}, None),
    "deepseek_v3 biases": ("deepseek_v3", "youtu", {"attention_bias": True}, None),
    "deepseek_v3 biases, one q": ("deepseek_v3", "youtu", {"attention_bias": True, "q_lora_rank": None}, None),
    "deepseek_v3 halves": ("deepseek_v3", "youtu", {"rope_interleave": False}, {"rope_interleave": True}),
    # With a padding token transformers loads a tied Youtu with zeros for that token's row.
    "deepseek_v3 tied": ("deepseek_v3", "youtu", {**TIED, "pad_token_id": None}, None),
    "deepseek_v3 yarn": ("deepseek_v3", "youtu", {"rope_scaling": YARN}, {"rope_scaling": None}),
    "glm4_moe norms, wide heads": ("glm4_moe", "qwen3", {"head_dim": 32}, None),
    "glm4_moe wide heads": ("glm4_moe", "qwen2", {"head_dim": 32}, None),
    "glm4_moe no biases": ("glm4_moe", "seed_oss", {"attention_bias": False}, None),
    "glm4_moe llama3 rope": ("glm4_moe", "llama", {"rope_scaling": LLAMA3}, {"rope_scaling": None}),
    "glm4_moe yarn": ("glm4_moe", "qwen2", {"rope_scaling": YARN}, {"rope_scaling": None}),
    "glm4_moe part": ("glm4_moe", "phi3", HALF, {"rope_parameters": None, "partial_rotary_factor": 1.0}),
    "glm4_moe part, long": (
        "glm4_moe",
        "phi3",
        {
            **HALF,
            **LONG,
            "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
        },
        None,
    ),
    "glm4_moe glm, a quarter": (
        "glm4_moe",
        "glm",
        {"partial_rotary_factor": 0.25},
        {"rope_parameters": None, "partial_rotary_factor": 0.5},
    ),
    "glm4_moe glm, whole heads": ("glm4_moe", "glm", {"partial_rotary_factor": 1.0}, None),
    "glm4_moe glm, no biases": ("glm4_moe", "glm", {"attention_bias": False}, None),
    "glm4_moe glm, tied": ("glm4_moe", "glm", TIED, None),
    "deepseek tied": ("deepseek", "llama", TIED, None),
    "deepseek biases": ("deepseek", "llama", {"attention_bias": True}, None),
    "deepseek linear rope": ("deepseek", "llama", {"rope_scaling": LINEAR}, {"rope_scaling": None}),
    "deepseek dynamic rope": (
        "deepseek",
        "mistral",
        {"rope_scaling": DYNAMIC, "max_position_embeddings": 16},
        {"rope_scaling": None},
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_a_feature_comes_through_exactly(name: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    host, family, options, _ = HELD[name]
    dense, ids = zoo(family, **options), token_ids(TOKENS, rows=2)

    merge_without_ray(merge_config(dense, [dense] * 2, mode="random", architecture=host), tmp_path / "merged")

    expected = logits_of(load_dense(dense), ids)
    # Tied embeddings make large logits: the bound is on the difference as a share of their size.
    bound = 1e-5 * max(1.0, expected.std().item())
    assert (logits_of(load_merged(tmp_path / "merged"), ids) - expected).abs().max() < bound


@pytest.mark.parametrize("name", [name for name, (_, _, _, without) in HELD.items() if without])
def test_the_feature_makes_a_difference(name: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    _, family, options, without = HELD[name]
    dense, ids = zoo(family, **options), token_ids(TOKENS, rows=2)
    drop = ("rope_parameters",) if "rope_scaling" in options else ()
    if "rope_theta" in options:
        without = {"rope_parameters": {"rope_type": "default", **(without or {})}}
    theta = {"rope_theta": 20_000.0} if drop else {}
    plain = copy_model(dense, tmp_path / "plain", config={**(without or {}), **theta}, drop_config=drop)
    assert (logits_of(load_dense(plain), ids) - logits_of(load_dense(dense), ids)).abs().max() > 1e-3


def scalings_of(pair: Pair) -> list[dict[str, Any]]:
    """Phi-3 has LongRoPE only, Gemma 4 one RoPE per kind of layer, and DeepSeek-MoE's code refuses two of these; see
    HELD and test_refusals.py."""
    if pair.family in ("phi3", "gemma4_text"):
        return []
    return [LINEAR] if pair.host == "deepseek" else [LINEAR, YARN, LLAMA3]


UNSHARED = [pair for pair in PAIRS if not pair.shared]
FIRST_OF_HOST = list({pair.host: pair for pair in reversed(UNSHARED)}.values())
# Every scaling in the first pair of each architecture, whose code computes it, and one in each other pair. The config
# that an architecture gets of a scaling does not depend on the family.
SCALED = [
    pytest.param(
        *(pair, scaling), marks=[] if pair in FIRST_OF_HOST or scaling is scalings_of(pair)[-1] else pytest.mark.soak
    )
    for pair in UNSHARED
    for scaling in scalings_of(pair)
]


@pytest.mark.parametrize(("pair", "scaling"), SCALED, ids=lambda of: of["rope_type"] if isinstance(of, dict) else of)
def test_a_scaled_rope_comes_through(
    pair: Pair, scaling: dict[str, Any], zoo: Callable[..., Path], tmp_path: Path
) -> None:
    options = {**pair.options, "rope_scaling": dict(scaling)}
    if pair.family == "qwen3_5_text":
        options = {"rope_parameters": {**scaling, "rope_theta": 500.0, "partial_rotary_factor": 0.5}}
    dense, ids = zoo(pair.family, **options), token_ids(TOKENS, rows=2)
    config = merge_config(dense, [dense] * 2, mode="random", architecture=pair.host)
    merge_without_ray(config, tmp_path / "merged")
    off = (logits_of(load_merged(tmp_path / "merged"), ids) - logits_of(load_dense(dense), ids)).abs().max()
    assert off < MAX_DIFFERENCE


@pytest.mark.parametrize(("given", "written"), [("rope", "rope"), (None, "nope")])
def test_no_rope_is_a_word(given: str | None, written: str, zoo: Callable[..., Path]) -> None:
    """Engines take null for RoPE, or refuse it. transformers takes any word but rope for none, as the tests of copies
    show."""
    dense = zoo("granitemoehybrid", **{**MAMBA, "position_embedding_type": given})
    plan = raymoe.plan(merge_config(dense, [dense] * 2, mode="random"), allow_all_same=True)
    assert plan.config["position_embedding_type"] == written


@pytest.mark.parametrize(
    ("kinds", "interval"),
    [("lfl", 2), ("llf", 3), ("fff", 1), ("lff", None), ("lll", None)],
    ids=lambda value: str(value),
)
def test_qwen3_5_has_the_keys_of_a_text_model_where_engines_look_for_them(
    kinds: str, interval: int | None, zoo: Callable[..., Path]
) -> None:
    """transformers takes such keys at the top of a config.json of this type for those of no model, and says nothing."""
    layers = [{"l": "linear_attention", "f": "full_attention"}[kind] for kind in kinds]
    dense = zoo("qwen3_5_text", layer_types=layers, **TIED)
    plan = raymoe.plan(merge_config(dense, [dense] * 2, mode="random"), allow_all_same=True)
    text = dict(plan.config["text_config"])
    assert plan.config["model_type"] == "qwen3_5_moe"
    assert plan.config["architectures"] == ["Qwen3_5MoeForCausalLM"]
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    shared = {"architectures", "model_type", "text_config", "tie_word_embeddings", "torch_dtype", *ids}
    assert plan.config.keys() == shared
    assert plan.config["tie_word_embeddings"] is text["tie_word_embeddings"] is True
    assert (text["layer_types"], text["full_attention_interval"]) == (layers, interval)
    assert not plan.reads_images


@pytest.mark.parametrize("scaling", [None, LINEAR])
def test_lfm2_has_its_rope_in_the_newer_form_too(
    scaling: dict[str, Any] | None, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    """Some engines read only that one. Scaling is there alone: transformers would let rope_scaling override it."""
    dense = copy_model(
        zoo("lfm2"),
        tmp_path / "dense",
        config={"rope_theta": 500.0, "rope_scaling": scaling},
        drop_config=["rope_parameters"],
    )
    config = raymoe.plan(merge_config(dense, [dense] * 2, mode="random"), allow_all_same=True).config
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0, **(scaling or {})}
    assert (config["rope_theta"], config["rope_scaling"]) == (500.0, None)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_layers_with_a_window_follow_from_their_number(family: str, first: int) -> None:
    written = make_config(family, **{**ALL_LAYERS, "max_window_layers": first}).to_dict()
    assert written["layer_types"] == ["full_attention"] * first + ["sliding_attention"] * (3 - first)
    older = {key: value for key, value in written.items() if key != "layer_types"}
    spec = read_spec(older, "older")
    assert spec == read_spec(written, "written")
    assert isinstance(spec, DenseSpec)
    assert spec.sliding_layers == tuple(layer >= first for layer in range(3))
    assert spec.sliding_window == (WINDOW if first < 3 else None)


@pytest.mark.parametrize("pair", {pair.host: pair for pair in PAIRS}.values(), ids=str)
def test_the_output_config_says_nothing_of_the_dense_model(
    pair: Pair, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    old = {"_name_or_path": "x/y", "auto_map": {"AutoConfig": "x--y.Z"}, "pretraining_tp": 1, "torch_dtype": "float32"}
    dense = copy_model(zoo(pair.family), tmp_path / "dense", config=old, drop_config=["dtype"])
    plan = raymoe.plan(pair.config(dense, [dense] * 2, dense, mode="random"), allow_all_same=True)
    assert plan.text_config["model_type"] == MOE_ARCHITECTURES[pair.host].model_type
    assert plan.config["architectures"] == [MOE_ARCHITECTURES[pair.host].class_name]
    for key in ("_name_or_path", "pretraining_tp", "dtype", "transformers_version"):
        assert key not in plan.config
    spec = read_spec(json.loads((dense / "config.json").read_text()), "dense")
    assert isinstance(spec, DenseSpec)
    shape = MoeShape(experts=2, experts_per_token=2, shared=int(pair.shared))
    own = moe_config(MOE_ARCHITECTURES[pair.host], spec, shape)
    for key in ("rope_parameters", "layer_types"):  # which the dense model may have too
        assert (key in plan.text_config) is (key in own)
    assert "x--y.Z" not in str(plan.config)
    assert plan.config["torch_dtype"] == "float32"
    kept = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.02}
    assert kept.items() <= plan.text_config.items()


@pytest.mark.parametrize(("host", "family"), [("qwen2_moe", "qwen2"), ("qwen2_moe", "mistral"), ("qwen3_moe", "qwen3")])
@pytest.mark.parametrize("windowed", [True, False])
def test_older_readers_find_the_windowed_layers_too(
    windowed: bool, host: str, family: str, zoo: Callable[..., Path]
) -> None:
    window = {"sliding_window": WINDOW} if family == "mistral" else ALL_LAYERS
    dense = zoo(family, **(window if windowed else {}))
    config = raymoe.plan(merge_config(dense, [dense] * 2, mode="random", architecture=host), allow_all_same=True).config
    # transformers 4 gives the window to layers from max_window_layers on.
    assert config["use_sliding_window"] is windowed
    assert config["max_window_layers"] == (0 if windowed else 3)
    assert config["sliding_window"] == (WINDOW if windowed else None)


@pytest.mark.parametrize(("host", "family"), [("mixtral", "llama"), ("qwen2_moe", "qwen2"), ("qwen3_moe", "qwen3")])
def test_tied_embeddings_are_written_once(host: str, family: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    dense = zoo(family, **TIED)
    plan = merge_without_ray(merge_config(dense, [dense] * 2, mode="random", architecture=host), tmp_path / "merged")
    assert plan.config["tie_word_embeddings"] is True
    names = tensors_of(tmp_path / "merged").keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_a_stored_copy_of_tied_embeddings_is_left_out(zoo: Callable[..., Path], tmp_path: Path) -> None:
    tied = zoo("llama", **TIED)
    embedding = tensors_of(tied)["model.embed_tokens.weight"]
    stored = copy_model(tied, tmp_path / "stored", tensors={"lm_head.weight": embedding.clone()})
    plan = merge_without_ray(merge_config(stored, [stored] * 2, mode="random"), tmp_path / "merged")
    assert "lm_head.weight" not in plan.index["weight_map"]
    ids = token_ids(TOKENS)
    expected = logits_of(load_dense(tied), ids)
    # Rounding grows with the value, and differs between processors: these logits are up to 10.
    torch.testing.assert_close(logits_of(load_merged(tmp_path / "merged"), ids), expected, rtol=1e-5, atol=1e-5)


def test_old_tensors_that_no_model_reads_are_left_out(zoo: Callable[..., Path], tmp_path: Path) -> None:
    dense = zoo("llama")
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(3)}
    plan = merge_without_ray(
        merge_config(copy_model(dense, tmp_path / "old", tensors=old), [dense] * 2, mode="random"), tmp_path / "merged"
    )
    assert not any("inv_freq" in name for name in plan.index["weight_map"])


@pytest.mark.parametrize(
    ("family", "key", "meant"),
    [
        ("mistral", "num_key_value_heads", 4),
        ("granite_swa", "num_key_value_heads", 4),
        ("youtu", "rope_interleave", False),
        ("seed_oss", "attention_bias", False),
        ("youtu", "q_lora_rank", None),
        ("mistral", "sliding_window", None),
        ("mistral", "rms_norm_eps", 1e-6),
    ],
)
def test_null_means_what_it_means_to_transformers(family: str, key: str, meant: object) -> None:
    config = make_config(family).to_dict()
    assert read_spec(config | {key: None}, "null") == read_spec(config | {key: meant}, "said")


def test_sinks_make_a_difference(zoo: Callable[..., Path], tmp_path: Path) -> None:
    dense, ids = zoo("granite_swa"), token_ids(TOKENS)
    sinks = {name: torch.zeros_like(held) for name, held in tensors_of(dense).items() if name.endswith("sinks")}
    assert len(sinks) == 3
    without = copy_model(dense, tmp_path / "without", tensors=sinks)
    assert (logits_of(load_dense(dense), ids) - logits_of(load_dense(without), ids)).abs().max() > 0.1


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("phi3", "qwen3_5_text", "gemma4_text")])
@pytest.mark.parametrize("scaling", [None, LINEAR, YARN], ids=["plain", "linear", "yarn"])
def test_both_generations_of_config_mean_the_same(family: str, scaling: dict[str, Any] | None) -> None:
    if family == "cwm":  # has scaling in any case, and then a theta of its own
        scaling = scaling or LLAMA3
    new = make_config(family, **({"rope_scaling": scaling} if scaling else {})).to_dict()
    assert new["rope_parameters"]["rope_theta"] == 20_000.0
    kept = ("layer_types",) if family in ("cohere2", "lfm2", "granite_swa", "granitemoehybrid") else ()
    old = {k: v for k, v in new.items() if k in kept or k not in ("rope_parameters", "layer_types", "dtype")}
    old |= {"rope_theta": 20_000.0, "rope_scaling": None, "torch_dtype": "float32"}
    if scaling:
        kind, *rest = scaling.items()
        old["rope_scaling"] = {"type": kind[1], **dict(rest)}
    assert read_spec(old, "old") == read_spec(new, "new")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "granitemoehybrid"])
def test_keys_left_out_have_the_values_that_transformers_gives_them(family: str) -> None:
    # Twice as many as there are key-value heads by default; as many, where it has to be.
    kv_heads = FAMILIES[family].defaults.get("num_key_value_heads", 16)
    heads = kv_heads if FAMILIES[family].has_latent_attention else 2 * kv_heads
    sizes = {"hidden_size": 8 * heads, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": heads}
    if family == "gemma4_text":  # by default it has what is refused
        sizes["hidden_size_per_layer_input"] = 0
    written_out = make_config(family).from_dict({**sizes, "vocab_size": VOCAB}).to_dict()
    short = read_spec({"model_type": family, "vocab_size": VOCAB, **sizes}, "short")
    full = read_spec(written_out, "full")
    assert isinstance(short, DenseSpec)
    assert short == full
