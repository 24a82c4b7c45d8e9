"""Gemma 4: two ways to write the heads of its layers, a norm that has to have no effect, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import raymoe
from raymoe.architectures.dense_spec import DenseSpec, read_spec
from raymoe.errors import ProblemReport
from raymoe.export.gguf import write_gguf
from raymoe.report.inspect import inspect_checkpoint
from tests.architectures.pairs import MAX_DIFFERENCE, load_merged
from tests.pico import (
    copy_model,
    load_dense,
    logits_of,
    make_config,
    merge_config,
    merge_without_ray,
    plan_problems,
    tensors_of,
    token_ids,
)

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif("gemma4_text" not in transformers.CONFIG_MAPPING, reason="transformers has no Gemma 4"),
]
FAMILY = "gemma4_text"
WITH_BIAS = {"attention_k_eq_v": False, "attention_bias": True, "tie_word_embeddings": True}


def difference_of_copies(dense: Path, folder: Path) -> float:
    merge_without_ray(merge_config(dense, [dense] * 3, mode="random"), folder)
    ids = token_ids(40, rows=2)
    expected = logits_of(load_dense(dense), ids)
    assert expected.std() > 0.5
    return (logits_of(load_merged(folder), ids) - expected).abs().max().item()


def test_values_of_their_own_biases_and_tied_embeddings(zoo: Callable[..., Path], tmp_path: Path) -> None:
    assert difference_of_copies(zoo(FAMILY, **WITH_BIAS), tmp_path / "merged") < MAX_DIFFERENCE


@pytest.mark.parametrize("size", [30.0, 0.01, 0.001])
def test_outputs_of_any_size_keep_their_norm(size: float, zoo: Callable[..., Path], tmp_path: Path) -> None:
    """The norm after the FFN divides by the root of what the outputs are and rms_norm_eps, here 1e-6, together."""
    dense = zoo(FAMILY)
    down = {name: size * held for name, held in tensors_of(dense).items() if name.endswith("mlp.down_proj.weight")}
    other = copy_model(dense, tmp_path / "other", tensors=down)
    assert difference_of_copies(other, tmp_path / "merged") < MAX_DIFFERENCE


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.15), ("float16", 0.02)])
def test_half_precision_is_as_near_as_its_rounding(
    dtype: str, most: float, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    """Logits go up to 5, of which one rounding of bfloat16 is 0.03, and of float16 0.004."""
    assert difference_of_copies(zoo(FAMILY, dtype=dtype), tmp_path / "merged") < most


def test_both_ways_to_write_heads_mean_the_same() -> None:
    """As published, and as transformers 5 saves it."""
    saved = json.loads(make_config(FAMILY).to_json_string())
    assert "global_head_dim" not in saved
    published = {key: value for key, value in saved.items() if key != "per_layer_config"}
    published |= {"global_head_dim": 32, "num_global_key_value_heads": 1}
    spec = read_spec(published, "published")
    assert isinstance(spec, DenseSpec) and spec == read_spec(saved, "saved")
    assert (spec.head_dim, spec.extra["global_head_dim"], spec.extra["num_global_key_value_heads"]) == (16, 32, 1)


def test_experts_are_byte_copies_and_routers_in_raymoes_scale(zoo: Callable[..., Path], tmp_path: Path) -> None:
    dense = zoo(FAMILY)
    plan = merge_without_ray(merge_config(dense, [dense] * 2, mode="random"), tmp_path / "merged")

    source, merged = tensors_of(dense), tensors_of(tmp_path / "merged")
    layer = "model.layers.1."
    assert torch.equal(merged[layer + "experts.down_proj"][1], source[layer + "mlp.down_proj.weight"])
    assert not merged[layer + "mlp.down_proj.weight"].any()
    assert torch.equal(merged[layer + "router.scale"], source[layer + "pre_feedforward_layernorm.weight"])
    routers = [merged[f"model.layers.{n}.router.proj.weight"].norm(dim=1).mean().item() / 8 for n in range(3)]
    assert inspect_checkpoint(tmp_path / "merged")["routers"]["row_norm"]["max"] == pytest.approx(max(routers))
    assert plan.config["moe_intermediate_size"] == 96 and plan.config["intermediate_size"] == 256
    assert "experts" not in inspect_checkpoint(dense)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "embeddings": ({"hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input is 8: each layer of such a model"),
    "embeddings by default": ({"hidden_size_per_layer_input": "default"}, "hidden_size_per_layer_input is 256"),
    "shared keys": ({"num_kv_shared_layers": 1}, "num_kv_shared_layers is 1"),
    "mixture": ({"enable_moe_block": True, "num_experts": 4}, "enable_moe_block is on: it is a mixture"),
    "both directions": ({"use_bidirectional_attention": "all"}, "its tokens attend to later ones"),
    "one RoPE": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "no rope_theta for sliding"),
    "unknown RoPE": (
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            }
        },
        "its RoPE is of type 'dynamic'",
    ),
    "other sizes": ({"per_layer_config": {"1": {"head_dim": 32}}}, "gives layers of one kind different heads"),
    "other keys": ({"per_layer_config": {"1": {"hidden_act": "silu"}}}, "per_layer_config has other keys than"),
    "heads that do not divide": (
        {"per_layer_config": {str(n): {"num_key_value_heads": 3} for n in (1, 2)}},
        "num_attention_heads 4 is not a multiple of 3",
    ),
    "heads of no size": ({"per_layer_config": {str(n): {"head_dim": "a"} for n in (1, 2)}}, "has head_dim 'a'"),
    "text for an object": ({"per_layer_config": "a"}, "per_layer_config is 'a'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_hold_is_named(name: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    config, pattern = REFUSED[name]
    dropped = [key for key, value in config.items() if value == "default"]
    dense = copy_model(zoo(FAMILY), tmp_path / "dense", config=config, drop_config=dropped)
    assert re.search(pattern, plan_problems(merge_config(dense, [dense] * 2, mode="random")))


def test_shared_experts_are_refused(zoo: Callable[..., Path]) -> None:
    """Its dense FFN has norms of its own, so that it is not added to the experts as it is."""
    dense = zoo(FAMILY)
    report = plan_problems(merge_config(dense, [dense] * 2, mode="random", shared=dense))
    assert "Gemma 4 MoE: shared_experts: it has none" in report


SPOILED = {
    "post_feedforward_layernorm_2.weight": lambda held: held * 1.01,
    "post_feedforward_layernorm_1.weight": lambda held: held * 0.5,
    "router.scale": lambda held: held + 0.01,
    "router.per_expert_scale": lambda held: torch.ones_like(held),
    "mlp.down_proj.weight": lambda held: held + 0.01,
}


@pytest.mark.parametrize("name", SPOILED)
def test_gguf_refuses_other_constants(name: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    """A file has those that raymoe writes."""
    dense = zoo(FAMILY)
    merge_without_ray(merge_config(dense, [dense] * 2, mode="random"), tmp_path / "merged")
    whole = tmp_path / "whole"
    load_merged(tmp_path / "merged").save_pretrained(whole)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dense / file, whole / file)
    assert write_gguf(whole, tmp_path / "whole.gguf").architecture == "gemma4"
    full = f"model.layers.1.{name}"
    other = copy_model(whole, tmp_path / "other", tensors={full: SPOILED[name](tensors_of(whole)[full])})
    with pytest.raises(ProblemReport, match=re.escape(f"can't be written to the file: {full}")):
        write_gguf(other, tmp_path / "other.gguf")


def test_gguf_refuses_other_rope(zoo: Callable[..., Path], tmp_path: Path) -> None:
    ropes = make_config(FAMILY).rope_parameters
    dense = zoo(FAMILY, rope_parameters={**ropes, "full_attention": {"rope_type": "default", "rope_theta": 1e4}})
    merge_without_ray(merge_config(dense, [dense] * 2, mode="random"), tmp_path / "merged")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dense / file, tmp_path / "merged" / file)
    with pytest.raises(ProblemReport, match="RoPE of types default, default: it has default with a window"):
        write_gguf(tmp_path / "merged", tmp_path / "model.gguf")


def test_a_merge_is_no_source_of_experts(zoo: Callable[..., Path], tmp_path: Path) -> None:
    dense = zoo(FAMILY)
    merge_without_ray(merge_config(dense, [dense] * 2, mode="random"), tmp_path / "merged")
    report = plan_problems(merge_config(tmp_path / "merged", [dense] * 2, mode="random"))
    assert "it is a mixture of experts already" in report
    assert (
        raymoe.plan(merge_config(dense, [dense] * 2, mode="random"), allow_all_same=True).architecture == "gemma4_moe"
    )
