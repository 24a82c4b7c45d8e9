"""Tokenizers that are missing, adapters, and what a merge does not take from an expert: refused, or warned of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import raymoe
from raymoe.planning import MergeOptions
from tests.pico import copy_model, merge_config, plan_problems, save_lora


@pytest.mark.parametrize("mode", ["hidden", "ridge", "cheap_embed"])
def test_prompts_need_a_tokenizer(mode: str, zoo: Callable[..., Path]) -> None:
    without, expert = zoo("llama", seed=7, tokenizer=False), zoo("llama")
    text = plan_problems(merge_config(without, [expert, without], mode=mode))
    assert re.search(
        rf"base_model \(.*\): there is no tokenizer in it, with which gate_mode {mode} reads prompts", text
    )
    assert "gate_mode: random" in text


def test_an_output_without_a_tokenizer_is_warned_of(zoo: Callable[..., Path]) -> None:
    without, expert = zoo("llama", seed=7, tokenizer=False), zoo("llama")
    config = merge_config(without, [expert, without], mode="random")
    assert any("and so none in the output" in warning for warning in raymoe.plan(config).warnings)
    assert not raymoe.plan(config, MergeOptions(copy_tokenizer=False)).warnings
    assert not raymoe.plan(merge_config(expert, [expert, without], mode="random")).warnings


@pytest.mark.parametrize(("modules", "warned"), [(["q_proj", "v_proj"], True), (["q_proj", "up_proj"], False)])
def test_an_adapter_that_leaves_ffns_alone(
    modules: list[str], warned: bool, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    base = zoo("llama")
    adapter = save_lora(tmp_path / "adapter", base, modules)
    plan = raymoe.plan(merge_config(base, [f"{base}+{adapter}", base], mode="random"))
    found = [warning for warning in plan.warnings if "changes no weight of an FFN" in warning]
    assert bool(found) is warned
    assert not found or found[0].startswith("experts[0]: its adapter ")


@pytest.mark.parametrize(
    ("name", "warned"), [("llama-0", False), ("org/LLAMA-0/", False), ("org/other", True), ("", False)]
)
def test_an_adapter_of_another_model(name: str, warned: bool, zoo: Callable[..., Path], tmp_path: Path) -> None:
    base = tmp_path / "llama-0"
    base.symlink_to(zoo("llama"))
    adapter = save_lora(tmp_path / "adapter", base, ["up_proj"])
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": name}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    plan = raymoe.plan(merge_config(base, [f"{base}+{adapter}", base], mode="random"))
    said = [w for w in plan.warnings if "this adapter was made for org/other, and is applied to" in w]
    assert bool(said) is warned


def test_what_an_expert_has_and_a_merge_has_not(zoo: Callable[..., Path]) -> None:
    base, longer = zoo("llama"), zoo("llama", seed=1, max_position_embeddings=512)
    plan = raymoe.plan(merge_config(base, [longer, base], mode="random"))
    assert plan.warnings == ("experts[0]: max_position_embeddings 512 differs from the base's 256, which is used",)
    crime = merge_config(base, [zoo("mistral", seed=1), base], mode="random")
    plan = raymoe.plan(crime, MergeOptions(allow_crimes=True))
    assert plan.warnings == ("experts[0]: its FFNs are those of a mistral model, in the layers of a llama model",)


def test_what_is_wrong_with_a_type_is_said_once(zoo: Callable[..., Path], tmp_path: Path) -> None:
    gemma = copy_model(zoo("llama"), tmp_path / "gemma", config={"model_type": "gemma2"})
    text = plan_problems(merge_config(gemma, [gemma] * 3, mode="random"))
    assert text.count("also normalizes the values of attention") == 1


def test_biases_of_ffns_are_told_as_such(zoo: Callable[..., Path]) -> None:
    text = plan_problems(merge_config(zoo("llama"), [zoo("llama", mlp_bias=True), zoo("llama")], mode="random"))
    assert "mlp_bias is True, but the base's is False" in text and "stores its FFN differently" not in text


def test_another_architecture_that_could(zoo: Callable[..., Path]) -> None:
    dense = zoo("llama")
    text = plan_problems(merge_config(dense, [dense] * 2, mode="random", architecture="mixtral", shared=dense))
    assert "architecture 'mixtral' can't hold a llama base with 2 experts, 2 per token, 1 shared" in text
    assert re.search(r"or another architecture \(deepseek, .*qwen2_moe.* can\)", text)
