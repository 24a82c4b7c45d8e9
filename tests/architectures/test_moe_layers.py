"""Experts in some layers only (`moe_layers`): merges of copies of one model compute what it computes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import raymoe
from raymoe.architectures import MOE_ARCHITECTURES, DenseSpec, MoeArchitecture, find_moe_architecture, read_spec
from raymoe.planning.plan import Router
from tests.architectures.pairs import MAX_DIFFERENCE, PAIRS, Pair, load_merged
from tests.pico import (
    FAMILY_KEYS,
    REPOSITORY,
    load_dense,
    logits_of,
    merge_config,
    merge_without_ray,
    plan_problems,
    tensors_of,
    token_ids,
)

LAYERS = 4
TOKENS = 24
PATTERNS = {"even": (0, 2), "odd": (1, 3), "1-2": (1, 2), "2-3": (2, 3)}
_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 9}
_SPEC = read_spec({"model_type": "llama", "num_hidden_layers": LAYERS, **_SIZES}, "llama")
assert isinstance(_SPEC, DenseSpec)
_LISTS = ("layer_types", "no_rope_layers", "layer_rope_theta")

pytestmark = pytest.mark.engines


def options_of(pair: Pair) -> dict[str, Any]:
    """The pair's keys, for a model of `LAYERS` layers: lists with an entry per layer grow."""
    keys = {**FAMILY_KEYS.get(pair.family, {}), **pair.options}
    longer = {k: [*v, v[1]] for k, v in keys.items() if isinstance(v, list) and k in _LISTS}
    return {**pair.options, **longer, "num_hidden_layers": LAYERS}


def can(host: str, layers: tuple[int, ...]) -> bool:
    rule = MOE_ARCHITECTURES[host].layer_rule
    return rule is not None and rule.write(_SPEC, layers) is not None


CASES = [
    (pair, name)
    for pair in PAIRS
    for name, layers in PATTERNS.items()
    if can(pair.host, layers) and (name == "2-3" or not pair.shared)
]


