"""Merges that read images too: the base's encoder is in them byte for byte, around the mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import raymoe
from raymoe.errors import ProblemReport
from raymoe.export.gguf import write_gguf
from raymoe.runtime.settings import RuntimeSettings
from tests.architectures.pairs import MAX_DIFFERENCE, load_merged
from tests.architectures.test_gemma4 import E2B
from tests.evaluation.streamed import assert_close, open_mixture, resident, streamed, texts_of
from tests.pico import (
    LAYERS,
    logits_of,
    merge_config,
    merge_here,
    merge_without_ray,
    save_model,
    tensors_of,
    token_ids,
)
from tests.runtime.in_process import in_this_process
from tests.wrapped import load_wrapped, save_wrapped

pytestmark = pytest.mark.engines

# Wrapper -> how the names of the mixture's classes begin, and the family of its text.
WRAPPERS = {"qwen3_5": ("Qwen3_5MoeFor", "qwen3_5_text"), "gemma4": ("Gemma4For", "gemma4_text")}
PROCESSOR = {"preprocessor_config.json": {"patch_size": 8}, "processor_config.json": {"processor_class": "P"}}


@pytest.fixture(scope="module", params=list(WRAPPERS))
def wrapped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: with processor files and, in Qwen3.5, layers of multi-token prediction."""
    return save_published(tmp_path_factory.mktemp("wrapped") / "model", request.param)


def save_published(folder: Path, wrapper: str, **text_options: Any) -> Path:
    if wrapper not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {wrapper}")
    save_wrapped(folder, wrapper, **IMAGE_TOKENS, **text_options)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **IMAGE_TOKENS}))
    for name, content in PROCESSOR.items():
        (folder / name).write_text(json.dumps(content))
    tensors = load_file(folder / "model.safetensors")
    if wrapper == "qwen3_5":
        save_file({**tensors, "mtp.norm.weight": torch.arange(64.0)}, folder / "model.safetensors", {"format": "pt"})
    return folder


IMAGE_TOKENS = {
    "image_token_id": 400,
    "video_token_id": 401,
    "vision_start_token_id": 402,
    "vision_end_token_id": 403,
}


def model_type_of(folder: Path) -> str:
    model_type: str = json.loads((folder / "config.json").read_text())["model_type"]
    return model_type


def class_of(folder: Path) -> str:
    return WRAPPERS[model_type_of(folder)][0]


def image_logits(model: Any) -> torch.Tensor:
    """Logits of a text with an image in it."""
    if model.config.model_type == "gemma4":
        return _gemma4_image_logits(model)
    vision = model.config.vision_config
    height = width = 4 * vision.spatial_merge_size
    patches = height * width
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(patches, size, generator=torch.Generator().manual_seed(3))
    tokens = patches // vision.spatial_merge_size**2
    ids = torch.tensor([[5, 402, *[400] * tokens, 403, 7, 9, 11]])
    with torch.no_grad():
        logits: torch.Tensor = model(
            input_ids=ids,
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, height, width]]),
            mm_token_type_ids=(ids == 400).long(),
        ).logits
    return logits


def _gemma4_image_logits(model: Any) -> torch.Tensor:
    vision = model.config.vision_config
    side = 2 * vision.pooling_kernel_size
    pixels = torch.rand(1, side**2, 3 * vision.patch_size**2, generator=torch.Generator().manual_seed(3))
    places = torch.tensor([[[x, y] for y in range(side) for x in range(side)]])
    ids = torch.tensor([[5, 402, *[400] * 4, 403, 7, 9, 11]])
    with torch.no_grad():
        logits: torch.Tensor = model(
            input_ids=ids,
            pixel_values=pixels,
            image_position_ids=places,
            mm_token_type_ids=(ids == 400).long(),
        ).logits
    return logits


def test_an_image_gives_what_the_base_gives(wrapped: Path, tmp_path: Path) -> None:
    plan = merge_without_ray(merge_config(wrapped, [wrapped] * 3), tmp_path / "merged")

    dense, merged = load_wrapped(wrapped), load_wrapped(tmp_path / "merged")
    assert type(merged).__name__ == plan.config["architectures"][0] == f"{class_of(wrapped)}ConditionalGeneration"
    expected = image_logits(dense)
    assert expected.std() > 0.5
    assert (image_logits(merged) - expected).abs().max() < MAX_DIFFERENCE
    ids = token_ids(30)
    assert (merged(input_ids=ids).logits - dense(input_ids=ids).logits).abs().max() < MAX_DIFFERENCE
    # The text model alone loads from the same files.
    assert (logits_of(load_merged(tmp_path / "merged"), ids) - dense(input_ids=ids).logits).abs().max() < 1e-5


def test_an_image_in_layers_with_inputs_of_their_own(tmp_path: Path) -> None:
    """Gemma 4 E2B and E4B."""
    wrapped = save_published(tmp_path / "wrapped", "gemma4", **E2B)
    merge_without_ray(merge_config(wrapped, [wrapped] * 3), tmp_path / "merged")

    dense, merged = load_wrapped(wrapped), load_wrapped(tmp_path / "merged")
    assert (image_logits(merged) - image_logits(dense)).abs().max() < MAX_DIFFERENCE


