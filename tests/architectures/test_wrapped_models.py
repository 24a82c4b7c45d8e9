"""Image-text and audio-text models as base and experts: their text models are merged as the dense models they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import raymoe
from raymoe.architectures.original_context import original_context, within_original_context
from raymoe.architectures.wrappers import WRAPPERS, text_config
from raymoe.errors import ProblemReport
from tests.architectures.pairs import MAX_DIFFERENCE, load_merged
from tests.evaluation.streamed import assert_close, open_dense, open_mixture, resident, streamed, texts_of
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
from tests.wrapped import OTHER_NAMES, WRAPPED, load_wrapped, rename_tensors, save_wrapped

pytestmark = pytest.mark.engines

OUTSIDE = ("visi", "audio", "projector", "language_model", "text_model")
# transformers leaves these factors on logits out where a wrapper computes them. A text model by itself has them, and so
# has the wrapper in transformers before 4.52, with which these models were trained.
FACTORS = {
    **dict.fromkeys(("aya_vision", "cohere2_vision"), 1.3),
    **dict.fromkeys(("llava_next", "granite_speech", "granite_speech_plus"), 1 / 0.7),
}


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
    assert WRAPPED.keys() | BY_HAND.keys() == WRAPPERS.keys()


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


@pytest.mark.parametrize("wrapper", OTHER_NAMES)
def test_names_of_other_versions_are_read(wrapper: str, tmp_path: Path) -> None:
    ids = token_ids(30)
    wrapped = save_wrapped(tmp_path / "wrapped", wrapper)
    expected = text_logits(wrapped, ids)
    rename_tensors(wrapped, OTHER_NAMES[wrapper])

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


def test_rope_of_hunyuan_ocr_as_published_is_that_of_its_text_model() -> None:
    """Its name and its sections are of images only."""
    scaling = {"type": "xdrope", "alpha": 1000.0, "factor": 1.0, "xdrope_section": [0.25, 0.25, 0.25, 0.25]}
    flat = {"model_type": "hunyuan_vl", "rope_theta": 10000.0, "rope_scaling": scaling, "vision_config": {}}
    text = text_config(WRAPPERS["hunyuan_vl"], flat)
    assert text["model_type"] == "hunyuan_v1_dense" and "vision_config" not in text
    assert text["rope_parameters"] == {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}


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
    """A wrapper can be around a text model that is refused itself."""
    wrapped = save_wrapped(tmp_path / "wrapped", "mistral3")
    config = json.loads((wrapped / "config.json").read_text())
    config["text_config"]["model_type"] = "olmo3"
    (wrapped / "config.json").write_text(json.dumps(config))

    with pytest.raises(ProblemReport, match="most of its layers have a sliding window"):
        raymoe.plan(merge_config(wrapped, [wrapped] * 2), allow_all_same=True)


# From a Llama's names to those of EXAONE 3, which computes what a Llama computes.
EXAONE_NAMES = {
    "model.embed_tokens.": "transformer.wte.",
    "model.norm.": "transformer.ln_f.",
    "model.layers.": "transformer.h.",
    ".self_attn.o_proj.": ".attn.attention.out_proj.",
    ".self_attn.": ".attn.attention.",
    ".input_layernorm.": ".ln_1.",
    ".post_attention_layernorm.": ".ln_2.",
    ".mlp.gate_proj.": ".mlp.c_fc_0.",
    ".mlp.up_proj.": ".mlp.c_fc_1.",
    ".mlp.down_proj.": ".mlp.c_proj.",
}
EXAONE_KEYS = {
    "num_hidden_layers": "num_layers",
    "rms_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
}
ENCODERS = {"vision_config": {"hidden_size": 8}, "audio_config": {"hidden_size": 8}}
# Layouts that are made of a text model by hand: they are too large to be made by transformers, or newer than the oldest
# that these tests run with. By type: the family, the names, a tensor beside the text model with its part, the config.
BY_HAND: dict[str, tuple[str, dict[str, str], tuple[str, str], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "exaone": ("llama", EXAONE_NAMES, ("", ""), lambda own: {EXAONE_KEYS.get(key, key): own[key] for key in own}),
    "phi4_multimodal": (
        "phi3",
        {},
        ("model.embed_tokens_extend.image_embed.img_projection_up.weight", "encoders and projectors of images"),
        lambda own: {**own, **ENCODERS},
    ),
    "qwen2_5_omni": (
        "qwen2",
        {"model.": "thinker.model.", "lm_head.": "thinker.lm_head."},
        ("talker.codec_head.weight", "parts that make speech"),
        lambda own: {"thinker_config": {"text_config": {**own, "model_type": "qwen2_5_omni_text"}, **ENCODERS}},
    ),
    "omniasr": (
        "llama",
        {"model.": "model.language_model."},
        ("model.audio_tower.layers.0.weight", "audio encoder"),
        lambda own: {"text_config": own, **ENCODERS},
    ),
}


def save_by_hand(folder: Path, wrapper: str, plain: Path) -> Path:
    _, names, (beside, _), make = BY_HAND[wrapper]
    shutil.copytree(plain, folder)
    tensors = {other_name(name, names): tensor for name, tensor in tensors_of(plain).items()}
    tensors |= {beside: torch.ones(4, 4)} if beside else {}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = make(json.loads((plain / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": wrapper, "architectures": ["X"]}))
    return folder


def other_name(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("wrapper", BY_HAND)
def test_a_layout_made_by_hand_is_the_text_model_in_it(
    wrapper: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    family, _, (_, part), _ = BY_HAND[wrapper]
    plain = save_model(tmp_path / "plain", family)
    wrapped = save_by_hand(tmp_path / "wrapped", wrapper, plain)

    plan = merge_without_ray(merge_config(wrapped, [wrapped, plain, wrapped]), tmp_path / "merged")

    ids = token_ids(40, rows=2)
    merged = load_merged(tmp_path / "merged")
    difference = assert_same(logits_of(merged, ids), logits_of(load_wrapped(plain), ids))
    record_property("pair", f"wrapped-{wrapper}")
    record_property("difference", difference)
    assert any("Left out:" in warning and part in warning for warning in plan.warnings) == bool(part)
    assert not any(key.endswith("_config") or key in EXAONE_KEYS.values() for key in plan.config)


def test_adapters_of_exaone_have_its_names(tmp_path: Path) -> None:
    llama = save_model(tmp_path / "llama", "llama")
    exaone = save_by_hand(tmp_path / "exaone", "exaone", llama)
    plain = save_lora(tmp_path / "adapter", llama, ["up_proj", "o_proj"])
    renamed = shutil.copytree(plain, tmp_path / "renamed")
    factors = load_file(plain / "adapter_model.safetensors")
    factors = {other_name(name, EXAONE_NAMES): factor for name, factor in factors.items()}
    save_file(factors, renamed / "adapter_model.safetensors")

    merges = []
    for base, adapter in ((llama, plain), (exaone, renamed)):
        config = merge_config(base, [f"{base}+{adapter}", base], backbone="linear")
        merge_without_ray(config, tmp_path / f"merge of {base.name}")
        merges.append(tensors_of(tmp_path / f"merge of {base.name}"))
    assert merges[0].keys() == merges[1].keys()
    assert all(torch.equal(tensor, merges[1][name]) for name, tensor in merges[0].items())


CONTEXT = 48
MINISTRAL_3 = {
    "rope_parameters": {
        "rope_type": "yarn",
        "type": "yarn",
        "rope_theta": 20_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": CONTEXT,
        "max_position_embeddings": 4 * CONTEXT,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
    "max_position_embeddings": 4 * CONTEXT,
}


@pytest.mark.parametrize("kind", ["wrapped", "plain"])
@pytest.mark.parametrize("mode", ["random", "ridge"])
def test_ministral_3_is_the_same_up_to_its_original_context(kind: str, mode: str, tmp_path: Path) -> None:
    if kind == "wrapped":
        model = save_wrapped(tmp_path / "model", "mistral3", "ministral3", **MINISTRAL_3)
    else:
        model = save_model(tmp_path / "model", "ministral3", **MINISTRAL_3)
    dense = load_wrapped(model)

    plan = merge_without_ray(merge_config(model, [model] * 3, mode=mode), tmp_path / "merged")

    assert plan.config["max_position_embeddings"] == CONTEXT
    assert plan.config["rope_scaling"].keys().isdisjoint({"llama_4_scaling_beta", "max_position_embeddings"})
    assert any(f"from token {CONTEXT} on" in warning for warning in plan.warnings)
    merged, ids = load_merged(tmp_path / "merged"), token_ids(2 * CONTEXT, rows=2)
    expected, actual = logits_of(dense, ids), logits_of(merged, ids)
    assert_same(actual[:, :CONTEXT], expected[:, :CONTEXT])
    assert (actual - expected)[:, CONTEXT:].abs().max() > 1e-3
    texts = texts_of([2, 31, CONTEXT])
    assert_close(streamed(open_mixture(tmp_path / "merged"), texts)["own"], resident(merged, texts))
    assert_close(streamed(open_dense(model), texts)["own"], resident(dense, texts))


def test_the_original_context_of_ministral_3_has_the_defaults_of_its_class() -> None:
    config = within_original_context({"model_type": "ministral3"})

    expected = transformers.Ministral3Config()
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "rms_norm_eps", "sliding_window")
    assert {key: config[key] for key in keys} == {key: getattr(expected, key) for key in keys}
    assert config["rope_parameters"].items() <= expected.rope_parameters.items() | {("rope_type", "yarn")}
    assert original_context({"model_type": "mistral"}) is None


def save_text_part(wrapped: Path, folder: Path) -> Path:
    """The text model of a wrapped model, saved by itself by transformers."""
    model = load_wrapped(wrapped)
    plain = transformers.AutoModelForCausalLM.from_config(model.config.get_text_config())
    plain.model.load_state_dict(model.model.language_model.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    plain.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
