"""Pico image-text and audio-text models: a dense text model beside a small encoder, as transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.pico import HIDDEN, VOCAB, make_config, randomise, save_tokenizer

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "patch_size": 8,
}
_AUDIO = {"num_mel_bins": 16, "max_source_positions": 16}
_AUDIO_LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_SAM_VISION = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "mlp_dim": 48,
    "global_attn_indexes": [1],
    "window_size": 2,
}
_GRANITE_SPEECH = {
    "encoder_config": {
        "hidden_dim": 32,
        "num_layers": 1,
        "num_heads": 2,
        "dim_head": 16,
        "output_dim": 12,
        "input_dim": 16,
        "feedforward_mult": 1,
    },
    "projector_config": {
        "model_type": "blip_2_qformer",
        "hidden_size": 32,
        "encoder_hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    },
}


def _vision(model_type: str = "", **more: Any) -> dict[str, Any]:
    return {"vision_config": {**_VISION, **({"model_type": model_type} if model_type else {}), **more}}


_VIBEVOICE_ENCODER = {
    "model_type": "vibevoice_acoustic_tokenizer_encoder",
    "hidden_size": 16,
    "num_filters": 4,
    "downsampling_ratios": [2, 2],
    "depths": [1, 1, 1],
}
# Wrapper -> the family of its text, and the other keys of its config.
WRAPPED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("qwen3_5_text", {"vision_config": {**_QWEN_VISION, "num_position_embeddings": 16}}),
    "gemma4": (
        "gemma4_text",
        {
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "pooling_kernel_size": 2,
                "patch_size": 4,
                "position_embedding_size": 32,
            },
            "audio_config": None,
        },
    ),
    "gemma4_unified": (
        "gemma4_text",
        {
            "vision_config": {
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 32,
                "mm_posemb_size": 16,
                "output_proj_dims": 32,
            },
            "audio_config": None,
        },
    ),
    "qwen3_vl": (
        "qwen3",
        {"vision_config": {**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}},
    ),
    "qwen2_5_vl": ("qwen2", {"vision_config": {**_QWEN_VISION, "fullatt_block_indexes": [1]}}),
    "qwen2_vl": ("qwen2", {"vision_config": {**_QWEN_VISION, "embed_dim": 32, "hidden_size": HIDDEN}}),
    "mistral3": ("mistral", _vision("pixtral", head_dim=16)),
    "llava": ("llama", _vision("clip_vision_model", projection_dim=32)),
    "llava_next": ("granite", _vision("siglip_vision_model")),
    "llava_next_video": ("llama", _vision("clip_vision_model", projection_dim=32)),
    "llava_onevision": ("qwen2", _vision("siglip_vision_model")),
    "vipllava": ("llama", _vision("clip_vision_model", projection_dim=32, num_hidden_layers=13)),
    "video_llava": ("llama", _vision("clip_vision_model", projection_dim=32)),
    "internvl": ("qwen3", _vision(image_size=[28, 28], patch_size=[14, 14])),
    "idefics3": ("llama", _vision()),
    "smolvlm": ("llama", _vision()),
    "idefics2": (
        "mistral",
        {
            **_vision(),
            "perceiver_config": {
                "hidden_size": HIDDEN,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 16,
                "num_key_value_heads": 1,
            },
        },
    ),
    "lfm2_vl": ("lfm2", _vision("siglip2_vision_model", num_patches=16)),
    "aya_vision": ("cohere2", _vision("siglip_vision_model")),
    "cohere2_vision": ("cohere2", _vision("siglip_vision_model")),
    "got_ocr2": ("qwen2", {"vision_config": _SAM_VISION}),
    "ovis2": (
        "qwen2",
        {**_vision(vocab_size=64, num_visual_indicator_tokens=5), "hidden_size": HIDDEN, "vocab_size": VOCAB},
    ),
    "voxtral": (
        "llama",
        {
            "audio_config": {
                **_AUDIO,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "vocab_size": 60,
            }
        },
    ),
    "granite_speech": ("granite", _GRANITE_SPEECH),
    "qwen2_audio": (
        "qwen2",
        {
            "audio_config": {
                **_AUDIO,
                "d_model": 32,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 48,
            }
        },
    ),
    "deepseek_vl": ("llama", _vision("siglip_vision_model")),
    "deepseek_vl_hybrid": (
        "llama",
        {**_vision("siglip_vision_model"), "high_res_vision_config": {"model_type": "sam_vision_model", **_SAM_VISION}},
    ),
    "janus": (
        "llama",
        {
            **_vision(projection_dim=HIDDEN),
            "vq_config": {
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "latent_channels": 8,
                "embed_dim": 8,
                "num_embeddings": 16,
                "num_patches": 4,
                "image_token_embed_dim": HIDDEN,
                "projection_dim": HIDDEN,
            },
        },
    ),
    "lighton_ocr": ("qwen3", _vision("pixtral", head_dim=16)),
    "minicpmv4_6": ("qwen3_5_text", _vision()),
    "minicpmv4_7": ("qwen3_5_text", _vision()),
    "minicpm_ocr": ("qwen3_5_text", _vision()),
    "pp_chart2table": ("qwen2", {"vision_config": _SAM_VISION}),
    "qianfan_ocr": ("qwen3", _vision(image_size=[28, 28], patch_size=[14, 14])),
    "video_llama_3": ("qwen2", _vision()),
    "glmasr": ("llama", {"audio_config": _AUDIO_LAYERS}),
    "audioflamingo3": ("qwen2", {"audio_config": {**_AUDIO, **_AUDIO_LAYERS}}),
    "moss_transcribe_diarize": ("qwen3", {"audio_config": {**_AUDIO, **_AUDIO_LAYERS}}),
    "granite_speech_plus": ("granite", _GRANITE_SPEECH),
    "qwen3_asr": (
        "qwen3",
        {
            "audio_config": {
                **_AUDIO,
                "d_model": 32,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 48,
                "output_dim": HIDDEN,
                "downsample_hidden_size": 16,
            }
        },
    ),
    "fast_vlm": ("qwen2", _vision("clip_vision_model", projection_dim=32)),
    "perception_lm": ("llama", _vision("clip_vision_model", projection_dim=32, model_args={"embed_dim": 32})),
    "granite4_vision": (
        "granite",
        {
            **_vision("siglip_vision_model", hidden_size=64),
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[0, 1]],
            "qformer_config": {"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 48},
        },
    ),
    "granite_docling": (
        "granite",
        _vision(image_size=64, patch_size=16, out_hidden_size=HIDDEN, scale_factor=2, deepstack_visual_indexes=[0]),
    ),
    "paddleocr_vl": ("llama", _vision(spatial_merge_size=2)),
    "hunyuan_vl": ("hunyuan_v1_dense", _vision(text_hidden_size=HIDDEN)),
    "qwen2_5_omni_thinker": (
        "qwen2",
        {
            "vision_config": {**_QWEN_VISION, "fullatt_block_indexes": [1]},
            "audio_config": {
                **_AUDIO,
                "d_model": 32,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 48,
                "output_dim": HIDDEN,
            },
        },
    ),
    "vibevoice_asr": (
        "qwen2",
        {f"{kind}_tokenizer_encoder_config": _VIBEVOICE_ENCODER for kind in ("acoustic", "semantic")},
    ),
    "fun_asr_nano": (
        "qwen3",
        {
            "audio_config": {
                **_AUDIO_LAYERS,
                "num_mel_bins": 8,
                "num_stacked_frames": 2,
                "num_timestamp_prediction_layers": 1,
            },
            "adaptor_config": {
                "hidden_size": HIDDEN,
                "intermediate_size": HIDDEN // 4,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "projector_hidden_size": 32,
            },
        },
    ),
    "emu3": (
        "llama",
        {
            "vq_config": {
                "codebook_size": 16,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "hidden_size": 32,
            },
            "vocabulary_map": {"<image>": 400},
        },
    ),
}
_MROPE = {"rope_type": "default", "rope_theta": 20_000.0, "mrope_section": [4, 2, 2]}
_TEXT_KEYS: Mapping[str, dict[str, Any]] = {
    "qwen2_vl": {"model_type": "qwen2_vl_text", "rope_parameters": _MROPE},
    "qwen2_5_vl": {"model_type": "qwen2_5_vl_text", "rope_parameters": _MROPE},
    "gemma4_unified": {"model_type": "gemma4_unified_text", "final_logit_softcapping": 50.0},
    "granite4_vision": {"model_type": "granite4_vision_text"},
    "granite_docling": {"model_type": "granite_docling_text"},
    "paddleocr_vl": {"model_type": "paddleocr_vl_text", "rope_parameters": _MROPE},
    "hunyuan_vl": {"model_type": "hunyuan_vl_text", "rope_parameters": {**_MROPE, "mrope_section": [2, 2, 2, 2]}},
    "qwen2_5_omni_thinker": {"model_type": "qwen2_5_omni_text", "rope_parameters": _MROPE},
    "emu3": {"model_type": "emu3_text_model"},
    "qwen3_vl": {"model_type": "qwen3_vl_text", "rope_parameters": {**_MROPE, "mrope_interleaved": True}},
}


# Prefixes that transformers 4.5x writes and 5.x does not. By wrapper: the prefix of 5.x and the other one.
OTHER_NAMES: Mapping[str, Mapping[str, str]] = {
    "llava": {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."},
    "qwen2_5_vl": {"model.": "model.language_model."},
    "paddleocr_vl": {"model.language_model.": "model.", "model.projector.": "mlp_AR.", "model.visual.": "visual."},
    "mistral3": {"language_model.model.": "model.language_model.", "vision_tower.": "model.vision_tower."},
}


def make_wrapped(wrapper: str, text_family: str = "", **text_options: Any) -> Any:
    """The model itself, with random weights."""
    family, other = WRAPPED[wrapper]
    family = text_family or family
    text = {**make_config(family, **text_options).to_dict(), **_TEXT_KEYS.get(wrapper, {})}
    config = transformers.AutoConfig.for_model(wrapper, text_config=text, **other)
    for auto in (transformers.AutoModelForImageTextToText, transformers.AutoModelForSpeechSeq2Seq):
        if type(config) in auto._model_mapping:
            return auto.from_config(config)
    return transformers.AutoModelForSeq2SeqLM.from_config(config)


def save_wrapped(folder: Path, wrapper: str, text_family: str = "", *, seed: int = 0, **text_options: Any) -> Path:
    """A wrapped model with a tokenizer; `text_family` is another family than its usual one, `text_options` are keys of
    its text config."""
    model = make_wrapped(wrapper, text_family, **text_options)
    randomise(model, seed)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def load_wrapped(folder: Path) -> Any:
    """The model of a folder that `save_wrapped` made, in the class that its config.json names."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


def rename_tensors(folder: Path, renamed: Mapping[str, str]) -> Path:
    """Change prefixes of names in model.safetensors: as another version of transformers would have saved them."""
    file = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        prefix = next((old for old in renamed if name.startswith(old)), "")
        tensors[renamed.get(prefix, "") + name.removeprefix(prefix)] = tensor
    save_file(tensors, file, {"format": "pt"})
    return folder


def split_into_shards(folder: Path, shards: int) -> Path:
    """Several safetensors files with an index, as published, instead of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