@pytest.mark.parametrize(("pair", "layers"), CASES, ids=lambda value: str(value))
def test_copies_compute_what_the_model_computes(
    pair: Pair, layers: str, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    pair.skip_where_unknown()
    dense, ids = zoo(pair.family, **options_of(pair)), token_ids(TOKENS)
    zeros = {"shared_options": {"residual_scale": 0.0}} if pair.shared else {}
    # A shared expert adds its share in layers with experts only: without output, it adds nothing.
    config = pair.config(dense, [dense] * 3, dense, mode="random", moe_layers=layers, **zeros)

    plan = merge_without_ray(config, tmp_path / "merged")

    found = [part.what.layer for shard in plan.shards for part in shard.parts if isinstance(part.what, Router)]
    assert sorted(set(found)) == list(PATTERNS[layers])
    host = find_moe_architecture(plan.text_config)
    assert host is not None
    assert host.moe_layers(plan.text_config) == list(PATTERNS[layers])
    difference = (logits_of(load_merged(tmp_path / "merged"), ids) - logits_of(load_dense(dense), ids)).abs().max()
    assert difference.item() < MAX_DIFFERENCE


@pytest.mark.parametrize("pair", [p for p in PAIRS if str(p) in ("qwen2-qwen2_moe", "lfm2-lfm2_moe")], ids=str)
def test_the_width_of_plain_layers_is_that_of_the_model(pair: Pair, zoo: Callable[..., Path]) -> None:
    dense = zoo(pair.family, **options_of(pair))
    plan = raymoe.plan(pair.config(dense, [dense] * 2, dense, mode="random", moe_layers="2-3"), allow_all_same=True)
    widths = {
        part.name: part.shape
        for shard in plan.shards
        for part in shard.parts
        if "down" in part.name or "w2" in part.name
    }
    keys = plan.text_config
    for name, shape in widths.items():
        assert (
            shape[1] == keys["moe_intermediate_size" if "experts" in name else "intermediate_size"] or "shared" in name
        )


def test_no_prompt_passes_layers_behind_the_last_router(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base, expert = (zoo("qwen3", seed=seed, num_hidden_layers=LAYERS) for seed in range(2))
    config = merge_config(base, [base, expert], mode="ridge", prompt_model="base", moe_layers=[0, 2])

    plan = merge_without_ray(config, tmp_path / "some")
    whole = merge_without_ray({**config, "moe_layers": "all"}, tmp_path / "all")

    assert (plan.gates.layers, plan.gates.layers_with_router) == (3, (0, 2))
    assert not [name for name in plan.gates.experts[0].weights if ".layers.3." in name]
    assert (whole.gates.layers, whole.gates.router_layers) == (4, None)
    # The base reads the prompts, so that a layer's router does not depend on the layers that have experts.
    some, every = tensors_of(tmp_path / "some"), tensors_of(tmp_path / "all")
    routers = {name for name in some if name.endswith("mlp.gate.weight")}
    assert routers == {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 2)}
    assert all(torch.equal(some[name], every[name]) for name in routers)
    dense = tensors_of(base)
    for layer in (1, 3):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert torch.equal(some[name], dense[name])


def test_grafted_models_have_the_expert_where_the_merge_has_it(zoo: Callable[..., Path]) -> None:
    base, expert = (zoo("qwen3", seed=seed, num_hidden_layers=LAYERS) for seed in range(2))
    config = merge_config(base, [base, expert], mode="hidden", prompt_model="grafted", moe_layers="even")
    weights = raymoe.plan(config).gates.experts[1].weights
    files = {layer: weights[f"model.layers.{layer}.mlp.up_proj.weight"].entry.file.location for layer in range(2)}
    assert str(expert) in files[0]
    assert str(base) in files[1]


@pytest.mark.parametrize(
    ("family", "keys", "said"),
    [
        ("llama", {"architecture": "mixtral"}, [r"Mixtral: moe_layers: it has experts in all layers", r"qwen2_moe"]),
        (
            "qwen3",
            {"architecture": "glm4_moe"},
            [r"moe_layers: its experts may be in all layers from one on \(first_k_dense_replace\)", r"qwen3_moe can"],
        ),
        ("granite", {}, ["Granite MoE: moe_layers: it has experts in all layers"]),
        ("qwen3", {"moe_layers": "2-9"}, [r"there is no layer 9: the base has 3 layers, numbered from 0 to 2"]),
        ("qwen3", {"moe_layers": [0, 3]}, [r"moe_layers is \[0, 3\], but there is no layer 3"]),
        ("qwen3", {"engines": ["vllm"]}, [r"vLLM was not looked at with layers without experts \(moe_layers\)"]),
        ("ernie4_5", {}, [r"its experts may be in layers n - 1, 2n - 1, \.\.\. of a range"]),
    ],
)
def test_refusals(family: str, keys: dict[str, Any], said: list[str], zoo: Callable[..., Path]) -> None:
    config = merge_config(zoo(family), [zoo(family)] * 2, mode="random", **{"moe_layers": "even", **keys})
    report = plan_problems(config)
    for text in said:
        assert re.search(text, report), report


def test_an_architecture_that_can_is_chosen(zoo: Callable[..., Path]) -> None:
    config = merge_config(zoo("llama"), [zoo("llama")] * 2, mode="random", moe_layers="odd")
    assert raymoe.plan(config, allow_all_same=True).architecture == "qwen2_moe"


def test_transformers_is_an_engine_that_computes_layers_without_experts(zoo: Callable[..., Path]) -> None:
    config = merge_config(zoo("qwen3"), [zoo("qwen3")] * 2, mode="random", moe_layers="odd", engines=["transformers"])
    assert raymoe.plan(config, allow_all_same=True).architecture == "qwen3_moe"


def test_the_docs_name_what_each_architecture_can_say() -> None:
    page = (REPOSITORY / "docs" / "config.md").read_text()
    rows = page[page.index("| architecture | experts may be in |") :].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", rows)) >= {n for n, host in MOE_ARCHITECTURES.items() if host.layer_rule}


@pytest.mark.parametrize("host", [h for h in MOE_ARCHITECTURES.values() if h.layer_rule], ids=lambda host: host.name)
def test_what_is_written_is_read_again(host: MoeArchitecture) -> None:
    assert host.layer_rule is not None
    for bits in range(1, 2**LAYERS):
        layers = [layer for layer in range(LAYERS) if bits >> layer & 1]
        keys = host.layer_rule.write(_SPEC, layers)
        if keys is not None:
            assert host.moe_layers({"num_hidden_layers": LAYERS, **keys}) == layers
    assert host.layer_rule.write(_SPEC, range(LAYERS)) is not None
