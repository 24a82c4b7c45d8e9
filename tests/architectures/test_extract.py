"""`raymoe extract`: an expert of a mixture as a dense model computes what the mixture does if its router chooses it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file

import raymoe
from raymoe.architectures import FAMILIES, MOE_ARCHITECTURES
from raymoe.errors import CheckpointError, ProblemReport
from tests.architectures.pairs import (
    MAX_DIFFERENCE,
    PAIRS,
    Mixture,
    Pair,
    force_router,
    load_grafted,
    load_merged,
)
from tests.pico import copy_model, load_dense, logits_of, save_lora, tensors_of, token_ids
from tests.runtime.in_process import in_this_process


def extract(mixture: Path | str, expert: int | str, out: Path, **options: Any) -> raymoe.MergeResult:
    with in_this_process():
        return raymoe.extract(mixture, expert, out, **options)


@pytest.fixture(params=PAIRS, ids=str)
def merged(request: pytest.FixtureRequest, mixture: Callable[..., Mixture]) -> Mixture:
    request.param.skip_where_unknown()
    return mixture(request.param)


@pytest.mark.engines
def test_an_expert_computes_what_the_mixture_does_with_a_forced_router(merged: Mixture, tmp_path: Path) -> None:
    has_gate = bool(merged.pair.shared and MOE_ARCHITECTURES[merged.pair.host].shared_router)
    model_type = extract(merged.folder, 1, tmp_path / "expert", without_shared=has_gate).model_type
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    dense, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "expert", output_loading_info=True)
    assert not any(info.values()), f"keys that do not fit: {info}"
    dense, ids = dense.eval(), token_ids(12, rows=2)
    assert type(dense).__name__ == FAMILIES[dense.config.model_type].class_name
    result = logits_of(dense, ids)
    if has_gate:  # no dense model computes the mixture with its shared expert
        expected = logits_of(load_grafted(merged.base, merged.experts[1]), ids)
    else:
        mixture = load_merged(merged.folder)
        force_router(mixture, dense, ids, 1)
        expected = logits_of(mixture, ids)
    assert (result - expected).abs().max() < MAX_DIFFERENCE
    assert result.abs().max() > 0.1, "a model without an output proves nothing"


# --- one mixture


@pytest.fixture(scope="module")
def llamas(mixture: Callable[..., Mixture]) -> Mixture:
    return mixture(next(pair for pair in PAIRS if str(pair) == "llama-mixtral"))


@pytest.fixture(scope="module")
def mixtral(llamas: Mixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of three Llamas with what belongs to a model: tokenizer, chat template, generation config."""
    folder = copy_model(llamas.folder, tmp_path_factory.mktemp("extract") / "mixtral")
    for file in llamas.base.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_all_files_of_the_dense_model_are_written(mixtral: Path, llamas: Mixture, tmp_path: Path) -> None:
    out = tmp_path / "expert"
    result = extract(mixtral, 2, out, out_shard_size="200KB")
    names = {path.name for path in out.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "config.json", "raymoe.json", "README.md"} <= names
    assert len(list(out.glob("*.safetensors"))) > 1
    assert result.model_type == "llama" and not result.was_complete and not result.warnings
    written, base, expert = tensors_of(out), tensors_of(llamas.base), tensors_of(llamas.experts[2])
    assert written.keys() == base.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, (expert if ".mlp." in name else base)[name]), name
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (out, llamas.base))
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads", "bos_token_id", "eos_token_id")
    assert {key: config[key] for key in same} == {key: original[key] for key in same}
    assert config["architectures"] == ["LlamaForCausalLM"] and "num_local_experts" not in config
    assert "`mixtral#2`" in (out / "README.md").read_text()
    assert extract(mixtral, 2, out, out_shard_size="200KB").was_complete


def test_the_record_is_not_that_of_a_merge(mixtral: Path, tmp_path: Path) -> None:
    out = tmp_path / "expert"
    extract(mixtral, 0, out)
    record = json.loads((out / "raymoe.json").read_text())
    assert record["extracted"] == f"{mixtral}#0" and "config" not in record
    summary = raymoe.inspect(out)
    assert summary["model_type"] == "llama" and summary["merge"]["extracted"] == f"{mixtral}#0"
    with pytest.raises(ProblemReport, match=r"this is an expert that `raymoe extract` took out of a mixture .*#0"):
        raymoe.verify(out)


