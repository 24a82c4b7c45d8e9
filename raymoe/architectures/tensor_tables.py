"""Tables of tensors: the rows of each dense family, in the order in which transformers writes them.

A copy in this order reads its sources sequentially.
"""

from __future__ import annotations

from dataclasses import replace

from raymoe.architectures.dense_family import TensorRow
from raymoe.tensor_names import EMBEDDING, HEAD, LAYER, LAYER_EMBEDDINGS, LAYER_PROJECTION, LAYER_PROJECTION_NORM

_PROJECTIONS = {
    "q": ("q_out", "hidden", "qkv_bias"),
    "k": ("kv_out", "hidden", "qkv_bias"),
    "v": ("kv_out", "hidden", "qkv_bias"),
    "o": ("hidden", "q_out", "o_bias"),
}


def _attention(proj: str, name: str = "", kind: str = "") -> tuple[TensorRow, ...]:
    out, inner, bias = _PROJECTIONS[proj]
    prefix = f"{LAYER}self_attn.{name or proj + '_proj'}."
    return (
        TensorRow(role=f"attn.{proj}", name=prefix + "weight", shape=(out, inner), kind=kind),
        TensorRow(role=f"attn.{proj}.bias", name=prefix + "bias", shape=(out,), when=bias, kind=kind),
    )


def _ffn(proj: str, out: str, inner: str) -> tuple[TensorRow, ...]:
    prefix = f"{LAYER}mlp.{proj}_proj."
    return (
        TensorRow(role=f"ffn.{proj}", name=prefix + "weight", shape=(out, inner)),
        TensorRow(role=f"ffn.{proj}.bias", name=prefix + "bias", shape=(out,), when="mlp_bias"),
    )


def _norm(role: str, name: str, size: str = "hidden", kind: str = "") -> TensorRow:
    return TensorRow(role=f"norm.{role}", name=f"{LAYER}{name}.weight", shape=(size,), kind=kind)


def _head_norm(proj: str, name: str, size: str, when: str = "", kind: str = "") -> TensorRow:
    weight = f"{LAYER}self_attn.{name}.weight"
    return TensorRow(role=f"attn.{proj}_norm", name=weight, shape=(size,), when=when, kind=kind)


_EMBED = TensorRow(role="embed", name=EMBEDDING, shape=("vocab", "hidden"))
_HEAD = TensorRow(role="lm_head", name=HEAD, shape=("vocab", "hidden"), when="untied")
_FINAL_NORM = TensorRow(role="norm.final", name="model.norm.weight", shape=("hidden",))
_FFN = (
    *_ffn("down", "hidden", "intermediate"),
    *_ffn("gate", "intermediate", "hidden"),
    *_ffn("up", "intermediate", "hidden"),
)

