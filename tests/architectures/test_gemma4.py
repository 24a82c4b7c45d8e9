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
from safetensors.torch import load_file

import raymoe
from raymoe.architectures.dense_spec import DenseSpec, read_spec
from raymoe.errors import ProblemReport
from raymoe.evaluation.generation_model import GenerationModel
from raymoe.evaluation.options import GenerationOptions
from raymoe.export.gguf import write_gguf
from raymoe.report.inspect import inspect_checkpoint
from raymoe.routers.tokenize import batches
from raymoe.sources.hub import HubOptions
from raymoe.storage.source_reader import SourceReader
from tests.architectures.pairs import MAX_DIFFERENCE, force_router, load_grafted, load_merged
from tests.evaluation.streamed import assert_close, open_mixture, resident, streamed, texts_of
from tests.pico import (
    VOCAB,
    copy_model,
    load_dense,
    logits_of,
    make_config,
    merge_config,
    merge_without_ray,
    plan_problems,
    save_lora,
    tensors_of,
    token_ids,
)
from tests.routers.test_decoder_router_inputs import hooked, readable
from tests.routers.test_decoder_router_inputs import streamed as streamed_states
from tests.routers.test_streamed_decoder import prompts_of

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


# As E2B: inputs per layer, and layers with the keys and values of earlier ones, whose FFN is twice as wide.
E2B: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "attention_k_eq_v": False,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
}


def merge_e2b(zoo: Callable[..., Path], folder: Path, **options: Any) -> tuple[Path, list[Path]]:
    base, *experts = (zoo(FAMILY, seed=seed, **E2B) for seed in range(4))
    merge_without_ray(merge_config(base, experts, **{"mode": "random", **options}), folder)
    return base, experts


