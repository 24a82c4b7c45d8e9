"""What a dense model may have besides plain attention: carried over exactly wherever the host can hold it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from raymoe.architectures import read_spec

from tests.architectures.hosts import WINDOW, load_merged
from tests.pico import VOCAB, copy_model, load_dense, logits_of, make_config, merge_config, merge_without_ray
from tests.pico import tensors_of, token_ids

TOKENS = 48
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 3.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ALL_LAYERS = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}
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
    "qwen2_moe mistral window": ("qwen2_moe", "mistral", {"sliding_window": WINDOW}, {"sliding_window": None}),
    "qwen2_moe llama3 rope": ("qwen2_moe", "llama", {"rope_scaling": LLAMA3}, {"rope_scaling": None}),
    "qwen2_moe linear rope": ("qwen2_moe", "llama", {"rope_scaling": LINEAR}, {"rope_scaling": None}),
    "qwen3_moe tied": ("qwen3_moe", "qwen3", TIED, None),
    "qwen3_moe wide heads": ("qwen3_moe", "qwen3", {"head_dim": 32}, None),
    "qwen3_moe biases": ("qwen3_moe", "qwen3", {"attention_bias": True}, None),
    "qwen3_moe yarn": ("qwen3_moe", "qwen3", {"rope_scaling": YARN}, {"rope_scaling": None}),
    "qwen3_moe window": ("qwen3_moe", "qwen3", ALL_LAYERS, {"use_sliding_window": False, "layer_types": None}),
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
    assert (logits_of(load_merged(tmp_path / "merged"), ids) - expected).abs().max() < 1e-5


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
    assert (logits_of(load_merged(tmp_path / "merged"), ids) - expected).abs().max() < 1e-5


def test_old_tensors_that_no_model_reads_are_left_out(zoo: Callable[..., Path], tmp_path: Path) -> None:
    import torch

    dense = zoo("llama")
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(3)}
    plan = merge_without_ray(
        merge_config(copy_model(dense, tmp_path / "old", tensors=old), [dense] * 2, mode="random"), tmp_path / "merged"
    )
    assert not any("inv_freq" in name for name in plan.index["weight_map"])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("scaling", [None, LINEAR, YARN], ids=["plain", "linear", "yarn"])
def test_both_generations_of_config_mean_the_same(family: str, scaling: dict[str, Any] | None) -> None:
    new = make_config(family, **({"rope_scaling": scaling} if scaling else {})).to_dict()
    assert new["rope_parameters"]["rope_theta"] == 20_000.0
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "layer_types", "dtype")}
    old |= {"rope_theta": 20_000.0, "rope_scaling": None, "torch_dtype": "float32"}
    if scaling:
        kind, *rest = scaling.items()
        old["rope_scaling"] = {"type": kind[1], **dict(rest)}
    assert read_spec(old, "old") == read_spec(new, "new")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_keys_left_out_have_the_values_that_transformers_gives_them(family: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 32}
    written_out = make_config(family).from_dict({**sizes, "vocab_size": VOCAB}).to_dict()
    short = read_spec({"model_type": family, "vocab_size": VOCAB, **sizes}, "short")
    full = read_spec(written_out, "full")
    assert dataclasses.is_dataclass(short)
    assert short == full
