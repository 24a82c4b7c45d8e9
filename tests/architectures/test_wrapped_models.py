"""Image-text and audio-text models as base and experts: their text models are merged as the dense models they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import raymoe
from raymoe.architectures.wrappers import WRAPPERS, text_config
from raymoe.errors import ProblemReport
from tests.architectures.pairs import MAX_DIFFERENCE, load_merged
from tests.pico import (
    logits_of,
    merge_config,
    merge_without_ray,
    save_lora,
    save_model,
    save_tokenizer,
    tensors_of,
    token_ids,
)
from tests.wrapped import WRAPPED, load_wrapped, rename_tensors, save_wrapped

pytestmark = pytest.mark.engines

OUTSIDE = ("visi", "audio", "projector", "language_model", "text_model")
# transformers leaves these factors on logits out where a wrapper computes them. A text model by itself has them, and so
# has the wrapper in transformers before 4.52, with which these models were trained.
FACTORS = {"aya_vision": 1.3, "cohere2_vision": 1.3, "llava_next": 1 / 0.7, "granite_speech": 1 / 0.7}


@pytest.fixture(params=sorted(WRAPPED))
def wrapped(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {request.param}")
    return save_wrapped(tmp_path / "wrapped", request.param)


def text_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the text model in it."""
    model = load_wrapped(folder)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits * FACTORS.get(model.config.model_type, 1.0)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference."""
    assert expected.std() > 0.5, "logits of no size prove nothing"
    difference = (actual - expected).abs().max().item()
    # Factors on logits make differences larger too.
    assert difference < MAX_DIFFERENCE * max(1.0, expected.abs().max().item() / 10)
    return difference


def test_every_wrapper_is_tested() -> None:
    assert WRAPPED.keys() == WRAPPERS.keys()


def test_copies_of_a_wrapped_model_compute_what_its_text_model_computes(
    wrapped: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    ids = token_ids(40, rows=2)

    plan = merge_without_ray(merge_config(wrapped, [wrapped] * 3, modality="text"), tmp_path / "merged")

    expected = text_logits(wrapped, ids)
    difference = assert_same(logits_of(load_merged(tmp_path / "merged"), ids), expected)
    record_property("pair", f"wrapped-{json.loads((wrapped / 'config.json').read_text())['model_type']}")
    record_property("difference", difference)
    assert any("Left out:" in warning for warning in plan.warnings)
    assert not any(word in name for name in plan.index["weight_map"] for word in OUTSIDE)


def test_wrapped_and_plain_models_mix(tmp_path: Path) -> None:
    """A text-only fine-tune is an expert of an image-text base, and the other way round: the same bytes either way."""
    wrapped = save_wrapped(tmp_path / "wrapped", "qwen3_5")
    plain = save_text_part(wrapped, tmp_path / "plain")
    other = save_model(tmp_path / "other", "qwen3_5_text", seed=5)

    merges = []
    for number, (base, expert) in enumerate([(wrapped, wrapped), (wrapped, plain), (plain, wrapped), (plain, plain)]):
        merge_without_ray(merge_config(base, [expert, other], modality="text"), tmp_path / f"merged{number}")
        merges.append(tensors_of(tmp_path / f"merged{number}"))

    for merge in merges[1:]:
        assert merge.keys() == merges[0].keys()
        assert all(torch.equal(merge[name], merges[0][name]) for name in merge)


FORMS = {
    "llava": {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."},
    "qwen2_5_vl": {"model.": "model.language_model."},
    "mistral3": {"language_model.model.": "model.language_model.", "vision_tower.": "model.vision_tower."},
}


@pytest.mark.parametrize("wrapper", FORMS)
def test_names_of_other_versions_are_read(wrapper: str, tmp_path: Path) -> None:
    ids = token_ids(30)
    wrapped = save_wrapped(tmp_path / "wrapped", wrapper)
    expected = text_logits(wrapped, ids)
    rename_tensors(wrapped, FORMS[wrapper])

    merge_without_ray(merge_config(wrapped, [wrapped] * 2), tmp_path / "merged")

    assert_same(logits_of(load_merged(tmp_path / "merged"), ids), expected)


@pytest.mark.parametrize("wrapper", ["qwen2_vl", "qwen2_5_vl"])
def test_a_flat_config_of_transformers_4_is_read(wrapper: str, tmp_path: Path) -> None:
    ids = token_ids(30)
    wrapped = save_wrapped(tmp_path / "wrapped", wrapper)
    expected = text_logits(wrapped, ids)
    config = json.loads((wrapped / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    del text["model_type"]
    (wrapped / "config.json").write_text(json.dumps({**text, **config, **old}))

    merge_without_ray(merge_config(wrapped, [wrapped] * 2), tmp_path / "merged")

    assert_same(logits_of(load_merged(tmp_path / "merged"), ids), expected)


@pytest.mark.parametrize("where", ["as in the wrapper", "as in the text model", "as in newer modules"])
def test_adapters_change_the_text_model(where: str, tmp_path: Path) -> None:
    """As if the adapter had been merged into the text model, and what it changes in the vision encoder is named."""
    wrapped = save_wrapped(tmp_path / "wrapped", "llava")
    plain = save_text_part(wrapped, tmp_path / "plain")
    modules = ["up_proj", "q_proj"]
    save_lora(tmp_path / "plain_adapter", plain, modules)
    adapter = save_lora(tmp_path / "adapter", plain, modules)
    names = {
        "as in the wrapper": {"base_model.model.model.": "base_model.model.language_model.model."},
        "as in newer modules": {"base_model.model.model.": "base_model.model.model.language_model."},
    }.get(where, {})
    tensors = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        old = next((prefix for prefix in names if name.startswith(prefix)), "")
        tensors[names.get(old, "") + name.removeprefix(old)] = tensor
    vision = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj"
    tensors |= {f"{vision}.lora_A.weight": torch.ones(4, 32), f"{vision}.lora_B.weight": torch.ones(32, 4)}
    save_file(tensors, adapter / "adapter_model.safetensors")

    backbone = {"backbone": "linear"}
    plan = merge_without_ray(merge_config(wrapped, [f"{wrapped}+{adapter}", wrapped], **backbone), tmp_path / "merged")
    merge_without_ray(
        merge_config(plain, [f"{plain}+{tmp_path / 'plain_adapter'}", plain], **backbone), tmp_path / "of"
    )

    merged, expected = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "of")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert any("also changes vision encoder (2 tensors)" in warning for warning in plan.warnings)


def test_a_base_whose_adapter_changes_its_vision_encoder_is_merged_as_text(tmp_path: Path) -> None:
    wrapped = save_wrapped(tmp_path / "wrapped", "llava")
    adapter = save_lora(tmp_path / "adapter", wrapped, ["up_proj", "fc1"])

    plan = merge_without_ray(merge_config(f"{wrapped}+{adapter}", [wrapped] * 2), tmp_path / "merged")

    assert any("base_model: its adapter" in warning and "vision encoder" in warning for warning in plan.warnings)


def test_sizes_that_savers_left_out_are_those_of_the_class(tmp_path: Path) -> None:
    """LLaVA 1.5 as published: its text config names a few keys of a Llama of 7B."""
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}

    config = text_config(WRAPPERS["llava"], {"model_type": "llava", "torch_dtype": "float16", "text_config": text})

    expected = transformers.LlamaConfig(**text)
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    assert {key: config[key] for key in keys} == {key: getattr(expected, key) for key in keys}
    assert config["torch_dtype"] == "float16"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"language_model.model.": "other."}, "without a text model: no tensor begins with model.language_model."),
        ({"multi_modal_projector.": "model.language_model."}, "that a llama model does not have"),
    ],
)
def test_what_is_wrong_with_a_wrapped_checkpoint_is_said(change: dict[str, str], words: str, tmp_path: Path) -> None:
    wrapped = rename_tensors(save_wrapped(tmp_path / "wrapped", "llava", tie_word_embeddings=True), change)

    with pytest.raises(ProblemReport, match=words):
        raymoe.plan(merge_config(wrapped, [wrapped] * 2), allow_all_same=True)


def test_a_wrapped_model_that_is_refused_says_why(tmp_path: Path) -> None:
    """Mistral Small 4 and others are wrappers of a text model that is refused itself."""
    wrapped = save_wrapped(tmp_path / "wrapped", "mistral3")
    config = json.loads((wrapped / "config.json").read_text())
    config["text_config"]["model_type"] = "ministral3"
    (wrapped / "config.json").write_text(json.dumps(config))

    with pytest.raises(ProblemReport, match="scaled by their position"):
        raymoe.plan(merge_config(wrapped, [wrapped] * 2), allow_all_same=True)


def save_text_part(wrapped: Path, folder: Path) -> Path:
    """The text model of a wrapped model, saved by itself by transformers."""
    model = load_wrapped(wrapped)
    plain = transformers.AutoModelForCausalLM.from_config(model.config.get_text_config())
    plain.model.load_state_dict(model.model.language_model.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    plain.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
