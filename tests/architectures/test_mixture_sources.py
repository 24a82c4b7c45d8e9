"""A mixture as a source: an expert viewed as a dense model, a mixture as the base, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import raymoe
from raymoe.architectures import FAMILIES, MOE_ARCHITECTURES
from raymoe.config.model_refs import parse_model_ref
from raymoe.errors import CheckpointError, ProblemReport
from raymoe.planning.compatibility import check_tensors, load_spec
from raymoe.sources.facts import ModelFacts, TensorEntry
from raymoe.sources.resolve import resolve_model
from tests.architectures.pairs import PAIRS, Mixture, Pair, one_per_host
from tests.pico import copy_model, merge_config, merge_without_ray, plan_problems, save_model, tensors_of

# GLM-4 (9B) has interleaved RoPE, its MoE has half-split RoPE: rows of q and k are permuted in the mixture.
_PERMUTED = ("attn.q", "attn.k", "attn.q.bias", "attn.k.bias")


def facts_of(name: str) -> ModelFacts:
    return resolve_model(parse_model_ref(name))


def bytes_of(entry: TensorEntry) -> bytes:
    with open(entry.file.location, "rb") as file:
        file.seek(entry.start)
        return file.read(entry.nbytes)


def matrices(tensors: dict[str, torch.Tensor] | dict[str, bytes], spec: Any) -> dict[tuple[str, int | None], bytes]:
    """Each matrix of a dense model by its role and layer, whichever tensors it is stored in."""
    found = {}
    for row, layer, name in spec.tensors():
        if name not in tensors:
            continue
        stored = tensors[name]
        content = stored if isinstance(stored, bytes) else stored.numpy().tobytes()
        width = len(content) // spec.shape_of(row)[0]
        for role, first, last in spec.fused_parts(row):
            found[role, layer] = content[first * width : last * width]
    return found


@pytest.mark.parametrize("pair", one_per_host(PAIRS), ids=str)
def test_an_expert_of_a_mixture_is_a_dense_model_with_the_bytes_that_were_merged(
    pair: Pair, mixture: Callable[..., Mixture]
) -> None:
    pair.skip_where_unknown()
    merged = mixture(pair)
    for number, expert in enumerate(merged.experts):
        facts = facts_of(f"{merged.folder}#{number}")
        spec, problems = load_spec(facts, "source_model")
        assert spec is not None and not problems + check_tensors(facts, spec, "source_model", ffn_only=False)
        dense, _ = load_spec(facts_of(str(expert)), "source_model")
        assert dense is not None
        view = matrices({name: bytes_of(entry) for name, entry in facts.index.tensors.items()}, spec)
        own, base = matrices(tensors_of(expert), dense), matrices(tensors_of(merged.base), dense)
        permuted = _PERMUTED if spec.family.rope_is_interleaved and pair.host == "glm4_moe" else ()
        for key, content in {**base, **{key: each for key, each in own.items() if key[0].startswith("ffn.")}}.items():
            assert key[0] in permuted or view[key] == content, key


@pytest.mark.parametrize("pair", one_per_host(PAIRS), ids=str)
def test_a_mixture_made_again_of_its_parts_is_the_same(
    pair: Pair, mixture: Callable[..., Mixture], tmp_path: Path
) -> None:
    pair.skip_where_unknown()
    merged = mixture(pair)
    config = merge_config(merged.folder, [f"{merged.folder}#{number}" for number in range(3)], mode="random")
    if pair.shared:
        config["shared_experts"] = [{"source_model": str(merged.folder), "expert": "shared"}]
    plan = merge_without_ray(config, tmp_path / "again")
    assert plan.architecture == pair.host, "the architecture of the base is kept"
    assert plan.config["model_type"] == json.loads((merged.folder / "config.json").read_text())["model_type"]
    before, after = tensors_of(merged.folder), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.fixture(scope="module")
def mixtral(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of three Llamas, with the tokenizer of the first."""
    folder = tmp_path_factory.mktemp("mixtral") / "mixtral"
    config = merge_config(zoo("llama"), [zoo("llama", seed=seed) for seed in (1, 2, 3)], mode="random")
    merge_without_ray(config, folder)
    for file in zoo("llama").glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_expert_beside_source_model_names_the_same_as_a_number_after_a_sign(mixtral: Path) -> None:
    experts = [{"source_model": str(mixtral), "expert": 0}, {"source_model": f"{mixtral}#2"}]
    plan = raymoe.plan({"base_model": str(mixtral), "experts": experts, "gate_mode": "random"})
    assert [source.label for source in plan.sources] == [str(mixtral), f"{mixtral}#0", f"{mixtral}#2"]