LLAMA_ROWS = (
    _EMBED,
    _norm("input", "input_layernorm"),
    *_FFN,
    _norm("post", "post_attention_layernorm"),
    _head_norm("k", "k_norm", "head_dim", "qk_norm"),
    *_attention("k"),
    *_attention("o"),
    _head_norm("q", "q_norm", "head_dim", "qk_norm"),
    *_attention("q"),
    *_attention("v"),
    _FINAL_NORM,
    _HEAD,
)
# Norms after attention and FFN, none before. Norms of q and k cover all heads at once.
OLMO2_ROWS = (
    _EMBED,
    *_FFN,
    _norm("post", "post_attention_layernorm"),
    _norm("post_ffn", "post_feedforward_layernorm"),
    _head_norm("k", "k_norm", "kv_out"),
    *_attention("k"),
    *_attention("o"),
    _head_norm("q", "q_norm", "q_out"),
    *_attention("q"),
    *_attention("v"),
    _FINAL_NORM,
    _HEAD,
)
_SINKS = TensorRow(role="attn.sinks", name=f"{LAYER}self_attn.sinks", shape=("heads",))
GRANITE_SWA_ROWS = tuple(
    row for llama in LLAMA_ROWS for row in ((_SINKS, llama) if llama.role == "attn.v" else (llama,))
)
HUNYUAN_ROWS = (
    _EMBED,
    _norm("input", "input_layernorm"),
    *_FFN,
    _norm("post", "post_attention_layernorm"),
    *_attention("k"),
    _head_norm("k", "key_layernorm", "head_dim"),
    *_attention("o"),
    *_attention("q"),
    _head_norm("q", "query_layernorm", "head_dim"),
    *_attention("v"),
    _FINAL_NORM,
    _HEAD,
)
# Attention and FFN in parallel, after one norm.
COHERE2_ROWS = tuple(row for row in LLAMA_ROWS if row.role not in ("norm.post", "attn.q_norm", "attn.k_norm"))
_FUSED_FFN = (
    TensorRow(role="ffn.down", name=f"{LAYER}mlp.down_proj.weight", shape=("hidden", "intermediate")),
    TensorRow(
        role="ffn.gate_up",
        name=f"{LAYER}mlp.gate_up_proj.weight",
        shape=("2*intermediate", "hidden"),
        fused=(("ffn.gate", "intermediate"), ("ffn.up", "intermediate")),
    ),
)
GLM_ROWS = (
    _EMBED,
    _norm("input", "input_layernorm"),
    *_FUSED_FFN,
    _norm("post", "post_attention_layernorm"),
    *_attention("k"),
    *_attention("o"),
    *_attention("q"),
    *_attention("v"),
    _FINAL_NORM,
    _HEAD,
)
PHI3_ROWS = (
    _EMBED,
    _norm("input", "input_layernorm"),
    *_FUSED_FFN,
    _norm("post", "post_attention_layernorm"),
    *_attention("o")[:1],
    TensorRow(
        role="attn.qkv",
        name=f"{LAYER}self_attn.qkv_proj.weight",
        shape=("q_out+2*kv_out", "hidden"),
        fused=(("attn.q", "q_out"), ("attn.k", "kv_out"), ("attn.v", "kv_out")),
    ),
    _FINAL_NORM,
    _HEAD,
)
CONV, ATTENTION, LINEAR = "conv", "full_attention", "linear_attention"
SLIDING = "sliding_attention"
SHARED = "shared_"
"""Before a kind: the layer has no keys and values, but those of the last layer of this kind that has some."""


def _granite4_rows() -> tuple[TensorRow, ...]:
    """Layers with attention and with a state space (Mamba 2). The FFN has the name of a mixture's shared expert."""
    heads, inner = "mamba_n_heads", "mamba_n_heads*mamba_d_head"
    convolved = f"{inner}+2*mamba_n_groups*mamba_d_state"
    shapes = {
        "A_log": (heads,),
        "D": (heads,),
        "conv1d.bias": (convolved,),
        "conv1d.weight": (convolved, "1", "mamba_d_conv"),
        "dt_bias": (heads,),
        "in_proj.bias": (f"{inner}+{convolved}+{heads}",),
        "in_proj.weight": (f"{inner}+{convolved}+{heads}", "hidden"),
        "norm.weight": (inner,),
        "out_proj.bias": ("hidden",),
        "out_proj.weight": ("hidden", inner),
    }
    when = {"conv1d.bias": "mamba_conv_bias", "in_proj.bias": "mamba_proj_bias", "out_proj.bias": "mamba_proj_bias"}
    return (
        _EMBED,
        _norm("input", "input_layernorm"),
        *(
            TensorRow(role=f"mamba.{n}", name=f"{LAYER}mamba.{n}", shape=s, when=when.get(n, ""), kind=LINEAR)
            for n, s in shapes.items()
        ),
        _norm("post", "post_attention_layernorm"),
        *_attention("k", kind=ATTENTION),
        *_attention("o", kind=ATTENTION),
        *_attention("q", kind=ATTENTION),
        *_attention("v", kind=ATTENTION),
        TensorRow(
            role="ffn.gate_up",
            name=f"{LAYER}shared_mlp.input_linear.weight",
            shape=("2*intermediate", "hidden"),
            fused=(("ffn.gate", "intermediate"), ("ffn.up", "intermediate")),
        ),
        TensorRow(role="ffn.down", name=f"{LAYER}shared_mlp.output_linear.weight", shape=("hidden", "intermediate")),
        _FINAL_NORM,
        _HEAD,
    )


