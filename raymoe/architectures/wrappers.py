"""Image-text (and audio-text) models whose text part is a dense family.

A wrapper's checkpoint holds a dense text model beside an encoder and a projector. Its text part has the tensors of the
family under a prefix, and its config.json has the family's config under `text_config`. This table is all that raymoe
knows of a wrapper: sources/unwrap.py takes the text part out, and everything after it sees the dense family.

    model.language_model.layers.0.mlp.up_proj.weight  -->  model.layers.0.mlp.up_proj.weight
    {"model_type": "qwen3_5", "text_config": {...}}   -->  {"model_type": "qwen3_5_text", ...}

Prefixes differ by the version of transformers that saved a checkpoint, so each wrapper lists all forms, and the names
in the checkpoint decide. Text alone is computed as by the family itself: of the rotary embeddings with three axes
(`mrope`), all axes are the position in the text. Sources: transformers' configuration and modeling files of each type,
and `conversion_mapping.py` for the older names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raymoe.architectures.rope import rope_parameters

_PREFIXES = ("model.language_model.", "language_model.model.")
_HEADS = ("lm_head.", "language_model.lm_head.")
# Names of modules near the top of a wrapper, and what they are. None of them is in a dense family.
_PARTS: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("visual", "vision_tower", "vision_model", "vision_encoder", "image_tower", "video_tower"),
            *("high_res_vision_model", "high_res_vision_neck", "high_res_vision_proj", "high_res_vision_alpha"),
            *("vit", "density_router"),
        ),
        "vision encoder",
    ),
    **dict.fromkeys(
        ("audio_tower", "encoder", "acoustic_tokenizer_encoder", "semantic_tokenizer_encoder"), "audio encoder"
    ),
    **dict.fromkeys(
        (
            *("multi_modal_projector", "connector", "projector", "image_newline", "visual_embeddings_table"),
            *("aligner", "vision_projection", "merger", "embed_vision", "vision_embedder", "embed_audio"),
            *("layerwise_projectors", "spatial_projectors", "mlp_AR"),
        ),
        "projector",
    ),
    **dict.fromkeys(
        ("vqmodel", "generation_embeddings", "generation_aligner", "generation_head"), "parts that make images"
    ),
    "embed_tokens_extend": "encoders and projectors of images and audio",
    **dict.fromkeys(("talker", "token2wav"), "parts that make speech"),
    "mtp": "layers of multi-token prediction",
}
OTHER_PART = "other tensors"
# Settings of rotary embeddings that concern images only.
_AXES = ("mrope_section", "mrope_interleaved", "xdrope_section")
# Types of such rotary embeddings, and what they are in text.
_AXES_TYPES = {"mrope": "default", "xdrope": "dynamic"}
# Keys of a wrapper's config that a mixture's own replace, or that do not hold for it.
_OF_TEXT = ("text_config", "auto_map", "quantization_config", "_name_or_path")
# Keys of encoders in a config.json that has the text part's keys at the top.
_ENCODER_CONFIGS = ("vision_config", "audio_config")
# Keys that a saver writes at the top only, and that a text model has in its own config.
_OF_BOTH = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapper:
    """One model type whose text part is a dense model.

    Attributes:
        model_type: Its `model_type` in config.json.
        title: Its name in messages and docs.
        text_type: The `model_type` of its text part if `text_config` names none.
        prefixes: Prefixes that stand for `model.` in names of the text part, the longest first.
        heads: Prefixes that stand for `lm_head.`.
        text_defaults: Values that transformers assumes for keys that `text_config` leaves out, beyond those of the
            text part's own class.
        is_flat: Older config.json files have the text part's keys at the top.
        inside: The key of config.json with the config that has `text_config`. Empty: it is the whole config.json.
        renames: Parts of names in the text part that differ from those of its family, and the family's. Those that do
            not begin with a dot are at the beginning.
        keys: The same for keys of its config.
        mixture: The wrapper of `MIXTURE_WRAPPERS` that has the same encoder around a mixture. Empty: there is none.
        plain_type: The `model_type` that its text part has by itself, if that is another.
        has_axes: Its text part has RoPE with three axes, which the family of the text does not have.
        class_name: Its class in transformers. Only mixtures, which raymoe writes, need it.
    """

    model_type: str
    title: str
    text_type: str
    prefixes: tuple[str, ...] = _PREFIXES
    heads: tuple[str, ...] = _HEADS
    text_defaults: Mapping[str, Any] = field(default_factory=dict)
    is_flat: bool = False
    inside: str = ""
    renames: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    mixture: str = ""
    plain_type: str = ""
    has_axes: bool = False
    class_name: str = ""

    def wrapped_name(self, name: str) -> str:
        """The name in the wrapper of a tensor of the text part."""
        return self.prefixes[0] + name.removeprefix("model.") if name.startswith("model.") else name

    def text_name(self, name: str) -> str:
        """The name of a tensor or module in the text part, without the wrapper. Empty for all other parts."""
        if part_of(name) != OTHER_PART:
            return ""
        for prefixes, plain in ((self.prefixes, "model."), (self.heads, "lm_head.")):
            for prefix in prefixes:
                if name.startswith(prefix):
                    return plain + self._renamed(name.removeprefix(prefix))
        return ""

    def _renamed(self, name: str) -> str:
        name += "."  # that of a module ends with one of the parts
        for old, new in self.renames.items():
            if old.startswith("."):
                name = name.replace(old, new)
            elif name.startswith(old):
                name = new + name.removeprefix(old)
        return name.removesuffix(".")


def part_of(name: str) -> str:
    """What a tensor or module outside the text part belongs to, in words."""
    return next((_PARTS[word] for word in name.split(".")[:2] if word in _PARTS), OTHER_PART)


# Types that only name the text part of a wrapper, and the family that computes the same for text.
TEXT_TYPES: Mapping[str, str] = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "gemma4_unified_text": "gemma4_text",
    "granite4_vision_text": "granite",
    "granite_docling_text": "granite",
    "paddleocr_vl_text": "llama",
    "hunyuan_vl_text": "hunyuan_v1_dense",
    "qwen2_5_omni_text": "qwen2",
    "emu3_text_model": "llama",
}

# Sizes that transformers' classes assume: savers of transformers 4 left them out of `text_config`.
_CLASS_SIZES: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "qwen3": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}

_IDEFICS_PREFIXES = ("model.text_model.",)
_OMNI_DEFAULTS = {
    "num_key_value_heads": 4,
    "sliding_window": 32768,
    "rope_theta": 1000000.0,
}

WRAPPERS: Mapping[str, Wrapper] = {
    wrapper.model_type: wrapper
    for wrapper in (
        Wrapper(model_type="qwen3_5", title="Qwen3.5", text_type="qwen3_5_text", mixture="qwen3_5_moe"),
        Wrapper(model_type="gemma4", title="Gemma 4", text_type="gemma4_text", mixture="gemma4"),
        Wrapper(
            model_type="gemma4_unified",
            title="Gemma 4 without encoders (12B)",
            text_type="gemma4_unified_text",
            text_defaults={
                "max_position_embeddings": 262144,
                "sliding_window": 1024,
                "hidden_size_per_layer_input": 0,
            },
        ),
        Wrapper(model_type="qwen3_vl", title="Qwen3-VL", text_type="qwen3_vl_text", mixture="qwen3_vl_moe"),
        Wrapper(
            model_type="qwen2_5_vl",
            title="Qwen2.5-VL",
            text_type="qwen2_5_vl_text",
            prefixes=(*_PREFIXES, "model."),
            is_flat=True,
        ),
        Wrapper(
            model_type="qwen2_vl",
            title="Qwen2-VL",
            text_type="qwen2_vl_text",
            prefixes=(*_PREFIXES, "model."),
            is_flat=True,
        ),
        Wrapper(model_type="mistral3", title="Mistral Small 3.1 and 3.2, Ministral 3", text_type="mistral"),
        Wrapper(model_type="llava", title="LLaVA, Pixtral", text_type="llama"),
        Wrapper(model_type="llava_next", title="LLaVA-NeXT, Granite Vision", text_type="llama"),
        Wrapper(model_type="llava_next_video", title="LLaVA-NeXT-Video", text_type="llama"),
        Wrapper(model_type="llava_onevision", title="LLaVA-OneVision", text_type="qwen2"),
        Wrapper(model_type="vipllava", title="VipLLaVA", text_type="llama"),
        Wrapper(model_type="video_llava", title="Video-LLaVA", text_type="llama"),
        Wrapper(model_type="internvl", title="InternVL", text_type="qwen2"),
        Wrapper(
            model_type="idefics3",
            title="Idefics3",
            text_type="llama",
            prefixes=_IDEFICS_PREFIXES,
            text_defaults={"rms_norm_eps": 1e-5},
        ),
        Wrapper(
            model_type="smolvlm",
            title="SmolVLM",
            text_type="llama",
            prefixes=_IDEFICS_PREFIXES,
            text_defaults={"rms_norm_eps": 1e-5},
        ),
        Wrapper(model_type="idefics2", title="Idefics2", text_type="mistral", prefixes=_IDEFICS_PREFIXES),
        Wrapper(model_type="lfm2_vl", title="LFM2-VL", text_type="lfm2"),
        Wrapper(model_type="aya_vision", title="Aya Vision", text_type="cohere2"),
        Wrapper(model_type="cohere2_vision", title="Command A Vision", text_type="cohere2"),
        Wrapper(model_type="ovis2", title="Ovis2", text_type="qwen2"),
        Wrapper(model_type="got_ocr2", title="GOT-OCR2", text_type="qwen2"),
        Wrapper(model_type="voxtral", title="Voxtral", text_type="llama"),
        Wrapper(model_type="granite_speech", title="Granite Speech", text_type="granite"),
        Wrapper(model_type="qwen2_audio", title="Qwen2-Audio", text_type="qwen2"),
        Wrapper(model_type="deepseek_vl", title="DeepSeek-VL (small)", text_type="llama"),
        Wrapper(model_type="deepseek_vl_hybrid", title="DeepSeek-VL (large)", text_type="llama"),
        Wrapper(model_type="janus", title="Janus", text_type="llama"),
        Wrapper(model_type="lighton_ocr", title="LightOnOCR", text_type="qwen3"),
        Wrapper(model_type="minicpmv4_6", title="MiniCPM-V 4.6", text_type="qwen3_5_text"),
        Wrapper(model_type="minicpmv4_7", title="MiniCPM-V 4.7", text_type="qwen3_5_text"),
        Wrapper(model_type="minicpm_ocr", title="MiniCPM-OCR", text_type="qwen3_5_text"),
        Wrapper(model_type="pp_chart2table", title="PP-Chart2Table", text_type="qwen2"),
        Wrapper(
            model_type="qianfan_ocr",
            title="Qianfan-OCR",
            text_type="qwen3",
            # transformers 5 saves the layers of the text model under `encoder`, as those of the vision encoder.
            prefixes=("model.language_model.", "language_model.model.encoder.", "language_model.model."),
        ),
        Wrapper(model_type="video_llama_3", title="VideoLLaMA 3", text_type="qwen2"),
        Wrapper(model_type="glmasr", title="GLM-ASR", text_type="llama"),
        Wrapper(model_type="audioflamingo3", title="Audio Flamingo 3", text_type="qwen2"),
        Wrapper(model_type="moss_transcribe_diarize", title="MOSS Transcribe Diarize", text_type="qwen3"),
        Wrapper(model_type="granite_speech_plus", title="Granite Speech Plus", text_type="granite"),
        Wrapper(model_type="qwen3_asr", title="Qwen3-ASR", text_type="qwen3"),
        Wrapper(model_type="fast_vlm", title="FastVLM", text_type="qwen2"),
        Wrapper(model_type="perception_lm", title="Perception LM", text_type="llama"),
        Wrapper(model_type="granite4_vision", title="Granite 4 Vision", text_type="granite4_vision_text"),
        Wrapper(
            model_type="granite_docling",
            title="Granite Docling",
            text_type="granite_docling_text",
            prefixes=_IDEFICS_PREFIXES,
            text_defaults={
                "num_key_value_heads": 4,
                "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-5,
                "tie_word_embeddings": True,
                "embedding_multiplier": 12.0,
                "logits_scaling": 4.0,
                "residual_multiplier": 0.263,
                "attention_multiplier": 0.015625,
            },
        ),
        Wrapper(
            model_type="paddleocr_vl",
            title="PaddleOCR-VL",
            text_type="paddleocr_vl_text",
            prefixes=(*_PREFIXES, "model."),
            is_flat=True,
            text_defaults={
                "num_key_value_heads": 2,
                "head_dim": 128,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500000.0,
                "tie_word_embeddings": True,
            },
        ),
        Wrapper(
            model_type="hunyuan_vl",
            title="Hunyuan-VL, Hunyuan-OCR",
            text_type="hunyuan_vl_text",
            prefixes=(*_PREFIXES, "model."),
            is_flat=True,
            text_defaults={"tie_word_embeddings": True},
        ),
        Wrapper(
            model_type="phi4_multimodal",
            title="Phi-4 Multimodal",
            text_type="phi3",
            prefixes=("model.",),
            is_flat=True,
            text_defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072},
        ),
        Wrapper(
            model_type="qwen2_5_omni",
            title="Qwen2.5-Omni",
            text_type="qwen2_5_omni_text",
            prefixes=("thinker.model.",),
            heads=("thinker.lm_head.",),
            inside="thinker_config",
            text_defaults=_OMNI_DEFAULTS,
        ),
        Wrapper(
            model_type="qwen2_5_omni_thinker",
            title="Qwen2.5-Omni without speech",
            text_type="qwen2_5_omni_text",
            prefixes=("model.",),
            text_defaults=_OMNI_DEFAULTS,
        ),
        Wrapper(model_type="vibevoice_asr", title="VibeVoice-ASR", text_type="qwen2"),
        Wrapper(model_type="fun_asr_nano", title="Fun-ASR-Nano", text_type="qwen3"),
        Wrapper(model_type="omniasr", title="Omnilingual ASR", text_type="llama"),
        Wrapper(
            model_type="emu3",
            title="Emu3",
            text_type="emu3_text_model",
            prefixes=("model.text_model.", "text_model.model."),
            heads=("lm_head.", "text_model.lm_head."),
            text_defaults={
                "num_key_value_heads": 8,
                "max_position_embeddings": 9216,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1000000.0,
            },
        ),
        # No image: a Llama whose tensors have names of their own.
        Wrapper(
            model_type="exaone",
            title="EXAONE 3",
            text_type="llama",
            prefixes=("transformer.", "model."),
            is_flat=True,
            renames={
                "wte.": "embed_tokens.",
                "h.": "layers.",
                "ln_f.": "norm.",
                ".attn.attention.": ".self_attn.",
                ".out_proj.": ".o_proj.",
                ".ln_1.": ".input_layernorm.",
                ".ln_2.": ".post_attention_layernorm.",
                ".mlp.c_fc_0.": ".mlp.gate_proj.",
                ".mlp.c_fc_1.": ".mlp.up_proj.",
                ".mlp.c_proj.": ".mlp.down_proj.",
            },
            keys={
                "num_layers": "num_hidden_layers",
                "layer_norm_epsilon": "rms_norm_eps",
                "activation_function": "hidden_act",
            },
            text_defaults={
                "num_key_value_heads": 8,
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500000.0,
            },
        ),
    )
}


MIXTURE_WRAPPERS: Mapping[str, Wrapper] = {
    wrapper.model_type: wrapper
    for wrapper in (
        Wrapper(
            model_type="qwen3_5_moe",
            title="Qwen3.5 MoE",
            text_type="qwen3_5_moe_text",
            # A mixture without an encoder has the names of a text model.
            prefixes=(*_PREFIXES, "model."),
            class_name="Qwen3_5MoeForConditionalGeneration",
        ),
        # The type of the dense model, too: the text part says which of the two a model is.
        Wrapper(
            model_type="gemma4",
            title="Gemma 4 MoE",
            text_type="gemma4_text",
            class_name="Gemma4ForConditionalGeneration",
        ),
        Wrapper(
            model_type="qwen3_vl_moe",
            title="Qwen3-VL MoE",
            text_type="qwen3_vl_moe_text",
            plain_type="qwen3_moe",
            has_axes=True,
            class_name="Qwen3VLMoeForConditionalGeneration",
        ),
    )
}
"""Wrappers whose text part is a mixture that raymoe writes."""


def find_wrapper(config: Mapping[str, Any]) -> Wrapper | None:
    """The wrapper that a config.json describes; None for a text model and for types that raymoe does not know."""
    model_type = config.get("model_type")
    return WRAPPERS.get(model_type) or MIXTURE_WRAPPERS.get(model_type) if isinstance(model_type, str) else None


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model: that of a wrapper's text part, or the whole config.json of a text model."""
    wrapper = find_wrapper(config)
    return text_config(wrapper, config) if wrapper else config


