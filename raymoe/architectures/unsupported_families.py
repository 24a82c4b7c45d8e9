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
        model_types=("exaone4",),
        reason="its norms are after attention and FFN, those of EXAONE MoE before them",
    ),
    UnsupportedFamily(
        title="Ministral 3",
        model_types=("ministral3", "mistral3"),
        reason="beyond its original context its queries are scaled by their position, which no MoE architecture with "
        "its attention does",
    ),
    UnsupportedFamily(
        title="HyperCLOVA X",
        model_types=("hyperclovax",),
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
        title="GPT-2, GPT-J, GPT-Neo, GPT-NeoX (Pythia), OPT, BLOOM, MPT, CodeGen, StarCoder",
        model_types=("gpt2", "gptj", "gpt_neo", "gpt_neox", "opt", "bloom", "mpt", "codegen", "gpt_bigcode"),
        reason=_NO_GATE,
    ),
    UnsupportedFamily(
        title="StarCoder2, Phi-1 and Phi-2, Persimmon",
        model_types=("starcoder2", "phi", "persimmon"),
        reason=_NO_GATE,
    ),
    UnsupportedFamily(
        title="Nemotron, Arcee AFM, Apertus, Jais 2, nanochat",
        model_types=("nemotron", "arcee", "apertus", "jais2", "nanochat"),
        reason=_NO_GATE,
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
        model_types=("lfm3",),
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
        title="Llama 3.2 Vision",
        model_types=("mllama", "mllama_text_model"),
        reason="some of its layers attend to the image instead of the text, and no MoE architecture has such layers",
    ),
    UnsupportedFamily(
        title="GLM-4V",
        model_types=("glm4v", "glm4v_text", "glm46v"),
        reason="its text model has norms before and after attention and FFN, as GLM-4 of 2025 has",
    ),
    UnsupportedFamily(
        title="PaliGemma, ShieldGemma 2, ColPali",
        model_types=("paligemma", "shieldgemma2", "colpali"),
        reason="its text model is a Gemma 1 to 3, which Gemma 4's MoE does not compute",
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
        ),
        reason="it is a mixture of experts already; experts are made of dense models",
    ),
)


_REASONS: Mapping[str, str] = {name: family.reason for family in UNSUPPORTED for name in family.model_types}


def unsupported_reason(model_type: str) -> str:
    """The reason why models of this type are refused; empty for a type that is not listed."""
    return _REASONS.get(model_type, "")
