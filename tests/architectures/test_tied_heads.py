"""A base whose config.json ties embeddings and whose checkpoint holds an output head all the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file

import raymoe
from raymoe.architectures import MOE_ARCHITECTURES
from raymoe.export.gguf import GgufOptions, write_gguf
from raymoe.planning import MergePlan
from raymoe.planning.plan import Copy
from tests.architectures.pairs import MAX_DIFFERENCE, PAIRS, Pair, load_merged
from tests.export.gguf.conftest import TOKENIZER_FILES
from tests.pico import copy_model, load_dense, logits_of, merge_config, merge_without_ray, tensors_of, token_ids

pytestmark = pytest.mark.engines

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# LFM2's older name of the key is the one that counts.
TIED = {"tie_word_embeddings": True}
FIRST_PAIRS = [
    pair
    for number, pair in enumerate(PAIRS)
    if pair.host != "deepseek" and pair.family not in {before.family for before in PAIRS[:number]}
]


# One for each MoE architecture whose class in some engine never ties. With a padding token transformers loads a tied
# Youtu with zeros for that token's row.
STORED = {
    "glm4_moe": ("qwen3", TIED),
    "deepseek_v3": ("youtu", {**TIED, "pad_token_id": None}),
    "deepseek": ("llama", TIED),
}


def tied_with_head(source: Path, folder: Path, head: torch.Tensor) -> Path:
    keys = TIED | ({"tie_embedding": True} if "lfm2" in (source / "config.json").read_text() else {})
    return copy_model(source, folder, config=keys, tensors={HEAD: head})


def head_warnings(plan: MergePlan) -> list[str]:
    return [warning for warning in plan.warnings if HEAD in warning]


@pytest.mark.parametrize("pair", FIRST_PAIRS, ids=str)
def test_copies_compute_what_transformers_5_computes(pair: Pair, zoo: Callable[..., Path], tmp_path: Path) -> None:
    pair.skip_where_unknown()
    untied = zoo(pair.family, **pair.options, tie_word_embeddings=False)
    base = tied_with_head(untied, tmp_path / "base", tensors_of(untied)[HEAD])
    plan = merge_without_ray(pair.config(base, [base] * 3, base, mode="random"), tmp_path / "merged")
    assert plan.config["tie_word_embeddings"] is False
    (warning,) = head_warnings(plan)
    assert "lm_head.weight differs from the embedding. The output keeps this head" in warning
    ids = token_ids(24)
    of_merge = logits_of(load_merged(tmp_path / "merged"), ids)
    torch.testing.assert_close(of_merge, logits_of(load_dense(untied), ids), atol=MAX_DIFFERENCE, rtol=0)
    if Version(transformers.__version__) >= Version("5"):
        torch.testing.assert_close(of_merge, logits_of(load_dense(base), ids), atol=MAX_DIFFERENCE, rtol=0)


def test_a_head_that_is_the_embedding_is_left_out(zoo: Callable[..., Path], tmp_path: Path) -> None:
    plain = zoo("llama", tie_word_embeddings=True)
    base = tied_with_head(plain, tmp_path / "base", tensors_of(plain)[EMBEDDING].clone())
    plan = merge_without_ray(merge_config(base, [base] * 2, mode="random"), tmp_path / "merged")
    assert plan.config["tie_word_embeddings"] is True
    assert not head_warnings(plan)
    assert HEAD not in tensors_of(tmp_path / "merged")
    ids = token_ids(24)
    expected = logits_of(load_dense(base), ids)
    got = logits_of(load_merged(tmp_path / "merged"), ids)
    torch.testing.assert_close(got, expected, atol=MAX_DIFFERENCE, rtol=0)


def test_a_head_that_differs_in_one_token_is_kept(zoo: Callable[..., Path], tmp_path: Path) -> None:
    plain = zoo("llama", tie_word_embeddings=True)
    head = tensors_of(plain)[EMBEDDING].clone()
    head[-1, -1] += 1
    base = tied_with_head(plain, tmp_path / "base", head)
    merge_without_ray(merge_config(base, [base] * 2, mode="random"), tmp_path / "merged")
    assert torch.equal(tensors_of(tmp_path / "merged")[HEAD], head)


def test_the_head_of_an_expert_does_not_matter(zoo: Callable[..., Path], tmp_path: Path) -> None:
    plain = zoo("llama", tie_word_embeddings=True)
    expert = tied_with_head(plain, tmp_path / "expert", tensors_of(plain)[EMBEDDING] + 1)
    plan = raymoe.plan(merge_config(plain, [expert] * 2, mode="random"), allow_all_same=True)
    assert plan.config["tie_word_embeddings"] is True
    assert not head_warnings(plan)


@pytest.mark.parametrize("backbone", ["base", "linear"])
@pytest.mark.parametrize("host", STORED)
def test_engines_that_never_tie_are_given_the_head(
    host: str, backbone: str, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    """A copy of the embedding, with which transformers computes the same bits as without."""
    family, options = STORED[host]
    base, other = zoo(family, **options), zoo(family, seed=1, **options)
    config = merge_config(base, [base, other], mode="random", architecture=host, backbone=backbone)
    plan = merge_without_ray(config, tmp_path / "merged")

    tensors = tensors_of(tmp_path / "merged")
    assert plan.config["tie_word_embeddings"] is True
    assert torch.equal(tensors[HEAD], tensors[EMBEDDING])
    assert torch.equal(tensors[HEAD], tensors_of(base)[EMBEDDING]) is (backbone == "base")
    parts = {part.name: part for shard in plan.shards for part in shard.parts}
    assert isinstance(parts[HEAD].what, Copy) is (backbone == "base")
    (warning,) = head_warnings(plan)
    assert "lm_head.weight (106 kB), a copy of the embedding that it is tied to, since vLLM 0.32.0" in warning

    without = copy_model(tmp_path / "merged", tmp_path / "without")
    for shard in without.glob("*.safetensors*"):
        shard.unlink()
    save_file({n: t for n, t in tensors.items() if n != HEAD}, without / "model.safetensors", {"format": "pt"})
    ids = token_ids(24)
    assert torch.equal(logits_of(load_merged(tmp_path / "merged"), ids), logits_of(load_merged(without), ids))


def test_a_head_of_its_own_is_stored_once(zoo: Callable[..., Path]) -> None:
    """Every architecture that says that engines never tie is above; an untied model is as before."""
    assert {host.name for host in MOE_ARCHITECTURES.values() if host.tied_head_for} == STORED.keys()
    for host, (family, options) in STORED.items():
        base = zoo(family, **{**options, "tie_word_embeddings": False})
        plan = raymoe.plan(merge_config(base, [base] * 2, mode="random", architecture=host), allow_all_same=True)
        assert not head_warnings(plan)


@pytest.mark.parametrize("family", ["llama", "qwen2", "cohere2", "lfm2"])
def test_such_merges_and_models_become_gguf_with_their_head(
    family: str, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    untied = zoo(family, tie_word_embeddings=False)
    base = tied_with_head(untied, tmp_path / "base", tensors_of(untied)[HEAD])
    merge_without_ray(merge_config(base, [base] * 2, mode="random"), tmp_path / "merged")
    # As somebody else may save it: the config ties, and the head is there.
    saved_tied = copy_model(tmp_path / "merged", tmp_path / "tied", config=TIED)
    for folder in (tmp_path / "merged", saved_tied):
        for name in TOKENIZER_FILES:
            shutil.copy(base / name, folder / name)
    sources = [tmp_path / "merged", saved_tied, *([base] if family in ("llama", "qwen2") else [])]
    for number, source in enumerate(sources):
        file = write_gguf(source, tmp_path / f"{number}.gguf", GgufOptions(type="f32", device="cpu")).path
        tensors: dict[str, Any] = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        expected = tensors_of(untied)[HEAD].numpy()
        assert (tensors["output.weight"].data == expected).all(), source


def test_a_tied_mixture_with_a_second_copy_of_the_embedding_becomes_gguf(
    zoo: Callable[..., Path], tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    base = zoo("llama", tie_word_embeddings=True)
    merge_without_ray(merge_config(base, [base] * 2, mode="random"), tmp_path / "merged")
    tensors = {name: tensor.clone() for name, tensor in tensors_of(tmp_path / "merged").items()}
    for shard in tmp_path.glob("merged/*.safetensors*"):
        shard.unlink()
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, tmp_path / "merged/model.safetensors", {"format": "pt"})
    for name in TOKENIZER_FILES:
        shutil.copy(base / name, tmp_path / "merged" / name)
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is True
    file = write_gguf(tmp_path / "merged", tmp_path / "m.gguf", GgufOptions(type="f32", device="cpu")).path
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(file).tensors}


def test_every_family_is_here() -> None:
    assert {pair.family for pair in FIRST_PAIRS} == {
        family for host in MOE_ARCHITECTURES.values() for family in host.accepts
    }
