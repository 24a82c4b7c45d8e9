"""The metadata keys of a GGUF file, from which llama.cpp builds the model and the tokenizer.

Source of keys and meanings: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and what the architectures in
llama.cpp's src/models ask for (`load_arch_hparams`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raymoe.architectures import DenseSpec
from raymoe.architectures.rope import longrope_magnitude, original_length
from raymoe.architectures.tensor_tables import ATTENTION, CONV, LINEAR, SLIDING
from raymoe.checkpoints.weight_table import RoutingRule
from raymoe.export.gguf.choose_target import Target, rope_base, yarn_attention_factor
from raymoe.export.gguf.llama_cpp_archs import LlamaCppArchitecture
from raymoe.export.gguf.options import TensorType
from raymoe.export.gguf.tensor_layout import GgufTensor
from raymoe.export.gguf.vocabulary import Vocabulary
from raymoe.report.source_metadata import as_strings, is_model_of_hub, stated_license

_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION in ggml.h


def add_metadata(
    writer: Any,
    *,
    name: str,
    spec: DenseSpec,
    card: Mapping[str, Any],
    target: Target,
    tensors: Sequence[GgufTensor],
    vocabulary: Vocabulary,
    kind: TensorType,
) -> None:
    """Add every key to a GGUFWriter of the target's architecture; the tensors have been added before."""
    from gguf.utility import size_label

    writer.add_type("model")
    writer.add_name(name)
    _add_origin(writer, card)
    writer.add_size_label(size_label(*writer.get_total_parameter_count()))
    writer.add_file_type(kind.file_type)
    if kind.is_quantized:
        writer.add_quantization_version(_QUANTIZATION_VERSION)
    _add_sizes(writer, spec, target)
    if target.rule is None:
        writer.add_feed_forward_length(spec.intermediate)
    else:
        _add_experts(writer, target.rule, target, {tensor.name: tensor for tensor in tensors})
    if target.architecture.heads_per_kind:
        _add_ropes(writer, spec)
    else:
        _add_rope(writer, spec)
    for key, of_config in target.architecture.multipliers.items():
        # Without the key, llama.cpp takes a number of its own; 0 is that there is none.
        writer.add_float32(f"{target.architecture.name}.{key}", spec.extra[of_config] or 0.0)
    for key, of_config in target.architecture.number_keys.items():
        writer.add_uint32(f"{target.architecture.name}.{key}", spec.extra[of_config])
    _add_layer_keys(writer, spec, target.architecture)
    _add_vocabulary(writer, vocabulary)


def _add_origin(writer: Any, card: Mapping[str, Any]) -> None:
    """License, languages, tags and base models from the model card."""
    if license := stated_license(card):
        writer.add_license(license.name)
        if license.title:
            writer.add_license_name(license.title)
        if license.link:
            writer.add_license_link(license.link)
    if bases := [base for base in as_strings(card.get("base_model")) if is_model_of_hub(base)]:
        writer.add_base_model_count(len(bases))
        for number, base in enumerate(bases):
            organization, _, base_name = base.rpartition("/")
            writer.add_base_model_name(number, base_name)
            writer.add_base_model_organization(number, organization)
            writer.add_base_model_repo_url(number, f"https://huggingface.co/{base}")
    if tags := as_strings(card.get("tags")):
        writer.add_tags(list(tags))
    if languages := as_strings(card.get("language")):
        writer.add_languages(list(languages))


