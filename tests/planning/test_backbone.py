"""What the plan makes the backbone of, what it says of what is left out, and which configs it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import raymoe
from raymoe.architectures import FAMILIES
from raymoe.config import make_config
from raymoe.planning.backbone import group_of
from raymoe.planning.plan import Combine, Copy, MergePlan, Transform
from raymoe.report.backbone_lines import backbone_lines, backbone_work
from raymoe.report.inspect import inspect_checkpoint, print_summary
from raymoe.report.model_card import model_card
from raymoe.report.plan_report import plan_summary
from tests.pico import (
    LAYERS,
    VOCAB,
    copy_model,
    merge_config,
    merge_here,
    merge_without_ray,
    plan_problems,
    save_lora,
    tensors_of,
)

EMBEDDING, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


def planned(base: Path, experts: list[Any], backbone: Any = "linear", **options: Any) -> MergePlan:
    config = merge_config(base, experts, mode="random", **options)
    return raymoe.plan({**config, "backbone": backbone}, allow_all_same=True)


def kinds(plan: MergePlan) -> dict[str, type]:
    """The kind of each tensor of the backbone."""
    return {part.name: type(part.what) for shard in plan.shards if str(shard.owner) == "base" for part in shard.parts}


@pytest.fixture
def models(zoo: Callable[..., Path]) -> list[Path]:
    return [zoo("llama", seed=seed) for seed in range(3)]


# --- what it is made of


def test_base_is_the_default(models: list[Path]) -> None:
    """Written out or left out: one plan."""
    config = merge_config(models[0], models[1:])
    plan = raymoe.plan(config)
    assert set(kinds(plan).values()) == {Copy}
    for spelled in ("base", {"method": "base"}, None):
        assert raymoe.plan({**config, "backbone": spelled}).digest == plan.digest
    assert raymoe.plan({**config, "backbone": "linear"}).digest != plan.digest


@pytest.mark.parametrize("method", ["linear", "slerp", {"method": "ties", "density": 0.2}])
def test_all_of_the_backbone_is_combined(models: list[Path], method: Any) -> None:
    plan = planned(models[0], models[1:], method)
    assert set(kinds(plan).values()) == {Combine}
    assert plan.backbone.combined == len(kinds(plan)) == plan_summary(plan)["backbone"]["tensors_combined"]
    assert plan.totals.bytes_by_kind["combine"] == sum(
        p.nbytes for s in plan.shards for p in s.parts if p.name in kinds(plan)
    )
    assert plan.backbone.unused == ()


@pytest.mark.parametrize("group", ["attention", "norms", "embeddings"])
def test_groups_that_are_included(models: list[Path], group: str) -> None:
    plan = planned(models[0], models[1:], {"method": "linear", "include": [group]})
    of_group = {name for name, kind in kinds(plan).items() if kind is Combine}
    words = {"attention": "self_attn", "norms": "norm.weight", "embeddings": "embed lm_head"}[group].split()
    assert of_group == {name for name in kinds(plan) if any(word in name for word in words)} != set()
    assert {unused.groups for unused in plan.backbone.unused} == {
        tuple(g for g in ("attention", "norms", "embeddings") if g != group)
    }
    assert backbone_lines(plan)[0].startswith(f"Backbone: {group.capitalize()} ")


def test_every_role_has_a_group() -> None:
    """Embeddings and head, and norms of whole layers, in every family; all others are what a layer has as attention."""
    for family in FAMILIES.values():
        groups = {row.role: group_of(row) for row in family.rows if not row.is_ffn}
        assert groups["embed"] == "embeddings" and groups["norm.final"] == "norms"
        assert "attention" in groups.values()


@pytest.mark.parametrize("method", ["linear", {"method": "ties", "density": 0.2}])
def test_models_that_share_files_are_copied(models: list[Path], method: Any) -> None:
    """Experts whose backbone is the base's own, by file and range: an adapter on FFNs, and the base itself."""
    plan = planned(models[0], [models[0], models[0]], method)
    assert set(kinds(plan).values()) == {Copy} and plan.backbone.kept == len(kinds(plan))
    assert plan.digest == planned(models[0], [models[0], models[0]], "base").digest