def _lfm2_rows() -> tuple[TensorRow, ...]:
    conv, ffn = f"{LAYER}conv.", f"{LAYER}feed_forward."

    def convolution(role: str, name: str, shape: tuple[str, ...]) -> tuple[TensorRow, ...]:
        weight = TensorRow(role=f"conv.{role}", name=f"{conv}{name}.weight", shape=shape, kind=CONV)
        bias = TensorRow(
            role=f"conv.{role}.bias", name=f"{conv}{name}.bias", shape=shape[:1], when="conv_bias", kind=CONV
        )
        return weight, bias

    return (
        _EMBED,
        *convolution("kernel", "conv", ("hidden", "1", "conv_L_cache")),
        *convolution("in", "in_proj", ("3*hidden", "hidden")),
        *convolution("out", "out_proj", ("hidden", "hidden")),
        TensorRow(role="ffn.gate", name=ffn + "w1.weight", shape=("intermediate", "hidden")),
        TensorRow(role="ffn.down", name=ffn + "w2.weight", shape=("hidden", "intermediate")),
        TensorRow(role="ffn.up", name=ffn + "w3.weight", shape=("intermediate", "hidden")),
        _norm("post", "ffn_norm"),
        _norm("input", "operator_norm"),
        _head_norm("k", "k_layernorm", "head_dim", kind=ATTENTION),
        *_attention("k", kind=ATTENTION),
        *_attention("o", "out_proj", kind=ATTENTION),
        _head_norm("q", "q_layernorm", "head_dim", kind=ATTENTION),
        *_attention("q", kind=ATTENTION),
        *_attention("v", kind=ATTENTION),
        TensorRow(role="norm.final", name="model.embedding_norm.weight", shape=("hidden",)),
        _HEAD,
    )


def _mla_rows() -> tuple[TensorRow, ...]:
    """Multi-head latent attention (DeepSeek's): q, k and v are computed from a few latent numbers."""
    attention = f"{LAYER}self_attn."

    def projection(role: str, name: str, shape: tuple[str, str], when: str = "", bias: str = "") -> list[TensorRow]:
        rows = [TensorRow(role=f"mla.{role}", name=f"{attention}{name}.weight", shape=shape, when=when)]
        if bias:
            rows.append(TensorRow(role=f"mla.{role}.bias", name=f"{attention}{name}.bias", shape=shape[:1], when=bias))
        return rows

    q_out, latent = "heads*qk_nope_head_dim+heads*qk_rope_head_dim", "q_lora_rank"
    return (
        _EMBED,
        _norm("input", "input_layernorm"),
        *_FFN,
        _norm("post", "post_attention_layernorm"),
        TensorRow(role="mla.kv_norm", name=f"{attention}kv_a_layernorm.weight", shape=("kv_lora_rank",)),
        *projection("kv_a", "kv_a_proj_with_mqa", ("kv_lora_rank+qk_rope_head_dim", "hidden"), bias="qkv_bias"),
        *projection("kv_b", "kv_b_proj", ("heads*qk_nope_head_dim+heads*v_head_dim", "kv_lora_rank")),
        *projection("o", "o_proj", ("hidden", "heads*v_head_dim"), bias="o_bias"),
        TensorRow(role="mla.q_norm", name=f"{attention}q_a_layernorm.weight", shape=(latent,), when=latent),
        *projection("q_a", "q_a_proj", (latent, "hidden"), latent, bias="latent_q_bias"),
        *projection("q_b", "q_b_proj", (q_out, latent), latent),
        *projection("q", "q_proj", (q_out, "hidden"), f"!{latent}"),
        _FINAL_NORM,
        _HEAD,
    )


def _qwen3_5_rows() -> tuple[TensorRow, ...]:
    linear = f"{LAYER}linear_attn."
    keys, values = "linear_num_key_heads*linear_key_head_dim", "linear_num_value_heads*linear_value_head_dim"
    shapes = {
        "A_log": ("linear_num_value_heads",),
        "conv1d.weight": (f"2*{keys}+{values}", "1", "linear_conv_kernel_dim"),
        "dt_bias": ("linear_num_value_heads",),
        "in_proj_a.weight": ("linear_num_value_heads", "hidden"),
        "in_proj_b.weight": ("linear_num_value_heads", "hidden"),
        "in_proj_qkv.weight": (f"2*{keys}+{values}", "hidden"),
        "in_proj_z.weight": (values, "hidden"),
        "norm.weight": ("linear_value_head_dim",),
        "out_proj.weight": ("hidden", values),
    }
    (_, q_bias) = _attention("q", kind=ATTENTION)
    return (
        _EMBED,
        _norm("input", "input_layernorm"),
        *(TensorRow(role=f"linear.{n}", name=linear + n, shape=s, kind=LINEAR) for n, s in shapes.items()),
        *_FFN,
        _norm("post", "post_attention_layernorm"),
        _head_norm("k", "k_norm", "head_dim", kind=ATTENTION),
        *_attention("k", kind=ATTENTION),
        *_attention("o", kind=ATTENTION),
        _head_norm("q", "q_norm", "head_dim", kind=ATTENTION),
        # Queries, and as many values that gate attention's output.
        TensorRow(role="attn.q", name=f"{LAYER}self_attn.q_proj.weight", shape=("2*q_out", "hidden"), kind=ATTENTION),
        replace(q_bias, shape=("2*q_out",)),
        *_attention("v", kind=ATTENTION),
        _FINAL_NORM,
        _HEAD,
    )