def _add_sizes(writer: Any, spec: DenseSpec, target: Target) -> None:
    architecture = target.architecture
    writer.add_block_count(spec.layers)
    writer.add_context_length(target.context)
    writer.add_embedding_length(spec.hidden)
    writer.add_head_count(spec.heads)
    writer.add_vocab_size(spec.vocab)
    if spec.family.has_latent_attention:
        _add_latent(writer, spec)
    else:
        _add_heads(writer, spec, architecture)
    if architecture.has_layer_norm:
        writer.add_layer_norm_eps(spec.rms_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    if CONV in spec.kinds:
        writer.add_shortconv_l_cache(spec.extra["conv_L_cache"])
    if architecture.has_windows:
        # llama.cpp requires a window on some layer. If no layer has one (Granite's), all get one as long as the
        # context.
        has_windows = any(spec.sliding_layers)
        writer.add_sliding_window(spec.sliding_window if has_windows else spec.max_positions)
        writer.add_sliding_window_pattern(spec.sliding_layers if has_windows else (True,) * spec.layers)


def _add_heads(writer: Any, spec: DenseSpec, architecture: LlamaCppArchitecture) -> None:
    """Heads of keys and values. A layer without them is one with a short convolution, or with Mamba."""
    head_dim, by_kind = spec.head_dim, {ATTENTION: spec.kv_heads, SLIDING: spec.kv_heads}
    if architecture.heads_per_kind:
        head_dim, by_kind[ATTENTION] = spec.extra["global_head_dim"], spec.extra["num_global_key_value_heads"]
        writer.add_key_length_swa(spec.head_dim)
        writer.add_value_length_swa(spec.head_dim)
    by_layer = [by_kind.get(kind, 0) for kind in spec.layer_types]
    is_listed = len(set(spec.layer_types)) > 1 and not architecture.lists_recurrent_layers
    writer.add_head_count_kv(by_layer if is_listed else spec.kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)


def _add_latent(writer: Any, spec: DenseSpec) -> None:
    """Keys of latent attention: all heads share the latent keys and values, so there is one head of each."""
    latent, rotary = spec.extra["kv_lora_rank"], spec.extra["qk_rope_head_dim"]
    writer.add_head_count_kv(1)
    writer.add_key_length(latent + rotary)
    writer.add_value_length(latent)
    writer.add_key_length_mla(spec.extra["qk_nope_head_dim"] + rotary)
    writer.add_value_length_mla(spec.extra["v_head_dim"])
    writer.add_kv_lora_rank(latent)
    writer.add_q_lora_rank(spec.extra["q_lora_rank"] or 0)


def _add_layer_keys(writer: Any, spec: DenseSpec, architecture: LlamaCppArchitecture) -> None:
    """Keys of layers that differ from each other."""
    if architecture.state_sizes:
        kernel, inner, state, heads, groups = map(spec.size_of, architecture.state_sizes)
        writer.add_ssm_conv_kernel(kernel)
        writer.add_ssm_inner_size(inner)
        writer.add_ssm_state_size(state)
        writer.add_ssm_time_step_rank(heads)
        writer.add_ssm_group_count(groups)
    if architecture.lists_rope_layers:
        ropes = [bool(theta) for theta in spec.extra["layer_rope_theta"]]
        writer.add_array(f"{architecture.name}.attention.rope_pattern", ropes)
    if architecture.switches_rope:
        writer.add_rope_scaling_finetuned(spec.extra["position_embedding_type"] == "rope")
    if architecture.lists_recurrent_layers:
        recurrent = [kind == LINEAR for kind in spec.kinds]
        writer.add_array(f"{architecture.name}.attention.recurrent_layers", recurrent)
        # Older versions only support attention on every n-th layer.
        if spec.attention_interval is not None:
            writer.add_full_attention_interval(spec.attention_interval)
    if architecture.has_rope_sections:
        # Which pairs of a head are rotated by the position in time, height and width. In text, all three are equal.
        pairs = spec.rotary_dim // 2
        writer.add_rope_dimension_sections([len(range(axis, pairs, 3)) for axis in range(3)] + [0])


def _add_experts(writer: Any, rule: RoutingRule, target: Target, tensors: Mapping[str, GgufTensor]) -> None:
    from gguf import ExpertGatingFuncType

    architecture = target.architecture
    first = rule.dense_layers[-1] + 1 if rule.dense_layers else 0
    width = tensors[f"blk.{first}.ffn_up_exps.weight"].shape[1]
    # If an architecture has both lengths, this one is for layers without experts, or for the dense FFN beside the
    # experts.
    dense = tensors.get("blk.0.ffn_up.weight")
    writer.add_feed_forward_length(width if dense is None else dense.shape[0])
    writer.add_expert_count(rule.experts)
    writer.add_expert_used_count(rule.per_token)
    if architecture.has_expert_width:
        writer.add_expert_feed_forward_length(width)
    if architecture.reads_gating:
        writer.add_leading_dense_block_count(first)
        writer.add_expert_gating_func(ExpertGatingFuncType[rule.score_function.upper()])
        writer.add_expert_weights_scale(1.0)
        writer.add_expert_weights_norm(rule.renormalizes or rule.per_token == rule.experts)
    if target.shared:
        shared = tensors[f"blk.{first}.ffn_down_shexp.weight"].shape[1]
        if architecture.counts_shared:
            writer.add_expert_shared_count(shared // width)
        else:
            writer.add_expert_shared_feed_forward_length(shared)


def _add_ropes(writer: Any, spec: DenseSpec) -> None:
    """RoPE of layers without a window, and of those with one. Which pairs the former rotates is in rope_freqs."""
    ropes = spec.extra["rope_parameters"]
    writer.add_rope_dimension_count(spec.extra["global_head_dim"])
    writer.add_rope_dimension_count_swa(spec.head_dim)
    writer.add_rope_freq_base(ropes[ATTENTION]["rope_theta"])
    writer.add_rope_freq_base_swa(ropes[SLIDING]["rope_theta"])


def _add_rope(writer: Any, spec: DenseSpec) -> None:
    from gguf import RopeScalingType

    writer.add_rope_dimension_count(spec.rotary_dim)
    scaling = spec.rope_scaling or {"rope_type": "default"}
    writer.add_rope_freq_base(rope_base(spec))
    # Factors of llama3 and longrope are tensors. Dynamic scaling begins only after the file's context length.
    if scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    elif scaling["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling.get("original_max_position_embeddings") or spec.max_positions)
        if (attention := yarn_attention_factor(scaling)) != 1.0:
            writer.add_rope_scaling_attn_factors(attention)
    elif scaling["rope_type"] == "longrope":
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(int(original_length(scaling, spec.max_positions)))
        writer.add_rope_scaling_attn_factors(longrope_magnitude(scaling, spec.max_positions))


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    vocabulary.special.add_to_gguf(writer, quiet=True)