def test_one_model_in_all_experts_is_copied(models: list[Path]) -> None:
    """Its mean is itself; not so with a scale, or where TIES trims."""
    base, expert, _ = models
    plan = planned(base, [expert, expert])
    assert set(kinds(plan).values()) == {Copy}
    copies = [part.what for shard in plan.shards for part in shard.parts if isinstance(part.what, Copy)]
    assert {what.source.file.location for what in copies} == {f"{expert}/model.safetensors"}
    for method in ({"method": "linear", "scale": 0.5}, {"method": "ties", "density": 0.5}):
        assert set(kinds(planned(base, [expert, expert], method)).values()) == {Combine}


def test_experts_of_no_weight_do_not_count(models: list[Path]) -> None:
    plan = planned(models[0], models, {"method": "linear", "weights": [0, 0, 2]})
    assert set(kinds(plan).values()) == {Copy}
    assert [str(unused.owner) for unused in plan.backbone.unused] == ["expert 1"]
    assert "are the mean (linear) of 1 expert." in backbone_lines(plan)[0]


def test_adapters_on_one_base(models: list[Path], tmp_path: Path) -> None:
    """Only what they change is computed: of their factors, without a merged model."""
    base = models[0]
    adapters = [save_lora(tmp_path / f"lora{n}", base, ["q_proj", "up_proj"], seed=n) for n in range(2)]
    plan = planned(base, [f"{base}+{adapter}" for adapter in adapters])
    assert {name for name, kind in kinds(plan).items() if kind is not Copy} == {
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(LAYERS)
    }
    assert not [w for w in plan.warnings if "its adapter" in w] and plan.backbone.unused == ()
    alone = planned(base, [f"{base}+{adapters[0]}"], experts_per_token=1)
    assert kinds(alone)[Q] is Transform
    left = planned(base, [f"{base}+{adapter}" for adapter in adapters], {"method": "linear", "include": ["norms"]})
    assert len([w for w in left.warnings if "also changes 3 modules outside the FFN (q_proj)" in w]) == 2


# --- what can't be merged


def test_rows_of_embeddings(models: list[Path], tmp_path: Path) -> None:
    """Of a model with two more tokens than the base has."""
    longer = {name: torch.cat([tensors_of(models[1])[name], torch.ones(2, 64)]) for name in (EMBEDDING, HEAD)}
    more = copy_model(models[1], tmp_path / "more", config={"vocab_size": VOCAB + 2}, tensors=longer)
    plan = planned(models[0], [more, models[2]], dtype="float32")
    assert plan.backbone.notes == (
        f"experts[0]: {EMBEDDING}, {HEAD}: only rows 0 to {VOCAB - 1} are merged, since it has {VOCAB + 2} and the "
        f"base {VOCAB}; a token has to have one id in both models",
    )
    merge_without_ray(
        {**merge_config(models[0], [more, models[2]], mode="random"), "backbone": "linear"}, tmp_path / "out"
    )
    found, one, other = (tensors_of(folder)[EMBEDDING] for folder in (tmp_path / "out", more, models[2]))
    assert torch.allclose(found, (one[:VOCAB] + other) / 2, atol=1e-6)


