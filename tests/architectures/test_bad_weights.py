"""Weights that are not what config.json says: named while planning."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import raymoe
from tests.pico import LAYERS, copy_model, merge_config, plan_problems, tensors_of

ATTENTION, FFN = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("prompt_model", ["base", "expert", "grafted"])
@pytest.mark.parametrize("name", [ATTENTION, FFN, "model.norm.weight", "model.embed_tokens.weight"])
def test_a_tensor_that_the_base_lacks_is_named(
    name: str, prompt_model: str, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    base = copy_model(zoo("llama"), tmp_path / "base", tensors={name: None})
    report = plan_problems(merge_config(base, [zoo("llama")] * 2, prompt_model=prompt_model))
    assert re.search(rf"base_model \(.*\): 1 tensor\(s\) missing: {re.escape(name)}", report), report


def test_a_missing_head_has_its_own_remedy(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base = copy_model(zoo("llama"), tmp_path / "base", tensors={"lm_head.weight": None})
    report = plan_problems(merge_config(base, [zoo("llama")] * 2))
    assert re.search(r"missing: lm_head.weight\n.*tie_word_embeddings: true", report)


def test_many_missing_tensors_are_counted(zoo: Callable[..., Path], tmp_path: Path) -> None:
    names = [name for name in tensors_of(zoo("llama")) if ".mlp." in name]
    expert = copy_model(zoo("llama"), tmp_path / "expert", tensors=dict.fromkeys(names))
    report = plan_problems(merge_config(zoo("llama"), [expert, zoo("llama", seed=1)]))
    assert len(names) == 3 * LAYERS
    assert re.search(r"experts\[0\].*: 9 tensor\(s\) missing: .* and 5 more", report)


def test_an_expert_needs_no_more_than_is_read_of_it(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base = zoo("llama")
    attention = [name for name in tensors_of(base) if ".mlp." not in name]
    ffn_only = copy_model(base, tmp_path / "ffn", tensors=dict.fromkeys(attention))
    for mode, prompt_model in (("hidden", "base"), ("hidden", "grafted"), ("cheap_embed", "expert")):
        config = merge_config(base, [ffn_only, zoo("llama", seed=1)], mode=mode, prompt_model=prompt_model)
        assert raymoe.plan(config).architecture == "mixtral"
    config = merge_config(base, [ffn_only, zoo("llama", seed=1)], prompt_model="expert")
    assert re.search(r"experts\[0\].*tensor\(s\) missing: model.embed_tokens.weight", plan_problems(config))


@pytest.mark.parametrize("place", ["base_model", "experts[1]"])
def test_a_tensor_that_no_row_names_is_an_error(place: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    dense = zoo("llama")
    extra = {
        "model.layers.0.self_attn.q_norm.weight": torch.ones(16),
        "model.layers.3.mlp.up_proj.weight": torch.ones(1),
    }
    other = copy_model(dense, tmp_path / "other", tensors=extra)
    base, expert = (other, dense) if place == "base_model" else (dense, other)
    report = plan_problems(merge_config(base, [dense, expert], mode="random"))
    assert re.search(rf"{re.escape(place)}.*2 tensor\(s\) that a llama model does not have: ", report)
    assert "model.layers.0.self_attn.q_norm.weight" in report
    assert "model.layers.3.mlp.up_proj.weight" in report


def test_a_tensor_of_another_shape_is_named(zoo: Callable[..., Path], tmp_path: Path) -> None:
    dense = zoo("llama")
    other = copy_model(dense, tmp_path / "other", tensors={FFN: torch.ones(96, 60), ATTENTION: torch.ones(64)})
    report = plan_problems(merge_config(other, [dense, dense], mode="random"))
    assert re.search(
        rf"base_model.*2 tensor\(s\) with a shape.*{re.escape(FFN)} is \[96, 60\], expected \[96, 64\]", report
    )
    assert re.search(rf"{re.escape(ATTENTION)} is \[64\], expected \[64, 64\]", report)
    report = plan_problems(merge_config(dense, [dense, other], mode="random"))
    assert re.search(rf"experts\[1\].*1 tensor\(s\) with a shape.*{re.escape(FFN)}", report)


def test_integer_weights_are_refused(zoo: Callable[..., Path], tmp_path: Path) -> None:
    dense = zoo("llama")
    other = copy_model(dense, tmp_path / "other", tensors={FFN: torch.ones(96, 64, dtype=torch.int32)})
    assert re.search(r"I32", plan_problems(merge_config(dense, [other, dense], mode="random")))
