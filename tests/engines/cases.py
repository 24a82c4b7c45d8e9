"""Small merges of every MoE architecture and feature on which engines differ: what scripts/run_engines.py runs.

Each merge has different experts, random routers, weights in float32, 256 wide hidden states and heads of 64 (kernels of
some engines take no smaller ones). What a case is about are `features`; a case without them is about the architecture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raymoe.planning import MergePlan
from tests.architectures.pairs import DYNAMIC, LINEAR, LLAMA3, MIXED_LAYERS, WINDOW, YARN
from tests.pico import merge_config, merge_without_ray, save_model

TOKENS = 72
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.02 * i for i in range(32)],
    "long_factor": [2.0 + 0.1 * i for i in range(32)],
}


@dataclass(frozen=True)
class Case:
    """One merge. `row` is the architecture and its features as in rows.csv."""

    architecture: str
    family: str
    features: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    experts: int = 2
    experts_per_token: int = 2
    shared: int = 0

    def __str__(self) -> str:
        return "-".join([self.architecture, self.family, *self.features])


_COHERE = {"sliding_window": 256, "tie_word_embeddings": True}
_QWEN3_5 = {"tie_word_embeddings": False, "linear_value_head_dim": 64}
_HYBRID = {"shared_intermediate_size": 256, "tie_word_embeddings": False}
_MAMBA = {
    "layer_types": ["mamba", "attention", "mamba"],
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
_GLM_HALF = {"partial_rotary_factor": 0.5}
# What a family's models have in all cases, so that a case is about its features alone.
_ALWAYS: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": False},
    "cohere2": _COHERE,
    "granite": {"tie_word_embeddings": False},
    "granitemoehybrid": _HYBRID,
    "qwen3_5_text": _QWEN3_5,
    "lfm2": {"tie_word_embeddings": True},
    "hunyuan_v1_dense": {"tie_word_embeddings": False},
    "olmo2": {"tie_word_embeddings": False},
    "granite_swa": {"layer_types": ["full_attention"] * 3, "layer_rope_theta": [20_000.0] * 3, "sliding_window": None},
    "glm": {"tie_word_embeddings": False},
    "youtu": {
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 512,  # with RoPE's, the width that vLLM's kernel for CPUs has
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
    },
    "gemma4_text": {"global_head_dim": 128, "num_global_key_value_heads": 1},
}
# Sizes that a family's configuration has no keys for.
_WITHOUT: dict[str, tuple[str, ...]] = {"youtu": ("head_dim",)}

_TOP1 = {"experts": 4, "experts_per_token": 1}
_TOP2 = {"experts": 4}


def _usual(architecture: str, family: str, *, top1: bool = True) -> Sequence[Case]:
    """An architecture with two experts, with two of four per token, and with one of four."""
    cases = [Case(architecture, family), Case(architecture, family, ("renormalize",), **_TOP2)]  # type: ignore[arg-type]
    return [*cases, Case(architecture, family, ("top1",), **_TOP1)] if top1 else cases  # type: ignore[arg-type]


# mlx-lm does not make the weights of several chosen experts sum to one in these: features are looked at without that.
_ALL_EXPERTS = frozenset({"deepseek", "qwen2_moe"})


def _each(architecture: str, family: str, with_shared: int = 0, /, **options: dict[str, Any]) -> Sequence[Case]:
    """A case for each feature, with the keys of the dense config that give it."""
    experts = 2 if architecture in _ALL_EXPERTS else 4
    return [
        Case(architecture, family, tuple(features.split("+")), keys, experts=experts, shared=with_shared)
        for features, keys in options.items()
    ]


_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
# Granite's embeddings are multiplied: without a scale, one token would have all of the probability.
_TIED_GRANITE = {**_TIED, "logits_scaling": 16.0}
_BIASES = "qkv_bias+o_bias"
_WINDOW = {"sliding_window": WINDOW}
_SOME = {**_WINDOW, "layer_types": MIXED_LAYERS}
_ROPES = {
    "rope_linear": {"rope_scaling": LINEAR},
    "rope_dynamic": {"rope_scaling": DYNAMIC},
    "rope_yarn": {"rope_scaling": YARN},
    "rope_llama3": {"rope_scaling": LLAMA3},
}
# The text is shorter than the original length: some engines take the factors of long texts for all texts.
_ORIGINAL, _LONGEST = {"original_max_position_embeddings": 256}, {"max_position_embeddings": 1024}
_LONG = {"rope_scaling": LONGROPE, **_ORIGINAL, **_LONGEST}
# Of families that read the original length among the settings of RoPE.
_LONGER = {"rope_scaling": {**LONGROPE, **_ORIGINAL, "factor": 4.0}, **_LONGEST}
_ALL_LAYERS = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}

CASES: tuple[Case, ...] = (
    *_usual("mixtral", "llama"),
    *_each("mixtral", "llama", tied=_TIED, head_dim={"head_dim": 32}, **_ROPES),
    *_each("mixtral", "phi3", rope_longrope=_LONG),
    *_each("mixtral", "mistral", window_all=_WINDOW),
    *_usual("deepseek", "llama", top1=False),
    *_each(
        "deepseek", "llama", tied_stored=_TIED, rope_linear=_ROPES["rope_linear"], rope_dynamic=_ROPES["rope_dynamic"]
    ),
    *_each("deepseek", "llama", **{_BIASES: {"attention_bias": True}}),
    *_each("deepseek", "llama", 1, shared={}),
    *_usual("qwen2_moe", "llama"),
    *_each("qwen2_moe", "llama", tied=_TIED, **_ROPES),
    *_each("qwen2_moe", "phi3", rope_longrope=_LONG),
    *_each("qwen2_moe", "qwen2", qkv_bias={}, window_all=_ALL_LAYERS),
    *_each("qwen2_moe", "ministral", window_some=_SOME),
    *_each("qwen2_moe", "llama", 1, shared={}),
    *_usual("qwen3_moe", "qwen3"),
    *_each("qwen3_moe", "qwen3", tied=_TIED, head_dim={"head_dim": 128}, window_all=_ALL_LAYERS, **_ROPES),
    *_each("qwen3_moe", "qwen3", **{_BIASES: {"attention_bias": True}}),
    *_each("qwen3_moe", "qwen3", rope_longrope=_LONGER),
    *_usual("qwen3_5_moe", "qwen3_5_text"),
    *_each("qwen3_5_moe", "qwen3_5_text", tied=_TIED),
    *_each("qwen3_5_moe", "qwen3_5_text", 1, shared={}),
    *_usual("granitemoe", "granite"),
    *_each("granitemoe", "granite", tied=_TIED_GRANITE, **_ROPES),
    *_each("granitemoe", "granite", **{_BIASES: {"attention_bias": True}}),
    *_each("granitemoe", "granite", rope_longrope=_LONGER),
    *_usual("granitemoeshared", "granitemoehybrid"),
    *_each("granitemoeshared", "granitemoehybrid", tied=_TIED_GRANITE),
    *_each("granitemoeshared", "granitemoehybrid", 1, shared={}),
    *_usual("granitemoehybrid", "granitemoehybrid"),
    *_each("granitemoehybrid", "granitemoehybrid", tied=_TIED_GRANITE),
    *_each("granitemoehybrid", "granitemoehybrid", state_layers=_MAMBA, rope_llama3=_ROPES["rope_llama3"]),
    # llama.cpp needs layers of both kinds, as published models have them.
    *_each(
        "granitemoehybrid", "granitemoehybrid", **{"no_rope+state_layers": {**_MAMBA, "position_embedding_type": None}}
    ),
    *_each("granitemoehybrid", "granitemoehybrid", 1, shared={}),
    *_usual("granitemoe_swa", "smollm3"),
    *_each("granitemoe_swa", "smollm3", tied=_TIED, rope_yarn=_ROPES["rope_yarn"], rope_llama3=_ROPES["rope_llama3"]),
    *_each("granitemoe_swa", "cwm", head_dim={"head_dim": 32, "layer_types": ["full_attention"] * 3}),
    *_each("granitemoe_swa", "granite_swa", window_some={**_SOME, "layer_rope_theta": [20_000.0, 0, 20_000.0]}),
    *_each("granitemoe_swa", "smollm3", 1, shared={}),
    *_usual("ernie4_5_moe", "ernie4_5"),
    *_each("ernie4_5_moe", "ernie4_5", tied=_TIED, rope_yarn=_ROPES["rope_yarn"], rope_llama3=_ROPES["rope_llama3"]),
    *_each("ernie4_5_moe", "ernie4_5", 1, shared={}),
    *_each("ernie4_5_moe", "ernie4_5", rope_linear=_ROPES["rope_linear"], rope_longrope=_LONGER),
    *_usual("hunyuan_v1_moe", "hunyuan_v1_dense"),
    *_each("hunyuan_v1_moe", "hunyuan_v1_dense", tied=_TIED, rope_dynamic=_ROPES["rope_dynamic"]),
    *_each("hunyuan_v1_moe", "hunyuan_v1_dense", **{_BIASES: {"attention_bias": True}}),
    *_each("hunyuan_v1_moe", "hunyuan_v1_dense", 1, shared={}),
    *_usual("cohere2_moe", "cohere2"),
    *_each("cohere2_moe", "cohere2", untied=_UNTIED, rope_linear=_ROPES["rope_linear"], window_some=_WINDOW),
    *_each("cohere2_moe", "cohere2", **{_BIASES: {"attention_bias": True}}),
    *_each("cohere2_moe", "cohere2", 1, shared={}),
    *_usual("lfm2_moe", "lfm2"),
    *_each("lfm2_moe", "lfm2", untied=_UNTIED),
    *_usual("glm4_moe", "llama"),
    *_each("glm4_moe", "llama", tied_stored=_TIED, head_dim={"head_dim": 32}, **_ROPES),
    *_each("glm4_moe", "llama", rope_longrope=_LONGER),
    *_each("glm4_moe", "phi3", partial_rotary=_GLM_HALF),
    *_each("glm4_moe", "qwen2", qkv_bias={}),
    *_each("glm4_moe", "llama", 1, shared={}),
    *_usual("deepseek_v3", "youtu"),
    *_each("deepseek_v3", "youtu", tied_stored=_TIED, rope_yarn=_ROPES["rope_yarn"]),
    *_each("deepseek_v3", "youtu", 1, shared={}),
    *_usual("flex_olmo", "olmo2"),
    *_each("flex_olmo", "olmo2", tied=_TIED, rope_llama3=_ROPES["rope_llama3"]),
    *_each("flex_olmo", "olmo2", **{_BIASES: {"attention_bias": True}}),
    *_usual("gemma4_moe", "gemma4_text"),
    *_each("gemma4_moe", "gemma4_text", tied=_TIED),
)


def dense_options(case: Case) -> dict[str, Any]:
    """Keys of the dense models' config."""
    sizes = {key: value for key, value in SIZES.items() if key not in _WITHOUT.get(case.family, ())}
    return {**sizes, **_ALWAYS.get(case.family, {}), **case.options}


def make_merge(case: Case, folder: Path) -> MergePlan:
    """Write the dense models of a case and their merge, to FOLDER/merged."""
    options = dense_options(case)
    dense = [save_model(folder / f"dense-{seed}", case.family, seed=seed, **options) for seed in range(case.experts)]
    config = merge_config(
        dense[0],
        dense,
        mode="random",
        architecture=case.architecture,
        experts_per_token=case.experts_per_token,
        shared=dense[-1] if case.shared else None,
    )
    return merge_without_ray(config, folder / "merged")


def architecture_of(folder: Path) -> str:
    """The class that a merge's config.json names."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return str(content["architectures"][0])