def test_an_extracted_expert_is_a_source_of_merges(mixtral: Path, llamas: Mixture, tmp_path: Path) -> None:
    extract(mixtral, 0, tmp_path / "expert")
    experts = [{"source_model": str(tmp_path / "expert")}, {"source_model": str(mixtral), "expert": 1}]
    plan = raymoe.plan(base_model=str(llamas.base), experts=experts, gate_mode="random")
    assert plan.architecture == "mixtral"


def test_an_adapter_is_applied_to_the_expert(mixtral: Path, llamas: Mixture, tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora", llamas.experts[1], ["mlp.up_proj", "q_proj"])
    extract(f"{mixtral}+{lora}", 1, tmp_path / "expert")
    written, expert = tensors_of(tmp_path / "expert"), tensors_of(llamas.experts[1])
    ffn = [name for name in written if ".mlp." in name]
    changed = {name.split(".")[-2] for name in ffn if not torch.equal(written[name], expert[name])}
    assert changed == {"up_proj"}


def test_a_tied_mixture_gives_a_tied_model(zoo: Callable[..., Path], tmp_path: Path) -> None:
    from tests.pico import merge_config, merge_without_ray

    models = [zoo("llama", seed=seed, tie_word_embeddings=True) for seed in range(3)]
    for architecture in ("mixtral", "deepseek"):  # the second one stores the head too
        folder = tmp_path / architecture
        merge_without_ray(merge_config(models[0], models[1:], mode="random", architecture=architecture), folder)
        extract(folder, 1, tmp_path / f"{architecture}-expert")
        assert tensors_of(tmp_path / f"{architecture}-expert").keys() == tensors_of(models[2]).keys()
        assert json.loads((tmp_path / f"{architecture}-expert" / "config.json").read_text())["tie_word_embeddings"]


def test_weights_keep_their_dtypes(mixtral: Path, tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in tensors_of(mixtral).items() if "block_sparse_moe" in name}
    folder = _with_tensors(mixtral, tmp_path / "mixed", half)
    extract(folder, 1, tmp_path / "expert")
    dtypes = {(".mlp." in name): tensor.dtype for name, tensor in tensors_of(tmp_path / "expert").items()}
    assert dtypes == {True: torch.float16, False: torch.float32}


def _with_tensors(mixture: Path, folder: Path, tensors: Mapping[str, torch.Tensor | None]) -> Path:
    copy_model(mixture, folder)
    kept = {name: each for name, each in {**tensors_of(mixture), **tensors}.items() if each is not None}
    for file in folder.glob("model*"):
        file.unlink()
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_extraction_that_was_interrupted_goes_on(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raymoe.runtime import coordinator

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    whole = extract(mixtral, 1, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(coordinator, "_write_small_files", stop)
        with pytest.raises(KeyboardInterrupt):
            extract(mixtral, 1, tmp_path / "expert")
    assert not (tmp_path / "expert" / "model.safetensors.index.json").exists()
    result = extract(mixtral, 1, tmp_path / "expert")
    assert result.bytes_kept == sum(file.size for file in result.files if file.name.endswith(".safetensors"))
    assert result.files == whole.files


def test_an_expert_can_be_evaluated_as_it_is(mixtral: Path) -> None:
    from raymoe.evaluation.models import is_merge
    from raymoe.object_store.options import StorageOptions

    assert is_merge(mixtral, StorageOptions()) and not is_merge(f"{mixtral}#1", StorageOptions())


# --- shared experts


def _of(name: str) -> Pair:
    pair = next(pair for pair in PAIRS if str(pair) == name)
    pair.skip_where_unknown()
    return pair


def test_a_shared_expert_with_a_gate_is_left_out_only_if_that_is_asked_for(
    mixture: Callable[..., Mixture], tmp_path: Path
) -> None:
    merged = mixture(_of("qwen2-qwen2_moe-shared"))
    with pytest.raises(ProblemReport, match="its shared expert has a gate, which no dense model has"):
        extract(merged.folder, 1, tmp_path / "expert")
    assert not (tmp_path / "expert").exists()
    extract(merged.folder, 1, tmp_path / "expert", without_shared=True)
    assert tensors_of(tmp_path / "expert")["model.layers.0.mlp.up_proj.weight"].shape == (96, 64)
    extract(merged.folder, "shared", tmp_path / "shared")
    written, shared = tensors_of(tmp_path / "shared"), tensors_of(merged.shared)
    assert all(torch.equal(written[name], shared[name]) for name in written if ".mlp." in name)


def test_a_shared_expert_without_a_gate_is_added_to_the_expert(mixture: Callable[..., Mixture], tmp_path: Path) -> None:
    merged = mixture(_of("llama-deepseek-shared"))
    extract(merged.folder, 1, tmp_path / "sum")
    extract(merged.folder, 1, tmp_path / "alone", without_shared=True)
    name = "model.layers.0.mlp.{}_proj.weight"
    both, alone, shared = (tensors_of(folder) for folder in (tmp_path / "sum", tmp_path / "alone", merged.shared))
    assert torch.equal(both[name.format("up")], torch.cat([alone[name.format("up")], shared[name.format("up")]]))
    down = [alone[name.format("down")], shared[name.format("down")]]
    assert torch.equal(both[name.format("down")], torch.cat(down, dim=1))
    assert json.loads((tmp_path / "sum" / "config.json").read_text())["intermediate_size"] == 192


def test_a_factor_on_the_experts_is_named(mixture: Callable[..., Mixture], tmp_path: Path) -> None:
    merged = mixture(_of("seed_oss-glm4_moe"))
    folder = copy_model(merged.folder, tmp_path / "factor", config={"routed_scaling_factor": 2.5})
    result = extract(folder, 1, tmp_path / "expert")
    assert any("routed_scaling_factor, 2.5" in warning for warning in result.warnings)


def test_what_no_dense_model_has_beside_experts_is_refused(mixture: Callable[..., Mixture], tmp_path: Path) -> None:
    merged = mixture(_of("gemma4_text-gemma4_moe"))
    name = "model.layers.1.mlp.down_proj.weight"
    trained = _with_tensors(merged.folder, tmp_path / "trained", {name: torch.randn(64, 256)})
    with pytest.raises(ProblemReport, match=re.escape(f"{name} is not 0 everywhere, as in mixtures that raymoe")):
        extract(trained, 1, tmp_path / "expert")


# --- what is refused


@pytest.mark.parametrize(
    ("expert", "expected"),
    [
        (3, "there is no expert 3: it is a Mixtral mixture of 3 experts"),
        ("shared", "it has no shared expert: it is a Mixtral mixture of 3 experts"),
        ("two", "'expert' is the number of an expert, from 0 on, or 'shared', not str 'two'"),
        (-1, "'expert' is the number of an expert, from 0 on, or 'shared', not int -1"),
    ],
)
def test_an_expert_has_to_be_there(mixtral: Path, expert: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ProblemReport, match=re.escape(expected)):
        extract(mixtral, expert, tmp_path / "expert")
    assert not (tmp_path / "expert").exists()


def test_a_dense_model_has_no_experts(llamas: Mixture, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"this is a dense model \(llama\), which has no experts"):
        extract(llamas.base, 0, tmp_path / "expert")


def test_the_mixture_is_not_overwritten(mixtral: Path) -> None:
    before = sorted(path.name for path in mixtral.iterdir())
    with pytest.raises(ProblemReport, match="the output is the folder of base, which would be overwritten"):
        extract(mixtral, 0, mixtral, overwrite=True)
    assert sorted(path.name for path in mixtral.iterdir()) == before


def test_classes_of_families_are_those_of_transformers() -> None:
    from transformers.models.auto import modeling_auto

    if Version(transformers.__version__).major < 5:
        pytest.skip("some of them are newer than transformers 4")
    named = {family.model_type: family.class_name for family in FAMILIES.values() if family.class_name}
    assert {each: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(each) for each in named} == named
    read_as = {
        name
        for each in MOE_ARCHITECTURES.values()
        for name in (each.dense_family, each.windowed_family, each.qk_norm_family, each.partial_rotary_family)
    }
    assert read_as - {""} == named.keys()


@pytest.mark.engines
def test_the_command(mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from raymoe.cli import app

    with in_this_process():
        app(["extract", str(mixtral), "1", str(tmp_path / "expert")], standalone_mode=False)
    said = capsys.readouterr().err
    assert "Llama: " in said and f"raymoe inspect {tmp_path / 'expert'}" in said
    assert load_dense(tmp_path / "expert").config.model_type == "llama"