def test_tensors_of_another_shape(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Experts with other heads: their norms and embeddings count."""
    base, alike, other = zoo("llama"), zoo("llama", seed=1), zoo("llama", seed=2, num_attention_heads=8)
    plan = planned(base, [alike, other])
    (note,) = plan.backbone.notes
    assert note.startswith("experts[1]: model.layers.0.self_attn.") and "other heads or other kinds of layers" in note
    assert "it has no part in these tensors" in note
    # The mean of one model that has the right shape is that model's own.
    assert kinds(plan)[Q] is Copy and kinds(plan)[NORM] is Combine
    assert [(str(u.owner), u.groups) for u in plan.backbone.unused] == [("expert 1", ("attention",))]
    turned = planned(base, [alike, other], "slerp")
    assert kinds(turned)[Q] is Copy and "the base's is used" in turned.backbone.notes[0]
    assert [str(u.owner) for u in turned.backbone.unused] == ["expert 0", "expert 1"]


def test_heads_of_models_that_tie_them(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """A tied head is the embedding: it counts as the head of a base that has one, and the other way it is left out."""
    own, tied = zoo("llama"), zoo("llama", seed=1, tie_word_embeddings=True)
    plan = planned(own, [tied, own])
    (head,) = (part.what for shard in plan.shards for part in shard.parts if part.name == HEAD)
    assert isinstance(head, Combine)
    assert [ref.entry.name for ref in head.combination.experts] == [EMBEDDING, HEAD]
    plan = planned(tied, [own, tied])
    assert HEAD not in kinds(plan)
    assert [(u.groups, u.differing) for u in plan.backbone.unused] == [(("embeddings",), ("embeddings",))]


def test_models_of_another_type(zoo: Callable[..., Path]) -> None:
    base, other = zoo("llama"), zoo("mistral", seed=1)
    config = {**merge_config(base, [base, other], mode="random"), "backbone": {"method": "linear", "scale": 0.5}}
    plan = raymoe.plan(config, raymoe.MergeOptions(allow_crimes=True))
    assert set(kinds(plan).values()) == {Copy}
    assert "experts[1]: " in plan.backbone.notes[0] and "since it is a mistral model" in plan.backbone.notes[0]


def test_shared_experts_have_no_part(zoo: Callable[..., Path]) -> None:
    base, one, other, shared = (zoo("qwen2", seed=seed) for seed in range(4))
    plan = planned(base, [one, other], shared=shared, architecture="qwen2_moe")
    read = {
        entry.file.location
        for s in plan.shards
        for p in s.parts
        if isinstance(p.what, Combine)
        for entry in p.what.combination.entries
    }
    assert not any(str(shared) in location for location in read)
    assert plan.backbone.notes == ("shared_experts have no part in the backbone",)
    assert [str(unused.owner) for unused in plan.backbone.unused] == ["shared 0"]


# --- what is said of what is left out


def test_what_is_not_used_is_named(models: list[Path], tmp_path: Path) -> None:
    """In plan, JSON and card; and only what was seen to differ is said to."""
    base, expert, _ = models
    same = copy_model(base, tmp_path / "same")
    adapter = save_lora(tmp_path / "lora", base, ["q_proj", "up_proj"])
    config = merge_config(base, [expert, same, f"{base}+{adapter}", base], mode="random")
    plan = raymoe.plan(config)
    groups = ("attention", "norms", "embeddings")
    assert [(str(u.owner), u.groups, u.differing) for u in plan.backbone.unused] == [
        ("expert 0", groups, groups),
        ("expert 1", groups, ()),
        ("expert 2", ("attention",), ("attention",)),
    ]
    lines = backbone_lines(plan)
    assert lines == [
        "Backbone: the base's attention, norms and embeddings.",
        "not used: attention, norms, embeddings of expert 0 (known to differ from the base's)",
        "not used: attention, norms, embeddings of expert 1 (stored in other files than the base's; not compared, or "
        "equal in samples)",
        "not used: attention of expert 2 (changed by the adapter)",
    ]
    card = model_card(plan, make_config(config))
    assert all(f"- N{line[1:]}" in card for line in lines[1:])
    assert "Attention, norms and embeddings come from" in card
    unused = plan_summary(plan)["backbone"]["unused"]
    assert unused[2] == {"owner": "expert 2", "groups": ["attention"], "differing": ["attention"]}


def test_the_card_says_what_the_backbone_is(models: list[Path]) -> None:
    config = {**merge_config(models[0], models[1:], mode="random"), "backbone": "linear"}
    card = model_card(raymoe.plan(config), make_config(config))
    assert "Attention, norms and embeddings are the mean (linear) of 2 experts; each expert contributes" in card
    assert "backbone: linear" in card


def test_inspect_says_what_the_backbone_is(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = merge_config(models[0], models[1:], mode="random")
    for number, backbone in enumerate(("base", "linear", {"method": "ties", "density": 0.2})):
        merge_here({**config, "backbone": backbone}, tmp_path / str(number))
        print_summary(inspect_checkpoint(tmp_path / str(number)), as_json=False)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("made by")]
    assert [line.partition(", ")[2] for line in said] == [
        "gate mode random:",
        "gate mode random, backbone linear:",
        "gate mode random, backbone ties:",
    ]


# --- what is refused


@pytest.mark.parametrize(
    ("backbone", "what"),
    [
        ("lineer", "did you mean linear?"),
        ("slerp", "it takes 2 experts, not 3"),
        ({"method": "linear", "weights": [1, 2]}, "2 weights for 3 experts"),
        ({"method": "linear", "weights": [0, 0, 0]}, "no weight is above zero"),
        ({"method": "linear", "weights": [1, -1, 1]}, "below zero"),
        ({"method": "linear", "density": 0.2}, "density is for ties"),
        ({"method": "ties", "density": 0}, "is not a share"),
        ({"method": "ties", "include": ["router"]}, "is not a known value"),
        ({"method": "ties", "include": []}, "names nothing"),
        ({"method": "ties", "weight": [1, 1, 1]}, "did you mean weights?"),
        ({"weights": [1, 1, 1]}, "add 'method: linear'"),
        ({"method": "linear", "alpha": 0.9}, "alpha is for regmean"),
        ({"method": "regmean", "alpha": 1}, "is not a factor of regmean"),
        ({"method": "regmean", "include": ["norms"]}, "regmean merges the matrices of attention"),
        ("regmean", "the expert has no prompts, but backbone: regmean measures"),
        ({"method": "base", "scale": 0.5}, "scale has no effect with method base"),
        (3, "expected the name of a method or a mapping"),
    ],
)
def test_configs_that_are_refused(models: list[Path], backbone: Any, what: str) -> None:
    config = merge_config(models[0], models, mode="random")
    with pytest.raises(raymoe.errors.ProblemReport) as caught:
        make_config({**config, "backbone": backbone})
    assert what in str(caught.value) and "backbone" in str(caught.value)


def test_the_key_survives_the_record(models: list[Path]) -> None:
    given = {"method": "ties", "weights": [1, 2], "density": 0.5, "include": ["norms", "attention"], "scale": 0.5}
    config = make_config({**merge_config(models[0], models[1:], mode="random"), "backbone": given})
    plain = json.loads(json.dumps(config.to_plain()))
    assert plain["backbone"] == {**given, "weights": [1.0, 2.0], "include": ["attention", "norms"]}
    assert type(config).from_plain(plain) == config
    assert make_config(merge_config(models[0], models[1:], mode="random")).to_plain()["backbone"] == "base"


def test_regmean_reads_prompts_of_experts_that_count(models: list[Path]) -> None:
    """Each by its own model, also if the gates read none. Prompts and alpha decide bytes."""
    config = merge_config(models[0], models, mode="random")
    texts = [["def area(radius): return 3.14 * radius"], [], ["Add two eggs, and bake."]]
    for expert, prompts in zip(config["experts"], texts, strict=True):
        expert["positive_prompts"] = prompts
    config["backbone"] = {"method": "regmean", "weights": [1, 0, 2]}
    plan = raymoe.plan(config)
    assert plan.moments is not None and plan.runs_model and not plan.gates.prompted
    assert [str(each.owner) for each in plan.moments.experts] == ["expert 0", "expert 2"]
    for number, each in enumerate(plan.moments.experts):
        assert each.positive == tuple(texts[2 * number])
        name = "model.layers.1.self_attn.q_proj.weight"
        assert each.weights[name].entry.file.location == f"{models[2 * number]}/model.safetensors"
        assert not any(f"layers.{LAYERS - 1}.mlp" in name for name in each.weights)
    (line,) = backbone_work(plan)
    assert "2 prompts are read by their own experts (2 experts)" in line
    digests = {plan.digest}
    for changed in ({"alpha": 0.5}, {"scale": 1.25}, {"weights": [1, 0, 1]}):
        digests.add(raymoe.plan({**config, "backbone": {**config["backbone"], **changed}}).digest)
    config["experts"][0]["positive_prompts"] = ["for i in range(10): print(i)"]
    digests.add(raymoe.plan(config).digest)
    assert len(digests) == 5


def test_adapters_that_change_attention_in_another_way_are_refused(models: list[Path], tmp_path: Path) -> None:
    base = models[0]
    adapter = save_lora(tmp_path / "lora", base, ["q_proj", "up_proj"])
    more = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, VOCAB)}
    more["base_model.model.model.embed_tokens.lora_embedding_B"] = torch.ones(64, 4)
    save_file({**load_file(adapter / "adapter_model.safetensors"), **more}, adapter / "adapter_model.safetensors")
    config = merge_config(base, [f"{base}+{adapter}", base], mode="random")
    text = plan_problems({**config, "backbone": "linear"})
    assert "not supported where more than the FFN is used" in text and "use backbone: base, or merge" in text
    assert raymoe.plan(config, allow_all_same=True)