def test_e2b_copies(zoo: Callable[..., Path], tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    difference = difference_of_copies(zoo(FAMILY, **E2B), tmp_path / "merged")
    assert difference < MAX_DIFFERENCE
    record_property("pair", "gemma4_text-gemma4_moe")
    record_property("difference", difference)


def test_e2b_experts_alone_are_the_base_with_their_ffns(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Narrower FFNs end with zeros."""
    base, experts = merge_e2b(zoo, tmp_path / "merged")
    model, ids = load_merged(tmp_path / "merged"), token_ids(12, rows=2)
    assert [layer.experts.intermediate_dim for layer in model.model.layers] == [192] * 4
    for number, expert in enumerate(experts):
        reference = load_grafted(base, expert)
        force_router(model, reference, ids, number)
        assert (logits_of(model, ids) - logits_of(reference, ids)).abs().max() < MAX_DIFFERENCE


def test_e2b_routers_see_what_ffns_get(zoo: Callable[..., Path]) -> None:
    folder, texts = zoo(FAMILY, **E2B), prompts_of((3, 30, 17, 8))
    found = streamed_states(readable(folder, last_ffn=True), list(batches(texts)))
    for text, expected in zip(texts, hooked(folder, texts), strict=True):
        there = found[tuple(text)]
        torch.testing.assert_close(there, expected[: len(there)], rtol=1e-4, atol=2e-5)


def test_e2b_adapters_read_prompts_as_the_models_that_they_make(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Each adapter gives the layers other inputs, and all of them are read in one pass."""
    base = zoo(FAMILY, **E2B)
    modules = ["per_layer_model_projection", "per_layer_input_gate", "embed_tokens_per_layer"]
    adapters = [save_lora(tmp_path / f"adapter{n}", base, modules, seed=n, alpha=40.0) for n in range(2)]
    wholes = [copy_model(base, tmp_path / f"whole{n}", tensors=apply(base, adapters[n])) for n in range(2)]
    routers = []
    for name, experts in (("adapters", [f"{base}+{adapter}" for adapter in adapters]), ("wholes", wholes)):
        config = merge_config(base, experts, mode="hidden", prompt_model="expert")
        merge_without_ray(config, tmp_path / name)
        routers.append(tensors_of(tmp_path / name)["model.layers.3.router.proj.weight"])
    assert (routers[0] - routers[1]).abs().max() < 1e-4
    assert (routers[0][0] - routers[0][1]).abs().max() > 0.1


def apply(base: Path, adapter: Path) -> dict[str, torch.Tensor | None]:
    """The base's tensors that an adapter of `save_lora` changes, changed."""
    factors, changed = load_file(adapter / "adapter_model.safetensors"), {}
    for name, weight in tensors_of(base).items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{prefix}A.weight" in factors:
            changed[name] = weight + 10.0 * (factors[f"{prefix}B.weight"] @ factors[f"{prefix}A.weight"])
    assert len(changed) == 6
    return {**changed}


def test_e2b_backbones_merge_by_the_inputs_of_attention(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """The matrices that make inputs of layers get the mean: they run after the FFN, which is not run in the last."""
    _, experts = merge_e2b(zoo, tmp_path / "merged", mode="hidden", backbone="regmean")
    merged, sources = tensors_of(tmp_path / "merged"), [tensors_of(expert) for expert in experts]
    for name, is_mean in (("per_layer_input_gate", True), ("self_attn.q_proj", False)):
        full = f"model.layers.3.{name}.weight"
        mean = sum(source[full] for source in sources) / len(sources)
        assert torch.allclose(merged[full], mean, atol=1e-6) is is_mean


def test_e2b_is_evaluated_and_answers_as_transformers(zoo: Callable[..., Path], tmp_path: Path) -> None:
    merge_e2b(zoo, tmp_path / "merged", experts_per_token=2)
    model, mixture, texts = load_merged(tmp_path / "merged"), open_mixture(tmp_path / "merged"), texts_of()
    assert_close(streamed(mixture, texts)["own"], resident(model, texts))

    ids, counts = token_ids(20), []
    with SourceReader(HubOptions()) as reader:
        generator = GenerationModel(
            mixture, reader, "cpu", resident=False, on_routing=lambda layer, experts, _: counts.append(len(experts))
        )
        new = generator.generate(ids[0].tolist(), GenerationOptions(max_new_tokens=3), ())
    assert counts == [20] * 4 + [1] * 8
    for _ in new:
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(dim=-1)], dim=1)
    assert new == ids[0, 20:].tolist()


def test_e2b_tensors_that_no_layer_reads_may_be_there(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Published models have keys and values in layers that use those of earlier ones."""
    unread = {f"model.layers.3.self_attn.{name}.weight": torch.ones(2, 2) for name in ("k_proj", "v_proj", "k_norm")}
    dense = copy_model(zoo(FAMILY, **E2B), tmp_path / "dense", tensors={**unread})
    plan = raymoe.plan(merge_config(dense, [dense] * 2), allow_all_same=True)
    assert not unread.keys() & plan.index["weight_map"].keys()
    # In other layers they are read.
    report = plan_problems(merge_config(dense, [zoo(FAMILY, **{**E2B, "use_double_wide_mlp": False})] * 2))
    assert "an FFN of another width than the base's" in report


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "inputs of layers": ({"hidden_size_per_layer_input": 8}, "tensor.s. missing: .*per_layer_input_gate"),
    "fewer inputs than tokens": (
        {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300},
        "vocab_size_per_layer_input is 300, less than vocab_size, 416",
    ),
    "keys of no layer": ({"num_kv_shared_layers": 2}, "none before them is of kind full_attention"),
    "keys of no layer at all": ({"num_kv_shared_layers": 3}, "is of kind full_attention or sliding_attention"),
    "mixture": (
        {"enable_moe_block": True, "num_experts": 4},
        r"missing: it is a Gemma 4 MoE mixture of 4 experts",
    ),
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


def test_a_merge_is_a_source_by_the_number_of_an_expert(zoo: Callable[..., Path], tmp_path: Path) -> None:
    dense = zoo(FAMILY)
    merge_without_ray(merge_config(dense, [dense] * 2, mode="random"), tmp_path / "merged")
    report = plan_problems(merge_config(dense, [tmp_path / "merged"] * 2, mode="random"))
    assert "this is a Gemma 4 MoE mixture of 2 experts, but no expert is named" in report
    of_expert = merge_config(dense, [f"{tmp_path / 'merged'}#1", dense], mode="random")
    assert raymoe.plan(of_expert, allow_all_same=True).architecture == "gemma4_moe"