def test_experts_of_a_mixture_take_part_with_dense_models(mixtral: Path, zoo: Callable[..., Path]) -> None:
    for family in ("llama", "mistral"):
        experts: list[Any] = [f"{mixtral}#1", zoo(family, seed=5)]
        plan = raymoe.plan(merge_config(zoo(family), experts, mode="random"))
        assert plan.architecture == "mixtral"
        assert not [warning for warning in plan.warnings if "FFNs are those of" in warning]


@pytest.mark.parametrize("prompt_model", ["grafted", "expert"])
def test_prompts_are_read_with_the_experts_of_a_mixture(
    prompt_model: str, mixtral: Path, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    """As by the dense models that the mixture was made of, in a base of the same backbone."""
    dense = [zoo("llama"), *(zoo("llama", seed=seed) for seed in (1, 2, 3))]
    direct = merge_config(dense[0], dense[1:], mode="hidden", prompt_model="grafted")
    merge_without_ray(direct, tmp_path / "direct")
    views = [f"{mixtral}#{number}" for number in range(3)]
    merge_without_ray(merge_config(mixtral, views, mode="hidden", prompt_model=prompt_model), tmp_path / "views")
    before, after = tensors_of(tmp_path / "direct"), tensors_of(tmp_path / "views")
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_a_base_with_an_expert_reads_prompts_as_a_dense_model(
    mixtral: Path, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    views = [f"{mixtral}#{number}" for number in range(3)]
    merge_without_ray(merge_config(Path(f"{mixtral}#1"), views, mode="hidden"), tmp_path / "views")
    base = copy_model(zoo("llama"), tmp_path / "base", tensors=_ffn(zoo("llama", seed=2)))
    dense = [zoo("llama", seed=seed) for seed in (1, 2, 3)]
    merge_without_ray(merge_config(base, dense, mode="hidden"), tmp_path / "direct")
    before, after = tensors_of(tmp_path / "direct"), tensors_of(tmp_path / "views")
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def _ffn(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors_of(folder).items() if ".mlp." in name}


# --- what is refused


def test_a_base_without_ffns_can_not_read_prompts(mixtral: Path) -> None:
    views = [f"{mixtral}#{number}" for number in range(3)]
    report = plan_problems(merge_config(mixtral, views, mode="hidden"))
    assert re.search(r"base_model .*: gate_mode hidden reads prompts with base_model, and this is a Mixtral", report)
    assert "prompt_model: grafted" in report and f"base_model: {mixtral}#0" in report
    assert report.count("problem") <= 1


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({}, r"this is a Mixtral mixture of 3 experts, but no expert is named.*expert: 0 \(up to 2\)"),
        ({"expert": 3}, r"there is no expert 3: it is a Mixtral mixture of 3 experts.*from 0 to 2"),
        ({"expert": "shared"}, r"it has no shared expert: it is a Mixtral mixture of 3 experts"),
        ({"expert": -1}, r"'expert' is the number of an expert, from 0 on, or 'shared', not int -1"),
        ({"expert": True}, r"'expert' is the number of an expert, from 0 on, or 'shared', not bool True"),
        ({"expert": "2"}, r"'expert' is the number of an expert, from 0 on, or 'shared', not str '2'"),
    ],
    ids=str,
)
def test_an_expert_has_to_be_there(
    source: dict[str, Any], expected: str, mixtral: Path, zoo: Callable[..., Path]
) -> None:
    experts = [{"source_model": str(mixtral), **source}, {"source_model": str(zoo("llama", seed=5))}]
    for base in (zoo("llama"), mixtral):
        config = {"base_model": str(base), "experts": experts, "gate_mode": "random"}
        assert re.search(expected, _plan_problems(config), re.DOTALL)