def mixture_wrapper(config: Mapping[str, Any], text_type: str) -> Wrapper | None:
    """The wrapper of a mixture of type `text_type` that has the encoder of the wrapper that `config` describes."""
    wrapper = find_wrapper(config)
    name = (wrapper.mixture or (wrapper.model_type if has_encoder(config) else "")) if wrapper else ""
    found = MIXTURE_WRAPPERS.get(name)
    return found if found and text_type in (found.text_type, found.plain_type) else None


def wrapped_config(mixture: Wrapper, base: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a mixture with the encoder of a base: `base` is that of the base's wrapper, `text` that of the
    mixture alone."""
    kept = {key: value for key, value in base.items() if key not in (*_OF_TEXT, *_OF_BOTH)}
    shared = {key: text[key] for key in ("tie_word_embeddings", *_OF_BOTH) if key in text}
    own = {key: value for key, value in text.items() if key != "architectures"}
    if mixture.has_axes:
        rope = rope_parameters(base.get("text_config") or base)
        own["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    vision = {**base.get("vision_config", {}), "model_type": f"{mixture.model_type}_vision"}
    names = {"architectures": [mixture.class_name], "model_type": mixture.model_type}
    return dict(sorted({**kept, **shared, **names, "text_config": own, "vision_config": vision}.items()))


def wrapped_text_config(mixture: Wrapper, text: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a mixture that reads text only, in the form of the wrapper: without an encoder, and with the
    class of the text model. `text` is that of the mixture alone."""
    shared = {key: text[key] for key in ("architectures", "tie_word_embeddings", *_OF_BOTH) if key in text}
    own = {key: value for key, value in text.items() if key != "architectures"}
    return dict(sorted({**shared, "model_type": mixture.model_type, "text_config": own}.items()))


def has_encoder(config: Mapping[str, Any]) -> bool:
    """Whether a mixture's config.json describes an encoder around the text model."""
    return find_wrapper(config) is not None and "vision_config" in config


def text_config(wrapper: Wrapper, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text part alone, as a text model of its family would have it.

    `tie_word_embeddings` is the wrapper's own if it is set there, as in transformers.
    """
    outer = config.get(wrapper.inside) if wrapper.inside else config
    config = outer if isinstance(outer, Mapping) else {}
    given = config.get("text_config")
    own: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    if not own and wrapper.is_flat:
        own = {k: value for k, value in config.items() if k != "model_type" and k not in _ENCODER_CONFIGS}
    own = {wrapper.keys.get(key, key): value for key, value in own.items()}
    model_type = own.get("model_type") or wrapper.text_type
    model_type = TEXT_TYPES.get(model_type, model_type) if isinstance(model_type, str) else model_type
    shared = {key: config[key] for key in _OF_BOTH if config.get(key) is not None}
    sizes = _CLASS_SIZES.get(model_type, {}) if isinstance(model_type, str) else {}
    text = {**sizes, **wrapper.text_defaults, **shared, **own, "model_type": model_type}
    if isinstance(config.get("tie_word_embeddings"), bool):
        text["tie_word_embeddings"] = config["tie_word_embeddings"] or own.get("tie_word_embeddings") is True
    has_axes = wrapper.has_axes or model_type in TEXT_TYPES.values()
    return _without_axes(text) if has_axes else text


def _without_axes(text: dict[str, Any]) -> dict[str, Any]:
    """The config with the RoPE of a text model. Types that keep the axes in their mixture carry them themselves."""
    rope = rope_parameters(text)
    for key in _AXES:
        rope.pop(key, None)
    for key in ("rope_type", "type"):
        if isinstance(kind := rope.get(key), str):
            rope[key] = _AXES_TYPES.get(kind, kind)
    plain = {key: value for key, value in text.items() if key not in ("rope_scaling", "rope_parameters")}
    return {**plain, "rope_parameters": rope} if rope else plain
