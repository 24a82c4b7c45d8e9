"""An expert with an adapter contributes only its FFN: what of the adapter is used, told of, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import raymoe
from raymoe.checkpoints.weight_table import dense_model
from raymoe.config import make_config
from raymoe.config.model_refs import parse_model_ref
from raymoe.errors import ProblemReport
from raymoe.report.backbone_lines import unused_lines
from raymoe.report.model_card import model_card
from raymoe.sources.resolve import resolve_model
from tests.pico import (
    HIDDEN,
    LAYERS,
    VOCAB,
    copy_model,
    merge_config,
    merge_without_ray,
    plan_problems,
    save_lora,
    tensors_of,
)

PREFIX = "base_model.model."
EMBEDDING = {
    f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(4, VOCAB),
    f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.ones(HIDDEN, 4),
}
RESIZED = {f"{PREFIX}lm_head.weight": torch.ones(VOCAB + 8, HIDDEN)}


def adapter_with(folder: Path, base: Path, modules: list[str], more: dict[str, torch.Tensor], **keys: Any) -> Path:
    """A LoRA of these modules with further tensors."""
    save_lora(folder, base, modules)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file(load_file(weights) | more, weights)
    config.write_text(json.dumps(json.loads(config.read_text()) | keys))
    return folder


def config_of(base: Path, adapter: Path, **options: Any) -> dict[str, Any]:
    return merge_config(base, [f"{base}+{adapter}", base], **options)


def adapter_warnings(plan: raymoe.MergePlan) -> list[str]:
    return [warning for warning in plan.warnings if "its adapter" in warning]


def test_changes_outside_the_ffn_are_told_of(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base = zoo("llama")
    adapter = save_lora(tmp_path / "lora", base, ["q_proj", "v_proj", "up_proj"])
    config = config_of(base, adapter, mode="random")
    plan = raymoe.plan(config)
    (warning,) = adapter_warnings(plan)
    assert warning == (
        f"experts[0]: its adapter {adapter} also changes {2 * LAYERS} modules outside the FFN (q_proj, v_proj). These "
        "changes are not in the merge: an expert contributes only its FFN"
    )
    card = model_card(plan, make_config(config))
    assert "- Not used: attention of expert 0 (changed by the adapter)" in card and card.count("adapter") == 1
    plain = config_of(base, save_lora(tmp_path / "ffn", base, ["up_proj"]), mode="random")
    assert not adapter_warnings(raymoe.plan(plain))
    assert "Not used" not in model_card(raymoe.plan(plain), make_config(plain))


@pytest.mark.parametrize(
    ("more", "keys", "module"),
    [(EMBEDDING, {}, "embed_tokens"), (RESIZED, {"modules_to_save": ["lm_head"]}, "lm_head")],
)
@pytest.mark.parametrize(
    "options", [{"mode": "random"}, {"mode": "hidden"}, {"mode": "ridge"}, {"mode": "cheap_embed"}]
)
def test_unsupported_changes_outside_the_ffn_are_left_out(
    more: dict[str, torch.Tensor],
    keys: dict[str, Any],
    module: str,
    options: dict[str, Any],
    zoo: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = zoo("llama")
    adapter = adapter_with(tmp_path / "lora", base, ["up_proj"], more, **keys)
    plan = raymoe.plan(config_of(base, adapter, **options))
    (warning,) = adapter_warnings(plan)
    assert f"also changes 1 module outside the FFN ({module})" in warning
    assert unused_lines(plan.backbone) == ["not used: embeddings of expert 0 (changed by the adapter)"]
    same = raymoe.plan(config_of(base, save_lora(tmp_path / "ffn", base, ["up_proj"]), **options))
    assert [shard.header for shard in plan.shards] == [shard.header for shard in same.shards]


@pytest.mark.parametrize("more", [EMBEDDING, RESIZED])
def test_they_are_refused_where_the_whole_model_is_used(
    more: dict[str, torch.Tensor], zoo: Callable[..., Path], tmp_path: Path
) -> None:
    base = zoo("llama")
    adapter = adapter_with(tmp_path / "lora", base, ["up_proj"], more)
    text = plan_problems(config_of(base, adapter, mode="hidden", prompt_model="expert"))
    assert "experts[0] (" in text and "this is not supported where more than the FFN is used" in text
    assert "use prompt_model: base or grafted, or merge the adapter into its model with peft" in text
    assert "base_model (" in plan_problems(merge_config(f"{base}+{adapter}", [base] * 2, mode="random"))  # type: ignore[arg-type]
    with pytest.raises(ProblemReport, match="this is not supported where more than the FFN is used"):
        dense_model(resolve_model(parse_model_ref(f"{base}+{adapter}")), "expert 0")


def test_an_adapter_of_many_unsupported_changes(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base = zoo("llama")
    more = {f"{PREFIX}model.table{number}.lora_embedding_A": torch.ones(4, 1) for number in range(50)}
    adapter = adapter_with(tmp_path / "lora", base, ["up_proj"], more)
    with pytest.raises(ProblemReport) as caught:
        dense_model(resolve_model(parse_model_ref(f"{base}+{adapter}")), "expert 0")
    assert len(caught.value.problems) == 6
    assert caught.value.problems[-1].what == "and more problems of this kind"


@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("duplicate", [False, True])
def test_lora_on_a_tied_head_is_refused_whether_or_not_the_file_holds_the_head(
    duplicate: bool, magnitude: bool, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    tied = zoo("llama", tie_word_embeddings=True)
    head = tensors_of(tied)["model.embed_tokens.weight"]
    twice = copy_model(tied, tmp_path / "base", tensors={"lm_head.weight": head.clone()})
    adapter = save_lora(tmp_path / "lora", twice, ["lm_head", "q_proj"])
    if magnitude:
        lengths = {
            f"{PREFIX}{name.removesuffix('.weight')}.lora_magnitude_vector": torch.ones(len(weight))
            for name, weight in tensors_of(twice).items()
            if name.endswith(("lm_head.weight", "q_proj.weight"))
        }
        adapter = adapter_with(tmp_path / "dora", twice, ["lm_head", "q_proj"], lengths, use_dora=True)
    base = twice if duplicate else tied
    text = plan_problems(merge_config(f"{base}+{adapter}", [tied] * 2, mode="random"))  # type: ignore[arg-type]
    assert "LoRA on the output head, which the model ties to its embedding" in text
    assert "merge the adapter into its model with peft" in text
    with pytest.raises(ProblemReport, match="LoRA on the output head"):
        dense_model(resolve_model(parse_model_ref(f"{base}+{adapter}")), "expert 0")


def test_unsupported_changes_of_the_ffn_are_refused(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base = zoo("llama")
    name = f"{PREFIX}model.layers.1.mlp.up_proj"
    adapter = adapter_with(tmp_path / "lora", base, ["up_proj"], {f"{name}.lora_B.bias": torch.ones(96)})
    text = plan_problems(config_of(base, adapter, mode="random"))
    assert "its adapter has a bias on a factor for model.layers.1.mlp.up_proj, a part of the FFN" in text


def test_a_whole_matrix_of_the_ffn_takes_the_place_of_the_models(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base = zoo("llama")
    whole = {f"{PREFIX}model.layers.{n}.mlp.down_proj.weight": torch.full((HIDDEN, 96), n + 0.5) for n in range(LAYERS)}
    adapter = adapter_with(tmp_path / "lora", base, ["q_proj"], whole, modules_to_save=["down_proj"])
    plan = merge_without_ray(config_of(base, adapter, mode="random"), tmp_path / "merged")
    assert any(str(adapter) in file.location for source in plan.sources for file in source.files)
    merged, stored = tensors_of(tmp_path / "merged"), tensors_of(base)
    for layer in range(LAYERS):
        experts = f"model.layers.{layer}.block_sparse_moe.experts"
        assert torch.equal(merged[f"{experts}.0.w2.weight"], torch.full((HIDDEN, 96), layer + 0.5))
        assert torch.equal(merged[f"{experts}.1.w2.weight"], stored[f"model.layers.{layer}.mlp.down_proj.weight"])
        assert torch.equal(merged[f"{experts}.0.w3.weight"], stored[f"model.layers.{layer}.mlp.up_proj.weight"])


def test_empty_tensors_of_a_model_have_their_own_remedy(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base = zoo("llama")
    names = {name: torch.zeros(0) for name in tensors_of(base) if "mlp" in name}
    empty = copy_model(base, tmp_path / "empty", tensors=names)
    text = plan_problems(merge_config(base, [empty, base], mode="random"))
    assert "DeepSpeed's ZeRO-3 leaves empty tensors: save the model again with gathered weights" in text