def _plan_problems(config: dict[str, Any]) -> str:
    try:
        return plan_problems(config)
    except ValueError as error:  # pydantic's, for a value that the schema refuses
        return str(error)


def test_a_dense_model_has_no_experts(zoo: Callable[..., Path]) -> None:
    config = merge_config(zoo("llama"), [f"{zoo('llama', seed=1)}#0", zoo("llama", seed=2)], mode="random")
    expected = r"an expert is asked for, but this is a dense model \(llama\).*leave out the expert"
    assert re.search(expected, plan_problems(config), re.DOTALL)


def test_a_mixture_that_raymoe_does_not_write_is_refused_by_name(mixtral: Path, tmp_path: Path) -> None:
    other = copy_model(mixtral, tmp_path / "other", config={"model_type": "olmoe"})
    with pytest.raises(CheckpointError, match="model_type is 'olmoe': raymoe takes experts of mixtures of the arch"):
        facts_of(f"{other}#0")


def test_a_misspelled_expert_is_told_in_a_file(mixtral: Path, tmp_path: Path) -> None:
    """With its line, as other keys."""
    text = f"base_model: {mixtral}\nexperts:\n  - source_model: {mixtral}\n    exprt: 2\n  - source_model: {mixtral}\n"
    (tmp_path / "config.yaml").write_text(text + "    expert: two\ngate_mode: random\n")
    with pytest.raises(ProblemReport) as caught:
        raymoe.plan(tmp_path / "config.yaml")
    said = str(caught.value)
    assert "config.yaml:4: " in said and "expert" in said.partition("exprt")[2]
    assert "config.yaml:5: " in said and "'expert' is the number of an expert, from 0 on, or 'shared'" in said


def test_names_of_two_experts_contradict_each_other(mixtral: Path) -> None:
    config = {"base_model": str(mixtral), "experts": [{"source_model": f"{mixtral}#1", "expert": 2}]}
    assert "names expert 1, but 'expert' is 2" in _plan_problems(config)


@pytest.mark.parametrize("family", sorted({architecture.dense_family for architecture in MOE_ARCHITECTURES.values()}))
def test_the_family_that_a_mixture_is_read_as_is_one_that_it_takes(family: str) -> None:
    """A view as the base of a merge has to fit into the architecture that it comes from."""
    read_as = [each for each in MOE_ARCHITECTURES.values() if family == each.dense_family]
    assert all(family in each.accepts for each in read_as) and family in FAMILIES


def _saved(mixture: Path, folder: Path, tensors: Mapping[str, torch.Tensor | None]) -> Path:
    """A copy of a mixture with other tensors; None leaves one out."""
    from safetensors.torch import save_file

    copy_model(mixture, folder)
    kept = {name: each for name, each in {**tensors_of(mixture), **tensors}.items() if each is not None}
    for file in folder.glob("model*"):
        file.unlink()
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def partly_dense(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 MoE of two models with experts in layer 1 only: layers 0 and 2 have the base's FFN."""
    folder = tmp_path_factory.mktemp("partly-dense") / "mixture"
    config = merge_config(zoo("qwen3"), [zoo("qwen3", seed=seed) for seed in (1, 2)], mode="random", moe_layers=[1])
    merge_without_ray(config, folder)
    return folder


def test_layers_without_experts_are_the_same_in_every_view(partly_dense: Path, zoo: Callable[..., Path]) -> None:
    base, expert = tensors_of(zoo("qwen3")), tensors_of(zoo("qwen3", seed=2))
    found = {name: bytes_of(entry) for name, entry in facts_of(f"{partly_dense}#1").index.tensors.items()}
    assert found.keys() == base.keys()
    for name, content in found.items():
        assert content == (expert if ".layers.1.mlp." in name else base)[name].numpy().tobytes(), name


def test_a_layer_of_another_width_is_refused(partly_dense: Path, tmp_path: Path) -> None:
    shapes = {"gate": (40, 64), "up": (40, 64), "down": (64, 40)}
    narrow = {f"model.layers.2.mlp.{role}_proj.weight": torch.randn(shape) for role, shape in shapes.items()}
    folder = _saved(partly_dense, tmp_path / "narrow", narrow)
    expected = r"layers 0, 2 of this Qwen3 MoE mixture have no experts, but an FFN of width 40, and its experts have"
    with pytest.raises(CheckpointError, match=expected):
        facts_of(f"{folder}#1")


def test_missing_tensors_of_an_expert_are_counted(mixtral: Path, tmp_path: Path) -> None:
    folder = _saved(mixtral, tmp_path / "broken", {"model.layers.1.block_sparse_moe.experts.1.w2.weight": None})
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) of expert 1 missing: .*experts.1.w2.weight"):
        facts_of(f"{folder}#1")
    facts_of(f"{folder}#0")


