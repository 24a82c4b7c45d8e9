"""Values of a config.json that no model can have: told in words, whatever a stranger wrote."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from raymoe.architectures import DenseSpec, read_spec
from raymoe.export.gguf.choose_target import choose_target, rope_base

HUGE = 10**400
LLAMA = {
    "model_type": "llama",
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 8),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2),
}
LFM2 = LLAMA | {"model_type": "lfm2", "block_auto_adjust_ff_dim": True}
YARN = {"rope_type": "yarn", "factor": 2.0}


def problems(config: dict[str, Any]) -> list[str]:
    found = read_spec(config, "m")
    assert not isinstance(found, DenseSpec)
    return [str(problem) for problem in found]


@pytest.mark.parametrize(
    ("keys", "theta"),
    [
        ({}, 10_000.0),
        ({"rope_theta": 3.0}, 3.0),
        ({"rope_parameters": {"rope_theta": 500.0}}, 500.0),
        ({"rope_theta": 3.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, 500.0),
        ({"rope_theta": 3.0, "rope_scaling": YARN}, 3.0),
    ],
)
def test_theta_is_read_where_transformers_reads_it(keys: dict[str, Any], theta: float) -> None:
    """Version 5 keeps it among the parameters of RoPE, version 4 beside them."""
    spec = read_spec(LLAMA | keys, "m")
    assert isinstance(spec, DenseSpec) and spec.rope_theta == theta


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LLAMA | {"rope_theta": HUGE}, "rope_theta is 1000"),
        (LLAMA | {"rope_parameters": {"rope_theta": HUGE}}, "rope_theta is 1000"),
        (LLAMA | {"rms_norm_eps": HUGE}, "rms_norm_eps is 1000"),
        (LLAMA | {"partial_rotary_factor": HUGE}, "partial_rotary_factor is 1000"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": HUGE}}, "factor of its RoPE is 1000"),
        (LLAMA | {"rope_scaling": YARN | {"beta_fast": HUGE}}, "beta_fast of its RoPE is 1000"),
        (LLAMA | {"rope_scaling": YARN | {"mscale": "1"}}, "mscale of its RoPE is '1'"),
        (LLAMA | {"rope_scaling": YARN | {"mine": HUGE}}, "mine of its RoPE is 1000"),
        (LLAMA | {"rope_scaling": YARN | {"mine": [1, -HUGE]}}, "mine of its RoPE is [1, -1000"),
        (LLAMA | {"model_type": "granite", "logits_scaling": HUGE}, "logits_scaling is 1000"),
        (LLAMA | {"model_type": "granite", "embedding_multiplier": -HUGE}, "embedding_multiplier is -1000"),
        (LLAMA | {"model_type": "cohere", "logit_scale": HUGE}, "logit_scale is 1000"),
        (LLAMA | {"model_type": "granite_swa", "layer_rope_theta": [1, HUGE]}, "layer_rope_theta is [1, 1000"),
        (LFM2 | {"block_ffn_dim_multiplier": HUGE}, "block_ffn_dim_multiplier is 1000"),
        (LFM2 | {"block_ffn_dim_multiplier": float("inf")}, "block_ffn_dim_multiplier is inf"),
        (LLAMA | {"model_type": "granitemoehybrid", "time_step_limit": [0, HUGE]}, "time_step_limit is [0, 1000"),
        (LLAMA | {"model_type": "granitemoehybrid", "time_step_limit": ["a", 1]}, "time_step_limit is ['a', 1]"),
        (LLAMA | {"model_type": "granitemoehybrid", "time_step_limit": [0, {"a": 1}]}, "time_step_limit is [0, {"),
    ],
)
def test_numbers_that_no_float_holds(config: dict[str, Any], said: str) -> None:
    (problem,) = problems(config)
    assert f"m/config.json: {said}" in problem and len(problem) < 400


def test_a_rope_with_settings_for_thousands_of_layers() -> None:
    """Each problem takes half a millisecond, and its place in the message."""
    found = problems(LLAMA | {"rope_scaling": {f"layer {number}": {} for number in range(100_000)}})
    assert len(found) == 6
    assert "settings for layer 0 layers alone" in found[0]
    assert "and more problems of this kind" in found[-1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_theta": 1e39}, "rope_theta 1e+39: at most 3.40282e+38"),
        ({"rms_norm_eps": 10**40}, "rms_norm_eps 1e+40: at most 3.40282e+38"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings 1.09951e+12: a whole number below 4294967296"),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 0.5}},
            "original_max_position_embeddings 0.5: a whole number",
        ),
    ],
)
def test_numbers_that_a_gguf_file_cannot_hold(changes: dict[str, Any], said: str) -> None:
    spec = read_spec(LLAMA | {"head_dim": 4, "model_type": "mistral", "sliding_window": None} | changes, "m")
    assert isinstance(spec, DenseSpec)
    with pytest.raises(Exception, match="can't hold this model") as caught:
        choose_target(spec, None, shared_is_empty=False, label="m")
    assert said in str(caught.value)


@pytest.mark.parametrize(("head_dim", "alpha"), [(2, 1000.0), (3, 1e300), (5, -1000.0)])
def test_an_alpha_that_gives_no_base(head_dim: int, alpha: float) -> None:
    scaling = {"rope_type": "dynamic", "factor": 1.0, "alpha": alpha}
    spec = read_spec(LLAMA | {"model_type": "hunyuan_v1_dense", "head_dim": 4, "rope_scaling": scaling}, "m")
    assert isinstance(spec, DenseSpec)
    assert rope_base(dataclasses.replace(spec, head_dim=head_dim)) > 1e308
