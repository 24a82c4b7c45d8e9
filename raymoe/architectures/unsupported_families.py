"""Well-known families that no MoE architecture of transformers computes exactly, with the reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class UnsupportedFamily:
    """Model types of transformers that share one reason."""

    title: str
    model_types: tuple[str, ...]
    reason: str


_NO_GATE = "its FFN is two matrices without a gate, and the experts of every MoE architecture that fits have three"
_CROSS = "its decoder attends to what an encoder computes, and no MoE architecture has such layers"
_HYBRID = "it is a hybrid of attention and state-space layers, which raymoe's tables do not describe"

UNSUPPORTED: tuple[UnsupportedFamily, ...] = (
    UnsupportedFamily(
        title="Gemma 1 to 3",
        model_types=("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"),
        reason="the one MoE with norms before and after attention and FFN, Gemma 4's, also normalizes the values of "
        "attention, as Gemma 1 to 3 do not; Gemma 3n does, and has further parts in each layer (AltUp, LAuReL)",
    ),
    UnsupportedFamily(
        title="GLM-4 of 2025 (0414)",
        model_types=("glm4",),
        reason="it has norms before and after attention and FFN; of MoEs only Gemma 4's has them, and its "
        "attention has norms of queries, keys and values too",
    ),
    UnsupportedFamily(
        title="OLMo 1",
        model_types=("olmo",),
        reason="its LayerNorm has no weights; OLMoE has RMSNorm, and norms of q and k",
    ),
    UnsupportedFamily(
        title="OLMo 3",
        model_types=("olmo3", "olmo_hybrid"),
        reason="most of its layers have a sliding window (in the hybrid: no attention), and FlexOlmo's have none",
    ),
    UnsupportedFamily(
        title="EXAONE 4",
        model_types=("exaone4", "exaone4_5"),
        reason="its norms are after attention and FFN, those of EXAONE MoE before them",
    ),
    UnsupportedFamily(
        title="HyperCLOVA X",
        model_types=("hyperclovax", "hyperclovax_vision_v2"),
        reason="it has norms after attention and FFN, which Granite's MoE lacks",
    ),
    UnsupportedFamily(
        title="StableLM",
        model_types=("stablelm",),
        reason="its LayerNorm has biases and its RoPE rotates a part of each head; PhiMoE, which has such norms, "
        "rotates whole heads, and the weights of its two experts do not sum to one",
    ),
    UnsupportedFamily(
        title="Falcon",
        model_types=("falcon",),
        reason=_NO_GATE,
    ),
    UnsupportedFamily(
        title="GPT, GPT-2, GPT-J, GPT-Neo, GPT-NeoX (Pythia), OPT, BLOOM, MPT, CodeGen, StarCoder, CTRL, XGLM, BioGPT",
        model_types=(
            *("openai-gpt", "gpt2", "gpt-sw3", "gptj", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "opt", "bloom"),
            *("mpt", "codegen", "gpt_bigcode", "ctrl", "xglm", "biogpt"),
        ),
        reason=_NO_GATE,
    ),
    UnsupportedFamily(
        title="BERT, RoBERTa, ELECTRA, XLM, XLNet, Reformer and their kin as decoders",
        model_types=(
            *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
            *("reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta"),
            *("xlm-roberta-xl", "xlnet", "xmod"),
        ),
        reason=_NO_GATE,
    ),
    UnsupportedFamily(
        title="Image-text models around OPT, BERT, Kosmos, Persimmon and Cosmos 3 Edge",
        model_types=(
            *("blip-2", "instructblip", "instructblipvideo", "git", "kosmos-2", "kosmos-2.5", "fuyu", "cosmos3_edge"),
        ),
        reason="the FFN of its text model is two matrices without a gate, and experts have three",
    ),
    UnsupportedFamily(
        title="StarCoder2, Phi-1 and Phi-2, Persimmon",
        model_types=("starcoder2", "phi", "persimmon"),
        reason=_NO_GATE,
    ),
    UnsupportedFamily(
        title="Nemotron, Arcee AFM, Apertus, Jais 2, nanochat",
        model_types=("nemotron", "arcee", "apertus", "apertus1p5", "apertus1p5_text", "jais2", "nanochat"),
        reason=_NO_GATE,
    ),
    UnsupportedFamily(
        title="Encoder-decoder models and their decoders (BART, Pegasus, Marian, Whisper, TrOCR, MusicGen, Florence 2)",
        model_types=(
            *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "blip", "florence2", "marian", "mbart"),
            *("musicgen", "musicgen_melody", "mvp", "pegasus", "pix2struct", "plbart", "pp_formulanet", "prophetnet"),
            *("t5gemma2", "trocr", "udop", "vision-encoder-decoder", "whisper"),
        ),
        reason=_CROSS,
    ),
    UnsupportedFamily(
        title="ModernBERT as a decoder",
        model_types=("modernbert-decoder",),
        reason="its norms are LayerNorms, and its first layer has none before attention; no MoE architecture has both",
    ),
    UnsupportedFamily(
        title="CPM-Ant",
        model_types=("cpmant",),
        reason="its attention adds learned biases for distances instead of RoPE, which no MoE architecture does",
    ),
    UnsupportedFamily(
        title="BLT",
        model_types=("blt",),
        reason="it reads bytes through small models before and after its layers, which no MoE architecture has",
    ),
    UnsupportedFamily(
        title="Chameleon",
        model_types=("chameleon",),
        reason="the norms of its q and k are LayerNorms with weights and biases for each head, and no MoE architecture "
        "has such norms",
    ),
    UnsupportedFamily(
        title="Command Compass (Cohere)",
        model_types=("cohere_compass", "cohere_compass_text"),
        reason="its RoPE has settings of its own for each kind of layer, which Cohere 2's MoE lacks",
    ),
    UnsupportedFamily(
        title="Dory (normalised GPT)",
        model_types=("dory",),
        reason="its norms have no weights, its residuals have, and it runs some of its layers several times over",
    ),
    UnsupportedFamily(
        title="Moshi, Kyutai's speech to text",
        model_types=("moshi", "kyutai_speech_to_text"),
        reason="it reads streams of audio codes beside text in every step, which no MoE architecture does",
    ),
    UnsupportedFamily(
        title="Voxtral Realtime",
        model_types=("voxtral_realtime",),
        reason="a network that sees the delay of the transcript scales the input of its FFN, which no MoE architecture "
        "does",
    ),
    UnsupportedFamily(
        title="BitNet",
        model_types=("bitnet",),
        reason="it has norms inside attention and FFN, and weights of three values",
    ),
    UnsupportedFamily(
        title="MiniCPM3",
        model_types=("minicpm3",),
        reason="it has the attention of DeepSeek's MoE, but scales residuals and embeddings by constants, which that "
        "MoE does not do",
    ),
    UnsupportedFamily(
        title="DiffLlama",
        model_types=("diffllama",),
        reason="no MoE architecture has its attention",
    ),
    UnsupportedFamily(
        title="Doge",
        model_types=("doge",),
        reason="its attention chooses keys by a learned mask and its residuals have weights; its own MoE keeps the "
        "dense FFN and adds single rows to it",
    ),
    UnsupportedFamily(
        title="LFM3",
        model_types=("lfm3", "lfm3_vl"),
        reason="it has norms after attention, convolution and FFN and a gate on attention's output, which LFM2's MoE "
        "lacks",
    ),
    UnsupportedFamily(
        title="VaultGemma",
        model_types=("vaultgemma",),
        reason="its norms multiply by one plus their weight and its attention has a soft cap by default; no MoE "
        "architecture has both",
    ),
    UnsupportedFamily(
        title="Muse Glimmer",
        model_types=("muse_glimmer",),
        reason="it has norms before and after attention and FFN that multiply by one plus their weight; no MoE "
        "architecture has such norms there",
    ),
    UnsupportedFamily(
        title="The drafting models of Gemma 4",
        model_types=("gemma4_assistant", "gemma4_unified_assistant"),
        reason="a drafting model reads keys and values of the model that it drafts for",
    ),
    UnsupportedFamily(
        title="Molmo 2",
        model_types=("molmo2",),
        reason="some of its layers have RoPE scaling and some have none, and its embeddings have rows of a second "
        "vocabulary, which the head lacks; no MoE architecture has both",
    ),
    UnsupportedFamily(
        title="HRM-Text",
        model_types=("hrm_text",),
        reason="it runs its layers several times over, and its norms have no weights",
    ),
    UnsupportedFamily(
        title="Mamba, RWKV, xLSTM",
        model_types=("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"),
        reason="its layers have no FFN that could become experts",
    ),
    UnsupportedFamily(
        title="Jamba, Bamba, Falcon-H1, Zamba, Nemotron-H, RecurrentGemma",
        model_types=("jamba", "bamba", "falcon_h1", "zamba", "zamba2", "nemotron_h", "recurrent_gemma"),
        reason=_HYBRID,
    ),
    UnsupportedFamily(
        title="Nemotron-H Omni, Nemotron 3.5 Transcribe",
        model_types=("nemotron_h_omni", "nemo_speechlm"),
        reason="its text model is a Nemotron-H, a hybrid of attention and state-space layers",
    ),
    UnsupportedFamily(
        title="Llama 3.2 Vision, IDEFICS 1",
        model_types=("mllama", "mllama_text_model", "idefics"),
        reason="some of its layers attend to the image instead of the text, and no MoE architecture has such layers",
    ),
    UnsupportedFamily(
        title="Evolla",
        model_types=("evolla",),
        reason="some of its layers attend to a protein too, and no MoE architecture has such layers",
    ),
    UnsupportedFamily(
        title="GLM-4V, GLM-OCR",
        model_types=("glm4v", "glm4v_text", "glm46v", "glm_ocr", "glmga"),
        reason="its text model has norms before and after attention and FFN, as GLM-4 of 2025 has",
    ),
    UnsupportedFamily(
        title="PaliGemma, ShieldGemma 2, ColPali, PI0",
        model_types=("paligemma", "shieldgemma2", "colpali", "pi0"),
        reason="its text model is a Gemma 1 to 3, which Gemma 4's MoE does not compute",
    ),
    UnsupportedFamily(
        title="Cosmos 3",
        model_types=("cosmos3_omni",),
        reason="its checkpoints hold a second model, which makes images and video, under the same names as its text "
        "model, and raymoe has no table that tells them apart; its text model is a Qwen3, and saved as one it can be "
        "merged",
    ),
    UnsupportedFamily(
        title="Pixtral's vision encoder",
        model_types=("pixtral",),
        reason="this is the encoder alone; the image-text model around it (llava) can be merged",
    ),
    UnsupportedFamily(
        title="Models that are mixtures already",
        model_types=(
            "mixtral",
            "qwen2_moe",
            "qwen3_moe",
            "qwen3_5_moe",
            "qwen3_5_moe_text",
            "olmoe",
            "flex_olmo",
            "granitemoe",
            "granitemoeshared",
            "granitemoe_swa",
            "ernie4_5_moe",
            "hunyuan_v1_moe",
            "cohere2_moe",
            "lfm2_moe",
            "phimoe",
            "gpt_oss",
            "dbrx",
            "llama4",
            "llama4_text",
            "deepseek",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe",
            "glm4_moe_lite",
            "afmoe",
            "dots1",
            "exaone_moe",
            "hy_v3",
            "jetmoe",
            "kimi_linear",
            "laguna",
            "longcat_flash",
            "mellum",
            "mimo_v2_flash",
            "minimax",
            "minimax_m2",
            "qwen3_next",
            "solar_open",
            *("aria", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_ocr2", "deepseek_v4"),
            *("diffusion_gemma", "dots3_note", "dots3_note_text", "ernie4_5_vl_moe", "flint", "glm4v_moe", "glm5_next"),
            *("glm_moe_dsa", "hy_v4", "hy_v4_vl", "inkling_mm_model", "inkling_text", "inkling2", "inkling2_text"),
            *("inkling2_loop", "inkling2_loop_text", "kimi_k25", "kolibri1", "lara_mini", "minimax_m3_vl"),
            *("minimax_m3_vl_text", "mistral4", "mistral_large4", "muse_spark", "qwen3_omni_moe"),
            *("qwen3_omni_moe_thinker", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen4_exp", "qwen4_exp_text"),
            *("sarvam_mla", "sarvam_moe", "step3p7", "unlimited_ocr", "zaya"),
        ),
        reason="it is a mixture of experts already; experts are made of dense models",
    ),
)


_REASONS: Mapping[str, str] = {name: family.reason for family in UNSUPPORTED for name in family.model_types}


def unsupported_reason(model_type: str) -> str:
    """The reason why models of this type are refused; empty for a type that is not listed."""
    return _REASONS.get(model_type, "")