def test_a_layer_without_any_ffn_is_missing_its_experts(mixtral: Path, tmp_path: Path) -> None:
    """Mixtral has experts in all layers: another FFN there is none of its own."""
    gone = [name for name in tensors_of(mixtral) if ".layers.0.block_sparse_moe.experts." in name]
    folder = _saved(mixtral, tmp_path / "broken", dict.fromkeys(gone))
    with pytest.raises(CheckpointError, match=r"3 tensor\(s\) of expert 1 missing"):
        facts_of(f"{folder}#1")


def test_a_tensor_that_no_table_names_is_not_dropped(mixtral: Path, tmp_path: Path, zoo: Callable[..., Path]) -> None:
    extra = {"model.layers.1.self_attn.q_norm.weight": torch.ones(16), "model.layers.3.mlp.eh.weight": torch.ones(2)}
    folder = _saved(mixtral, tmp_path / "extra", extra)
    report = plan_problems(merge_config(folder, [f"{folder}#0", f"{folder}#1"], mode="random"))
    assert "1 tensor(s) that a llama model does not have: model.layers.1.self_attn.q_norm.weight" in report
    warnings = facts_of(f"{folder}#0").warnings
    assert any("1 tensors of layers beyond num_hidden_layers are left out" in warning for warning in warnings)


def test_a_scaling_of_rope_that_merges_never_have_is_carried(mixture: Callable[..., Mixture], tmp_path: Path) -> None:
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    merged = mixture(next(pair for pair in PAIRS if str(pair) == "llama-deepseek"))
    folder = copy_model(merged.folder, tmp_path / "scaled", config={"rope_scaling": scaling})
    assert facts_of(f"{folder}#0").config["rope_scaling"] == scaling


def test_adapters_are_applied_to_the_expert(mixtral: Path, zoo: Callable[..., Path], tmp_path: Path) -> None:
    from tests.pico import save_lora

    lora = save_lora(tmp_path / "lora", zoo("llama", seed=2), ["mlp.up_proj"])
    direct = merge_config(zoo("llama"), [zoo("llama", seed=1), f"{zoo('llama', seed=2)}+{lora}"], mode="random")
    views = merge_config(mixtral, [f"{mixtral}#0", f"{mixtral}#1+{lora}"], mode="random")
    merge_without_ray(direct, tmp_path / "direct")
    merge_without_ray(views, tmp_path / "views")
    before, after = tensors_of(tmp_path / "direct"), tensors_of(tmp_path / "views")
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_experts_of_image_text_mixtures_are_found_in_their_text_part(tmp_path: Path) -> None:
    save_model(tmp_path / "base", "qwen3_5_text")
    config = merge_config(tmp_path / "base", [tmp_path / "base"] * 2, mode="random")
    merge_without_ray(config, tmp_path / "mixture")
    written = json.loads((tmp_path / "mixture" / "config.json").read_text())
    assert written["model_type"] == "qwen3_5_moe" and "text_config" in written
    facts = facts_of(f"{tmp_path / 'mixture'}#1")
    assert facts.config["model_type"] == "qwen3_5_text"
