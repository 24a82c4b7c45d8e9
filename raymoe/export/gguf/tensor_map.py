"""Maps each tensor of the model to tensors of a GGUF file, and their form.

Most are copied under another name. The exceptions: q and k for an interleaved RoPE, DeepSeek's latent keys and values,
which llama.cpp has in two tensors, the states of Mamba and of Qwen3.5's linear attention, and Qwen3.5's norms.

Names: LLM_TENSOR_NAMES in llama.cpp's src/llama-arch.cpp; shapes: `load_arch_tensors` in its src/models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from raymoe.architectures import DenseSpec
from raymoe.architectures.dense_family import TensorRow
from raymoe.export.gguf.choose_target import Target
from raymoe.export.gguf.tensor_ops import IDENTITY, TensorOp, interleave_order, minus_exp, plus_one
from raymoe.sources.facts import TensorEntry, slice_rows


class TensorMapping(NamedTuple):
    """The tensor `name` is the concatenation of `sources`, each with `op`."""

    name: str
    sources: tuple[TensorEntry, ...]
    shape: tuple[int, ...]
    op: TensorOp = IDENTITY


# Roles of a dense model (architectures/tensor_tables.py), and their names in llama.cpp, in each layer or once. An
# architecture's other names are in its row (`LlamaCppArchitecture.tensor_names`).
_NAMES = {
    "embed": "token_embd.weight",
    "norm.final": "output_norm.weight",
    "lm_head": "output.weight",
    "norm.input": "attn_norm.weight",
    "norm.post": "ffn_norm.weight",
    **{f"attn.{p}": f"attn_{p}.weight" for p in "qkv"},
    **{f"attn.{p}.bias": f"attn_{p}.bias" for p in "qkv"},
    "attn.o": "attn_output.weight",
    "attn.o.bias": "attn_output.bias",
    "attn.q_norm": "attn_q_norm.weight",
    "attn.sinks": "attn_sinks.weight",
    "attn.k_norm": "attn_k_norm.weight",
    "conv.kernel": "shortconv.conv.weight",
    "conv.in": "shortconv.in_proj.weight",
    "conv.out": "shortconv.out_proj.weight",
    "mla.q": "attn_q.weight",
    "mla.q_a": "attn_q_a.weight",
    "mla.q_norm": "attn_q_a_norm.weight",
    "mla.q_b": "attn_q_b.weight",
    "mla.kv_a": "attn_kv_a_mqa.weight",
    "mla.kv_norm": "attn_kv_a_norm.weight",
    "mla.o": "attn_output.weight",
    "mamba.in_proj.weight": "ssm_in.weight",
    "mamba.conv1d.weight": "ssm_conv1d.weight",
    "mamba.conv1d.bias": "ssm_conv1d.bias",
    "mamba.dt_bias": "ssm_dt.bias",
    "mamba.A_log": "ssm_a",
    "mamba.D": "ssm_d",
    "mamba.norm.weight": "ssm_norm.weight",
    "mamba.out_proj.weight": "ssm_out.weight",
    "linear.in_proj_qkv.weight": "attn_qkv.weight",
    "linear.in_proj_z.weight": "attn_gate.weight",
    "linear.in_proj_a.weight": "ssm_alpha.weight",
    "linear.in_proj_b.weight": "ssm_beta.weight",
    "linear.conv1d.weight": "ssm_conv1d.weight",
    "linear.dt_bias": "ssm_dt.bias",
    "linear.A_log": "ssm_a",
    "linear.norm.weight": "ssm_norm.weight",
    "linear.out_proj.weight": "ssm_out.weight",
    **{f"ffn.{m}": f"ffn_{m}.weight" for m in ("gate", "up", "down")},
    **{f"ffn.{m}.bias": f"ffn_{m}.bias" for m in ("gate", "up", "down")},
}
_ROTATED = ("attn.q", "attn.q.bias", "attn.k", "attn.k.bias")
# Norms that multiply by 1 + weight, in families with `norms_add_one`. llama.cpp multiplies by the weight.
_PLUS_ONE = ("norm.input", "norm.post", "norm.final", "attn.q_norm", "attn.k_norm")


def map_tensor(
    spec: DenseSpec, target: Target, row: TensorRow, layer: int | None, source: TensorEntry
) -> Iterator[TensorMapping]:
    """The tensors of the file that come from one tensor of the model."""
    if row.role == "mla.kv_b":
        yield from _latent(spec, f"blk.{layer}.", source)
        return
    name = _name(target, row.role, layer)
    if row.role.startswith("linear."):
        yield _linear(spec, name, row.role, source)
    elif row.role.startswith("mamba."):
        yield _mamba(name, row.role, source)
    else:
        shape = (source.shape[0], source.shape[-1]) if row.role == "conv.kernel" else source.shape
        yield TensorMapping(name, (source,), shape, _tensor_op(spec, target, row.role))
        for copy in target.architecture.copies.get(row.role, ()):
            yield TensorMapping(f"blk.{layer}.{copy}", (source,), source.shape)


def _name(target: Target, role: str, layer: int | None) -> str:
    name = target.architecture.tensor_names.get(role) or _NAMES[role]
    return name if layer is None else f"blk.{layer}.{name}"


def _tensor_op(spec: DenseSpec, target: Target, role: str) -> TensorOp:
    if spec.family.norms_add_one and role in _PLUS_ONE:
        return TensorOp(function=plus_one)
    if not target.permutes_heads:
        return IDENTITY
    if role in _ROTATED:
        return TensorOp(unit=spec.head_dim, rows=interleave_order(spec.head_dim))
    if role in ("mla.q", "mla.q_b", "mla.kv_a"):
        rotary = spec.extra["qk_rope_head_dim"]
        before = spec.extra["kv_lora_rank" if role == "mla.kv_a" else "qk_nope_head_dim"]
        return TensorOp(unit=before + rotary, rows=interleave_order(rotary, before))
    return IDENTITY


def _latent(spec: DenseSpec, block: str, source: TensorEntry) -> Iterator[TensorMapping]:
    """The projection of latent numbers to keys and values, (heads * (keys + values), latent): keys transposed, values
    as rows."""
    keys, values, latent = (spec.extra[key] for key in ("qk_nope_head_dim", "v_head_dim", "kv_lora_rank"))
    unit = keys + values
    of_keys = TensorOp(unit=unit, rows=tuple(range(keys)), transposed=True)
    of_values = TensorOp(unit=unit, rows=tuple(range(keys, unit)))
    yield TensorMapping(f"{block}attn_k_b.weight", (source,), (spec.heads, latent, keys), of_keys)
    yield TensorMapping(f"{block}attn_v_b.weight", (source,), (spec.heads, values, latent), of_values)


def _mamba(name: str, role: str, source: TensorEntry) -> TensorMapping:
    shape = source.shape
    if role == "mamba.conv1d.weight":
        shape = (shape[0], shape[-1])
    elif role in ("mamba.A_log", "mamba.D"):
        shape = (shape[0], 1)
    elif role == "mamba.norm.weight":
        shape = (1, shape[0])  # one group
    return TensorMapping(name, (source,), shape, TensorOp(function=minus_exp) if role == "mamba.A_log" else IDENTITY)


def _linear(spec: DenseSpec, name: str, role: str, source: TensorEntry) -> TensorMapping:
    """A tensor of Qwen3.5's linear attention. Several value heads may belong to one key head.

    In the model they are adjacent; llama.cpp has the first value head of all key heads, then the second of all.
    """
    keys, values = spec.extra["linear_num_key_heads"], spec.extra["linear_num_value_heads"]
    width = spec.extra["linear_value_head_dim"]
    order = [key * (values // keys) + number for number in range(values // keys) for key in range(keys)]
    by_width = [head * width + i for head in order for i in range(width)]
    before = 2 * keys * spec.extra["linear_key_head_dim"]  # rows of queries and keys
    if role == "linear.in_proj_qkv.weight":
        heads = tuple(slice_rows(source, before + head * width, before + (head + 1) * width) for head in order)
        return TensorMapping(name, (slice_rows(source, 0, before), *heads), source.shape)
    if role == "linear.in_proj_z.weight":
        return TensorMapping(
            name, tuple(slice_rows(source, head * width, (head + 1) * width) for head in order), source.shape
        )
    if role == "linear.conv1d.weight":
        rows = (*range(before), *(before + i for i in by_width))
        return TensorMapping(name, (source,), (source.shape[0], source.shape[-1]), TensorOp(unit=len(rows), rows=rows))
    if role == "linear.out_proj.weight":
        return TensorMapping(name, (source,), source.shape, TensorOp(columns=tuple(by_width)))
    if role == "linear.norm.weight":
        return TensorMapping(name, (source,), source.shape)
    function = minus_exp if role == "linear.A_log" else None
    return TensorMapping(name, (source,), source.shape, TensorOp(unit=values, rows=tuple(order), function=function))
