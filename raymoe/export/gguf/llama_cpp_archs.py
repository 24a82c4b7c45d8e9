"""The architectures of llama.cpp: what each computes, and which models it runs.

llama.cpp's architectures are programs with fixed features. They differ in how they turn router scores into the weights
of a token's experts, and in the factor of a shared expert:

    llama       softmax over all experts, the highest k of them, made to sum to one; no shared expert
    qwen3moe    the same, with norms on queries and keys
    bailingmoe  the same (or not made to sum to one: `expert_weights_norm`), plus a shared expert
    qwen2moe    not made to sum to one, plus a shared expert times the sigmoid of its gate
    granitemoe  made to sum to one, with or without a shared expert, and Granite's multipliers
    hunyuan-moe the same, always with a shared expert, and norms on queries and keys behind the rotary embedding
    glm4moe     sigmoids in the place of the softmax, made to sum to one, plus a shared expert; norms on queries and
                keys where the file has them
    lfm2moe     sigmoids, made to sum to one; short convolutions in the place of attention on some layers
    cohere2moe  softmax, made to sum to one; attention and FFN side by side, windows on some layers
    deepseek2   sigmoids, made to sum to one, plus a shared expert; attention with latent keys and values
    granite_swa softmax, made to sum to one, with or without a shared expert; windows and RoPE on some layers, and sinks
    granitehybrid  the same with Mamba in the place of attention on some layers, RoPE on all others or on none. Without
                Mamba and with RoPE, granitemoe computes it
    qwen35moe   softmax, made to sum to one, plus a shared expert times the sigmoid of its gate; linear attention on
                some layers, a gate on attention's output on the others
    gemma4      softmax, made to sum to one, times a number for each expert; a dense FFN beside the experts, norms
                after both, and heads and RoPE of their own on layers without a window

So a merge does not always use the architecture of the same name. A Qwen2-MoE of raymoe with an empty shared expert is a
`llama` (in qwen2moe its gate of zeros would come out as 0 / 0), a DeepSeek-MoE is a `llama` or, with its shared expert,
a `bailingmoe` (`deepseek` does not make the weights sum to one). ERNIE mixtures are `bailingmoe` too. A merge that no
architecture computes exactly is refused: a file that loads but computes something else is worse than none.

Source: `build_moe_ffn` in llama.cpp's src/llama-graph.cpp and the files of these names in src/models; the kinds of
rotary embedding are listed in `llama_model_rope_type` in src/llama-model.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from raymoe.architectures import DenseSpec
from raymoe.architectures.moe.gemma import EXPERT_SCALE, norm_after_experts
from raymoe.architectures.moe_architecture import EMPTY_SHARED_WIDTH
from raymoe.architectures.tensor_tables import ATTENTION, SLIDING


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCppArchitecture:
    """What an architecture of llama.cpp computes, and which keys and tensors it reads.

    Attributes:
        name: Its name in the file's `general.architecture`.
        dense: Dense model types of transformers that it runs.
        families: Dense families that use it for all merges. Other merges are assigned by their features
            (`choose_target`).
        attention_only: The architecture that its families use instead if all layers have attention with RoPE. Empty:
            such models are refused.
        score_function: The function of router scores before it chooses the highest: softmax or sigmoid.
        rope_is_interleaved: Its RoPE rotates dimension 2i of a head with 2i + 1, where transformers rotates i with
            i + d/2. Rows of q and k are permuted for it.
        has_rope_factors: It reads a divisor for each rotary frequency.
        has_longrope: It reads a list of such divisors for short contexts and another one for long contexts.
        scales_rope: Its RoPE may be scaled.
        has_partial_rotary: Its RoPE may rotate a part of each head.
        has_windows: It has sliding windows on layers that the file lists.
        may_tie: The output matrix may be left out. It is the embedding then.
        needs_shared: Every layer has a shared expert, which may be one of zeros.
        averages_shared: It takes the mean of the shared expert and the sum of the others.
        has_head_dim: The width of a head may differ from hidden size / heads.
        has_layer_norm: Its norms are LayerNorm. Without it, they are RMSNorm.
        has_qkv_bias: It adds biases to q, k and v.
        has_o_bias: It adds a bias to the output of attention.
        has_mlp_bias: It adds biases in the FFN.
        unsupported_reasons: Features of a model that it can't compute, besides the fields above.
        multipliers: Keys with a number of the model's own, and the key of config.json that has it.
        state_sizes: Sizes of layers with a state, as symbols of `DenseSpec.size_of`: kernel of the convolution,
            channels, numbers in a state, heads, groups (heads of keys).
        lists_recurrent_layers: A key names the layers without attention. Without it, those have no heads of keys.
        lists_rope_layers: A key says for each layer whether it has RoPE.
        switches_rope: A key says whether the layers with attention have RoPE.
        has_rope_sections: A key says which pairs of a head are rotated by time, height and width.
        has_expert_width: A key of its own says how wide experts are.
        reads_gating: Keys set the function of router scores, and how many layers come before the first with experts.
        may_begin_dense: Its first layers may have a plain FFN. Without it, every layer has experts.
        counts_shared: A key says how many experts wide the shared expert is. Without it, a key says how wide it is.
        fuses_shared: The shared expert's gate and up matrices are one tensor.
        activation: The activation of its FFN, by transformers' name.
        heads_per_kind: Layers with a window and without have heads and RoPE of their own, which keys name.
        number_keys: Keys with a whole number, and the key of config.json that has it.
        copies: Further names of tensors, by role, for what it has several times over.
        constants: From a model and a number of experts to tensors of each layer whose numbers are all the same: their
            names, shapes and numbers.
        tensor_names: Names of tensors, by role, that differ from those of most architectures (`tensor_map`).
    """

    name: str
    dense: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    attention_only: str = ""
    score_function: str = "softmax"
    rope_is_interleaved: bool = False
    has_rope_factors: bool = False
    has_longrope: bool = False
    scales_rope: bool = True
    has_partial_rotary: bool = False
    has_windows: bool = False
    may_tie: bool = True
    needs_shared: bool = False
    averages_shared: bool = False
    has_head_dim: bool = True
    has_layer_norm: bool = False
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_mlp_bias: bool = False
    unsupported_reasons: Callable[[DenseSpec], Iterator[str]] = lambda spec: iter(())
    multipliers: Mapping[str, str] = field(default_factory=dict)
    state_sizes: tuple[str, ...] = ()
    lists_recurrent_layers: bool = False
    lists_rope_layers: bool = False
    switches_rope: bool = False
    has_rope_sections: bool = False
    has_expert_width: bool = True
    reads_gating: bool = False
    may_begin_dense: bool = False
    counts_shared: bool = False
    fuses_shared: bool = False
    activation: str = "silu"
    heads_per_kind: bool = False
    number_keys: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    constants: Callable[[DenseSpec, int], Iterator[tuple[str, tuple[int, ...], float]]] = lambda spec, experts: iter(())
    tensor_names: Mapping[str, str] = field(default_factory=dict)


# --- features that single architectures can't compute


def _cohere2moe_reasons(spec: DenseSpec) -> Iterator[str]:
    if not any(spec.sliding_layers):
        yield "no layer with a sliding window: it has RoPE on those, and the model on none"


def _deepseek2_reasons(spec: DenseSpec) -> Iterator[str]:
    if spec.extra["q_lora_rank"] and (spec.layers in (26, 27) or (spec.layers, spec.vocab) == (48, 128256)):
        yield f"{spec.layers} layers: it takes such a model for one without latent queries (q_lora_rank)"
    if spec.rms_norm_eps != 1e-6:
        yield f"rms_norm_eps {spec.rms_norm_eps:g}: norms of latent numbers have it there, and 1e-06 in the model"


def _granite_swa_reasons(spec: DenseSpec) -> Iterator[str]:
    thetas = {theta for theta in spec.extra["layer_rope_theta"] if theta}
    if not thetas:
        yield "no layer with a rotary embedding (layer_rope_theta): it has some"
    elif len(thetas) > 1:
        yield f"rotary embeddings of {len(thetas)} kinds (layer_rope_theta): it has one, or none, in each layer"


def _granitehybrid_reasons(spec: DenseSpec) -> Iterator[str]:
    extra, inner = spec.extra, spec.size_of("mamba_n_heads*mamba_d_head")
    if inner != 2 * spec.hidden:
        yield f"{inner} channels of Mamba: it has twice the hidden_size, {2 * spec.hidden}"
    if extra["mamba_n_groups"] != 1:
        yield f"mamba_n_groups {extra['mamba_n_groups']}: it takes the norm of each group, the model that of all"
    if not extra["mamba_conv_bias"]:
        yield "no bias on Mamba's convolution: it has one"
    if extra["mamba_proj_bias"]:
        yield "a bias on Mamba's projections: it has none"
    if not _is_unlimited(extra["time_step_limit"]):
        yield f"time_step_limit {extra['time_step_limit']}: it has none"


def _is_unlimited(limit: Sequence[Any]) -> bool:
    """Whether time steps may have any value from 0 up. transformers writes infinity as an object."""
    lowest, highest = limit
    return float(lowest) == 0 and (isinstance(highest, Mapping) or float(highest) == math.inf)


def _qwen35moe_reasons(spec: DenseSpec) -> Iterator[str]:
    keys, values = spec.extra["linear_key_head_dim"], spec.extra["linear_value_head_dim"]
    if keys != values:
        yield f"linear attention with keys of {keys} and values of {values}: it has both of one size"


def _gemma4_reasons(spec: DenseSpec) -> Iterator[str]:
    ropes = spec.extra["rope_parameters"]
    kinds = {kind: ropes[kind].get("rope_type", "default") for kind in (SLIDING, ATTENTION)}
    if kinds != {SLIDING: "default", ATTENTION: "proportional"}:
        yield f"RoPE of types {', '.join(kinds.values())}: it has default with a window, proportional without"
    inputs, rows = spec.extra["hidden_size_per_layer_input"], spec.extra["vocab_size_per_layer_input"]
    if inputs and rows != spec.vocab:
        yield f"vocab_size_per_layer_input {rows}: it has that of the vocabulary, {spec.vocab}"
    # Where it takes the keys and values of layers without their own: src/llama-model.cpp, `reuse`.
    types, shared = spec.layer_types, spec.extra["num_kv_shared_layers"]
    if shared and types[: spec.layers - shared][-2:] != [SLIDING, ATTENTION]:
        yield (
            f"num_kv_shared_layers {shared}: it takes their keys and values from the two layers before them, the first "
            "of which has to have a window, and the second none"
        )
    if ropes[ATTENTION].get("factor", 1.0) != 1.0:
        yield f"RoPE with factor {ropes[ATTENTION]['factor']!r}: it has none"


def _gemma4_constants(spec: DenseSpec, experts: int) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """What cancels the norm after the experts, and a dense FFN of zeros: architectures/moe/gemma.py."""
    shapes = {"gate": (EMPTY_SHARED_WIDTH, spec.hidden), "up": (EMPTY_SHARED_WIDTH, spec.hidden)}
    for matrix, shape in {**shapes, "down": (spec.hidden, EMPTY_SHARED_WIDTH)}.items():
        yield f"ffn_{matrix}.weight", shape, 0.0
    yield "post_ffw_norm_1.weight", (spec.hidden,), 1.0
    yield "post_ffw_norm_2.weight", (spec.hidden,), norm_after_experts(spec.rms_norm_eps)
    yield "ffn_down_exps.scale", (experts,), EXPERT_SCALE


# --- the table

_GRANITE_MULTIPLIERS = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
}
_POST_NORM = {"norm.post": "post_attention_norm.weight"}

ARCHITECTURES: Mapping[str, LlamaCppArchitecture] = MappingProxyType(
    {
        architecture.name: architecture
        for architecture in (
            LlamaCppArchitecture(
                name="llama",
                dense=("llama", "mistral", "ernie4_5", "helium"),
                rope_is_interleaved=True,
                has_rope_factors=True,
                has_longrope=True,
                has_qkv_bias=True,
                has_o_bias=True,
                has_mlp_bias=True,
                has_expert_width=False,
            ),
            LlamaCppArchitecture(
                name="bailingmoe",
                rope_is_interleaved=True,
                has_rope_factors=True,
                may_tie=False,
                reads_gating=True,
                counts_shared=True,
            ),
            LlamaCppArchitecture(name="qwen2moe", may_tie=False, has_head_dim=False, has_qkv_bias=True),
            LlamaCppArchitecture(name="qwen3moe"),
            LlamaCppArchitecture(
                name="granitemoe",
                families=("granite",),
                rope_is_interleaved=True,
                has_rope_factors=True,
                has_qkv_bias=True,
                has_o_bias=True,
                multipliers=_GRANITE_MULTIPLIERS,
            ),
            LlamaCppArchitecture(
                name="hunyuan-moe",
                families=("hunyuan_v1_dense",),
                has_rope_factors=True,
                needs_shared=True,
                has_qkv_bias=True,
            ),
            LlamaCppArchitecture(
                name="glm4moe",
                families=("glm", "seed_oss"),
                score_function="sigmoid",
                has_partial_rotary=True,
                needs_shared=True,
                has_qkv_bias=True,
                reads_gating=True,
                may_begin_dense=True,
                counts_shared=True,
                tensor_names=_POST_NORM,
            ),
            LlamaCppArchitecture(
                name="cohere2moe",
                families=("cohere2",),
                rope_is_interleaved=True,
                has_rope_factors=True,
                has_windows=True,
                averages_shared=True,
                has_layer_norm=True,
                unsupported_reasons=_cohere2moe_reasons,
                multipliers={"logit_scale": "logit_scale"},
                reads_gating=True,
                may_begin_dense=True,
            ),
            LlamaCppArchitecture(
                name="lfm2moe",
                families=("lfm2",),
                score_function="sigmoid",
                reads_gating=True,
                may_begin_dense=True,
                tensor_names={"norm.final": "token_embd_norm.weight"},
            ),
            LlamaCppArchitecture(
                name="deepseek2",
                families=("youtu",),
                score_function="sigmoid",
                rope_is_interleaved=True,
                scales_rope=False,
                needs_shared=True,
                unsupported_reasons=_deepseek2_reasons,
                reads_gating=True,
                may_begin_dense=True,
                counts_shared=True,
            ),
            LlamaCppArchitecture(
                name="granitehybrid",
                families=("granitemoehybrid",),
                attention_only="granitemoe",
                rope_is_interleaved=True,
                has_rope_factors=True,
                has_qkv_bias=True,
                has_o_bias=True,
                unsupported_reasons=_granitehybrid_reasons,
                multipliers=_GRANITE_MULTIPLIERS,
                state_sizes=(
                    *("mamba_d_conv", "mamba_n_heads*mamba_d_head", "mamba_d_state"),
                    *("mamba_n_heads", "mamba_n_groups"),
                ),
                switches_rope=True,
            ),
            LlamaCppArchitecture(
                name="granite_swa",
                families=("granite_swa",),
                rope_is_interleaved=True,
                has_rope_factors=True,
                has_windows=True,
                has_qkv_bias=True,
                has_o_bias=True,
                unsupported_reasons=_granite_swa_reasons,
                multipliers=_GRANITE_MULTIPLIERS,
                lists_rope_layers=True,
                fuses_shared=True,
            ),
            LlamaCppArchitecture(
                name="qwen35moe",
                families=("qwen3_5_text",),
                has_partial_rotary=True,
                needs_shared=True,
                unsupported_reasons=_qwen35moe_reasons,
                state_sizes=(
                    *("linear_conv_kernel_dim", "linear_num_value_heads*linear_value_head_dim", "linear_key_head_dim"),
                    *("linear_num_value_heads", "linear_num_key_heads"),
                ),
                lists_recurrent_layers=True,
                has_rope_sections=True,
                tensor_names=_POST_NORM,
            ),
            LlamaCppArchitecture(
                name="gemma4",
                families=("gemma4_text",),
                activation="gelu_pytorch_tanh",
                has_windows=True,
                unsupported_reasons=_gemma4_reasons,
                multipliers={"final_logit_softcapping": "final_logit_softcapping"},
                heads_per_kind=True,
                number_keys={
                    "embedding_length_per_layer_input": "hidden_size_per_layer_input",
                    "attention.shared_kv_layers": "num_kv_shared_layers",
                },
                copies={"norm.pre_ffn": ("pre_ffw_norm_2.weight", "ffn_gate_inp.scale")},
                constants=_gemma4_constants,
                tensor_names={
                    "norm.post": "post_attention_norm.weight",
                    "norm.pre_ffn": "ffn_norm.weight",
                    "norm.post_ffn": "post_ffw_norm.weight",
                    "norm.layer_scalar": "layer_output_scale.weight",
                    "embed_per_layer": "per_layer_token_embd.weight",
                    "inputs.projection": "per_layer_model_proj.weight",
                    "norm.projection": "per_layer_proj_norm.weight",
                    "inputs.gate": "inp_gate.weight",
                    "inputs.out": "proj.weight",
                    "norm.inputs": "post_norm.weight",
                },
            ),
            LlamaCppArchitecture(name="qwen2", dense=("qwen2",), has_head_dim=False, has_qkv_bias=True),
            LlamaCppArchitecture(name="qwen3", dense=("qwen3",)),
            LlamaCppArchitecture(
                name="granite",
                dense=("granite",),
                rope_is_interleaved=True,
                has_rope_factors=True,
                has_qkv_bias=True,
                has_o_bias=True,
                has_mlp_bias=True,
                multipliers=_GRANITE_MULTIPLIERS,
            ),
        )
    }
)

DENSE: Mapping[str, LlamaCppArchitecture] = MappingProxyType(
    {model_type: architecture for architecture in ARCHITECTURES.values() for model_type in architecture.dense}
)
"""Dense model types of transformers that are converted."""

BY_FAMILY: Mapping[str, LlamaCppArchitecture] = MappingProxyType(
    {family: architecture for architecture in ARCHITECTURES.values() for family in architecture.families}
)
"""Families that have one architecture for all their merges."""

MIXTURES = (
    "mixtral",
    "deepseek",
    "qwen2_moe",
    "qwen3_moe",
    "granitemoe",
    "granitemoeshared",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
    "glm4_moe",
    "cohere2_moe",
    "gemma4_text",
    "lfm2_moe",
    "deepseek_v3",
    "granitemoehybrid",
    "granitemoe_swa",
    "qwen3_5_moe_text",
)
"""Model types of mixtures that are converted."""

NOT_CONVERTED: Mapping[str, str] = MappingProxyType(
    {
        "flex_olmo": "for which llama.cpp has no architecture",
        "qwen3_vl_moe_text": "with transposed experts; the same merge with modality: text is converted",
    }
)
"""Model types of mixtures that raymoe writes, but not as GGUF, with the reason."""
