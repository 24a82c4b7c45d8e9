"""Remedies for adapters, each tried with peft itself: what merges, what can't, and what peft silently skips."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from raymoe.config.model_refs import parse_model_ref
from raymoe.errors import CheckpointError
from raymoe.sources.facts import AdapterFacts
from raymoe.sources.resolve import resolve_model

pytestmark = pytest.mark.engines

peft = pytest.importorskip("peft")
FFN = ["gate_proj", "up_proj", "down_proj"]
WEIGHTS = "adapter_model.safetensors"


def load(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def save_adapter(base: Path, folder: Path, **options: Any) -> Path:
    wrapped = peft.get_peft_model(
        load(base), peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": FFN, **options})
    )
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()
    return state


def changed_by_peft(base: Path, adapter: Path) -> set[str]:
    before = load(base).state_dict()
    return {name for name, tensor in merged_by_peft(base, adapter).items() if not torch.equal(tensor, before[name])}


def rename(adapter: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file({change(name): tensor for name, tensor in tensors.items()}, adapter / WEIGHTS)


def facts_of(base: Path, adapter: Path) -> AdapterFacts:
    facts = resolve_model(parse_model_ref(f"{base}+{adapter}")).adapter
    assert facts is not None
    return facts


def remedies(base: Path, adapter: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        facts_of(base, adapter)
    return "\n".join(str(problem) for problem in caught.value.problems)


# Without peft's prefix, of another class, of another wrapper, after an adapter of another name.
RENAMED: dict[str, Callable[[str], str]] = {
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "language_model": lambda name: name.replace("model.layers", "model.language_model.layers"),
    "wrapper": lambda name: name.replace("model.layers", "module.model.layers"),
    "another adapter's name": lambda name: name.replace(".weight", ".mine.weight"),
}


@pytest.mark.parametrize("kind", RENAMED)
def test_names_that_peft_skips_can_be_renamed_as_is_said(kind: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    base, adapter = zoo("llama"), save_adapter(zoo("llama"), tmp_path / "lora")
    good, names = facts_of(base, adapter), {RENAMED[kind](name): name for name in load_file(adapter / WEIGHTS)}
    rename(adapter, RENAMED[kind])
    assert changed_by_peft(base, adapter) == set()
    text = remedies(base, adapter)
    assert "Merging it with peft would return the model unchanged" in text
    # One name is shown as it is and as it has to be.
    _, shown, _, right, *_ = text.split("'")
    assert names[shown] == right
    rename(adapter, names.__getitem__)
    assert facts_of(base, adapter).pairs.keys() == good.pairs.keys() == changed_by_peft(base, adapter)


@pytest.mark.parametrize("dora", [False, True])
def test_names_with_default_are_read_as_peft_reads_them(dora: bool, zoo: Callable[..., Path], tmp_path: Path) -> None:
    base, adapter = zoo("llama"), save_adapter(zoo("llama"), tmp_path / "lora", use_dora=dora)
    good, merged = facts_of(base, adapter), merged_by_peft(base, adapter)

    def change(name: str) -> str:
        return f"{name}.default.weight" if name.endswith("vector") else name.replace(".weight", ".default.weight")

    rename(adapter, change)
    facts = facts_of(base, adapter)
    assert {name: pair.magnitude is not None for name, pair in facts.pairs.items()} == dict.fromkeys(good.pairs, dora)
    again = merged_by_peft(base, adapter)
    assert all(torch.equal(merged[name], again[name]) for name in merged)
    assert facts.pairs.keys() == changed_by_peft(base, adapter)


def test_empty_files_and_tensors_are_of_no_use_to_peft_either(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base, adapter = zoo("llama"), save_adapter(zoo("llama"), tmp_path / "lora")
    names = list(load_file(adapter / WEIGHTS))
    save_file({}, adapter / WEIGHTS)
    assert changed_by_peft(base, adapter) == set()
    assert "zero_to_fp32.py" in remedies(base, adapter)
    save_file({name: torch.zeros(0) for name in names}, adapter / WEIGHTS)
    with pytest.raises(RuntimeError, match="size mismatch"):
        merged_by_peft(base, adapter)
    assert "zero_to_fp32.py" in remedies(base, adapter)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"use_qalora": True, "qalora_group_size": 4},
    ],
    ids=lambda options: next(iter(reversed(options))),
)
def test_what_is_to_be_merged_with_peft_can_be(
    options: dict[str, Any], zoo: Callable[..., Path], tmp_path: Path
) -> None:
    base, adapter = zoo("llama"), save_adapter(zoo("llama"), tmp_path / "lora", **options)
    assert "merge_and_unload" in remedies(base, adapter)
    peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    expert = resolve_model(parse_model_ref(str(tmp_path / "merged")))
    assert changed_by_peft(base, adapter) <= expert.index.tensors.keys() == load(base).state_dict().keys()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lora_bias": True}, "Impossible to merge LoRA with `lora_bias=True`"),
        ({"alora_invocation_tokens": [1]}, "aLoRA does not support merging"),
    ],
)
def test_what_peft_can_t_merge_is_not_said_to_be(
    options: dict[str, Any], error: str, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    base, adapter = zoo("llama"), save_adapter(zoo("llama"), tmp_path / "lora", **options)
    assert "peft can't merge it into a model either" in remedies(base, adapter)
    with pytest.raises((RuntimeError, NotImplementedError), match=error):
        merged_by_peft(base, adapter)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["up_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    ],
    ids=lambda options: "-".join(options["modules_to_save"]),
)
def test_whole_modules_are_those_that_peft_saved(
    options: dict[str, Any], zoo: Callable[..., Path], tmp_path: Path
) -> None:
    base, adapter = zoo("llama"), save_adapter(zoo("llama"), tmp_path / "lora", **options)
    facts = resolve_model(parse_model_ref(f"{base}+{adapter}"))
    assert facts.adapter is not None and not facts.adapter.left_out
    merged = merged_by_peft(base, adapter)
    assert {*facts.adapter.pairs, *facts.adapter.replaced} == changed_by_peft(base, adapter)
    for name in facts.adapter.replaced:
        entry = facts.index.tensors[name]
        data = Path(entry.file.location).read_bytes()[entry.start : entry.end]
        assert data == merged[name].numpy().tobytes()


def test_fan_in_fan_out_means_nothing_to_linear_layers(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base, adapter = zoo("llama"), save_adapter(zoo("llama"), tmp_path / "lora")
    before = merged_by_peft(base, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": True}))
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
        after = merged_by_peft(base, adapter)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert facts_of(base, adapter).pairs