@pytest.mark.parametrize("keys", [{}, {"moe_layers": [1], "granularity": 2}], ids=["whole", "some layers, cut"])
def test_qwen3_vl_becomes_its_own_moe(keys: dict[str, Any], tmp_path: Path) -> None:
    """Images go through layers, too (deepstack). Names and transposed experts are those of the published model."""
    wrapped = save_published(tmp_path / "wrapped", "qwen3_vl")
    plan = merge_without_ray(merge_config(wrapped, [wrapped] * 3, **keys), tmp_path / "merged")

    dense, merged = load_wrapped(wrapped), load_wrapped(tmp_path / "merged")
    assert type(merged).__name__ == plan.config["architectures"][0] == "Qwen3VLMoeForConditionalGeneration"
    ids, expected = token_ids(30), image_logits(dense)
    assert expected.std() > 0.5
    assert (image_logits(merged) - expected).abs().max() < MAX_DIFFERENCE
    assert (merged(input_ids=ids).logits - dense(input_ids=ids).logits).abs().max() < MAX_DIFFERENCE
    names = set(tensors_of(tmp_path / "merged"))
    merged.save_pretrained(tmp_path / "again")
    assert names == set(tensors_of(tmp_path / "again"))
    assert {name for name in names if "visual" in name} == {n for n in tensors_of(wrapped) if "visual" in n}


def test_qwen3_vl_experts_are_those_of_the_text_mixture_transposed(tmp_path: Path) -> None:
    """In another dtype and with noise. Evaluation, verification and GGUF know them."""
    wrapped = save_published(tmp_path / "wrapped", "qwen3_vl")
    other = save_model(tmp_path / "other", "qwen3", seed=5)
    options = {"dtype": "bfloat16", "expert_options": {"noise_scale": 0.01, "residual_scale": 0.5}}
    config = merge_config(wrapped, [wrapped, other], mode="random", **options)
    merge_here({**config, "modality": "text"}, tmp_path / "text")
    merge_here(config, tmp_path / "merged")

    text, merged = tensors_of(tmp_path / "text"), tensors_of(tmp_path / "merged")
    for layer in range(LAYERS):
        of_text, of_merged = f"model.layers.{layer}.mlp.experts.", f"model.language_model.layers.{layer}.mlp.experts."
        for expert in range(2):
            gate, up, down = (text[f"{of_text}{expert}.{matrix}_proj.weight"] for matrix in ("gate", "up", "down"))
            assert (merged[f"{of_merged}gate_up_proj"][expert].T - torch.cat([gate, up])).abs().max() < 0.1
            assert (merged[f"{of_merged}down_proj"][expert].T - down).abs().max() < 0.1
            assert merged[f"{of_merged}down_proj"][expert].shape == (96, 64)
    with in_this_process():
        assert raymoe.verify(tmp_path / "merged", settings=RuntimeSettings(verbosity=-1)).ok
    texts, model = texts_of(), load_wrapped(tmp_path / "merged")
    assert_close(streamed(open_mixture(tmp_path / "merged"), texts)["own"], resident(model, texts))
    with pytest.raises(ProblemReport, match="with transposed experts; the same merge with modality: text is converted"):
        write_gguf(tmp_path / "merged", tmp_path / "model.gguf")


def test_all_but_the_text_model_is_copied(wrapped: Path, tmp_path: Path) -> None:
    plan = merge_without_ray(merge_config(wrapped, [wrapped] * 2), tmp_path / "merged")

    source, merged = tensors_of(wrapped), tensors_of(tmp_path / "merged")
    rest = {name for name in source if not name.startswith(("model.language_model.", "lm_head."))}
    assert {name.split(".")[1] for name in rest} & {"visual", "vision_tower"}
    assert all(torch.equal(merged[name], source[name]) for name in rest)
    of_text = {name for name in merged if name.startswith(("model.language_model.", "lm_head."))}
    assert merged.keys() - of_text == rest
    assert PROCESSOR.keys() <= {file.name for file in plan.side_files}
    assert not any("Left out" in warning for warning in plan.warnings)


def test_modality_text_leaves_it_out(wrapped: Path, tmp_path: Path) -> None:
    plan = merge_without_ray(merge_config(wrapped, [wrapped] * 2, modality="text"), tmp_path / "merged")

    assert plan.config["architectures"] == [f"{class_of(wrapped)}CausalLM"]
    assert not PROCESSOR.keys() & {file.name for file in plan.side_files}
    parts = ["vision encoder", *(["multi-token"] if model_type_of(wrapped) == "qwen3_5" else [])]
    assert any(all(part in warning for part in parts) for warning in plan.warnings)


def test_the_text_part_is_the_mixture_of_modality_text(wrapped: Path, tmp_path: Path) -> None:
    """Byte for byte, with experts that differ."""
    other = save_model(tmp_path / "other", WRAPPERS[model_type_of(wrapped)][1], seed=5)
    config = merge_config(wrapped, [wrapped, other], backbone="linear")
    merge_without_ray(config, tmp_path / "merged")
    merge_without_ray({**config, "modality": "text"}, tmp_path / "text")

    merged = tensors_of(tmp_path / "merged")
    for name, tensor in tensors_of(tmp_path / "text").items():
        inner = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        assert torch.equal(merged[inner], tensor), name


def test_image_text_where_there_is_none_is_refused(tmp_path: Path) -> None:
    plain = save_model(tmp_path / "plain", "llama")
    llava = save_wrapped(tmp_path / "llava", "llava")

    with pytest.raises(ProblemReport, match="reads text only"):
        raymoe.plan(merge_config(plain, [plain] * 2, modality="image-text"), allow_all_same=True)
    with pytest.raises(ProblemReport, match="Mixtral has no form with the encoder of LLaVA"):
        raymoe.plan(merge_config(llava, [llava] * 2, modality="image-text"), allow_all_same=True)