def _gemma4_rows() -> tuple[TensorRow, ...]:
    """Four norms of the residual stream. Layers without a window have heads of their own, and with `attention_k_eq_v`
    their values are their keys. E2B and E4B have inputs per layer, and layers with the keys and values of earlier ones,
    whose FFN may be twice as wide."""
    sizes = {
        "q_out": "heads*global_head_dim",
        "kv_out": "num_global_key_value_heads*global_head_dim",
        "head_dim": "global_head_dim",
    }

    def attention(kind: str) -> tuple[TensorRow, ...]:
        return (
            *_attention("q", kind=kind),
            _head_norm("q", "q_norm", "head_dim", kind=kind),
            _head_norm("k", "k_norm", "head_dim", kind=kind),
            *_attention("k", kind=kind),
            *_attention("v", kind=kind),
            *_attention("o", kind=kind),
        )

    def without_window(row: TensorRow) -> TensorRow:
        when = {"attn.v": "!attention_k_eq_v", "attn.v.bias": "windowless_v_bias"}.get(row.role, row.when)
        return replace(row, when=when, shape=tuple(sizes.get(size, size) for size in row.shape))

    def shared(rows: tuple[TensorRow, ...], kind: str) -> tuple[TensorRow, ...]:
        kept = (row for row in rows if row.role.startswith(("attn.q", "attn.o")))
        return tuple(replace(row, kind=SHARED + kind) for row in kept)

    def ffn(kind: str) -> tuple[TensorRow, ...]:
        sizes = {"intermediate": f"intermediate+{wide}*intermediate"} if kind.startswith(SHARED) else {}
        return tuple(replace(row, kind=kind, shape=tuple(sizes.get(s, s) for s in row.shape)) for row in _FFN)

    inputs, wide = "hidden_size_per_layer_input", "use_double_wide_mlp"
    with_window = attention(SLIDING)
    without = tuple(without_window(row) for row in attention(ATTENTION))
    packed = f"layers*{inputs}"
    return (
        _EMBED,
        TensorRow(role="norm.layer_scalar", name=f"{LAYER}layer_scalar", shape=("1",)),
        *with_window,
        *without,
        *shared(with_window, SLIDING),
        *shared(without, ATTENTION),
        *(row for kind in (SLIDING, ATTENTION, SHARED + SLIDING, SHARED + ATTENTION) for row in ffn(kind)),
        _norm("input", "input_layernorm"),
        _norm("post", "post_attention_layernorm"),
        _norm("pre_ffn", "pre_feedforward_layernorm"),
        _norm("post_ffn", "post_feedforward_layernorm"),
        TensorRow(
            role="inputs.gate", name=f"{LAYER}per_layer_input_gate.weight", shape=(inputs, "hidden"), when=inputs
        ),
        TensorRow(role="inputs.out", name=f"{LAYER}per_layer_projection.weight", shape=("hidden", inputs), when=inputs),
        replace(_norm("inputs", "post_per_layer_input_norm"), when=inputs),
        _FINAL_NORM,
        TensorRow(
            role="embed_per_layer", name=LAYER_EMBEDDINGS, shape=("vocab_size_per_layer_input", packed), when=inputs
        ),
        TensorRow(role="inputs.projection", name=LAYER_PROJECTION, shape=(packed, "hidden"), when=inputs),
        TensorRow(role="norm.projection", name=LAYER_PROJECTION_NORM, shape=(inputs,), when=inputs),
        _HEAD,
    )


GEMMA4_ROWS = _gemma4_rows()
GRANITE4_ROWS = _granite4_rows()
LFM2_ROWS = _lfm2_rows()
MLA_ROWS = _mla_rows()
QWEN3_5_ROWS = _qwen3_5_rows()
