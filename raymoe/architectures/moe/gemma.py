"""Gemma 4's MoE: the experts of each layer beside a dense FFN, and a norm after each of the two.

Of the dense layer and of the mixture, r being what attention and its norm add up to:

    dense      post_ffn(ffn(pre_ffn(r)))
    mixture    post_ffn(post_ffn_1(mlp(pre_ffn(r))) + post_ffn_2(experts(pre_ffn_2(r))))

The mixture's mlp is zeros and pre_ffn_2 is a copy of pre_ffn, so that with y for the experts' output the dense layer is
post_ffn(y), and the mixture post_ffn(post_ffn_2(y)). Two constants make the second norm have no effect: s, by which
`per_expert_scale` multiplies y, and c, the weight of post_ffn_2. With m for the mean of y squared,

    dense      y / sqrt(m + eps)
    mixture    y / sqrt(m + eps * m / c^2 + eps^2 / (s * c)^2),    which is y / sqrt(m * (1 + s^2) + eps) if s * c =
               sqrt(eps)

s is a power of two, so that multiplying by it is exact, and small enough for s^2 / 2 to be one rounding of float32. It
is no smaller, since float16 has few numbers near zero. c has the output's dtype: in bfloat16 it is 0.05 % off, which
changes eps by 0.1 %.

In E2B some FFNs are twice as wide (`use_double_wide_mlp`), and the mixture has one width for all experts: those of the
other layers end with zeros, which add nothing to any sum.

The router sees RMSNorm(r) * router.scale / sqrt(hidden). With pre_ffn's weight as the scale, and with rows that are
multiplied by sqrt(hidden), it sees what experts see, as the routers of all other architectures do.

Sources: transformers' `models/gemma4`, the dense layer and the mixture's in one class.
"""

from __future__ import annotations

import math
from typing import Any

from raymoe.architectures.dense_family import FFN_ROLES
from raymoe.architectures.dense_spec import DenseSpec
from raymoe.architectures.moe_architecture import (
    EMPTY_SHARED_WIDTH,
    PER_TOKEN_KEY,
    ConstantRow,
    MoeArchitecture,
    MoeShape,
    common_reasons,
    fused_experts,
    no_shared_reasons,
    zero_ffn,
)
from raymoe.architectures.tensor_tables import GEMMA4_ROWS
from raymoe.tensor_names import LAYER

EXPERT_SCALE = 2.0**-11
"""What experts' outputs are multiplied by."""

_MLP = {role: f"{LAYER}mlp.{role[4:]}_proj.weight" for role in FFN_ROLES}


def norm_after_experts(eps: float) -> float:
    """The weight with which the norm after the experts has no effect."""
    return math.sqrt(eps) / EXPERT_SCALE


def _config(spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    return {
        "head_dim": spec.head_dim,
        "attention_bias": spec.qkv_bias,
        "layer_types": spec.layer_types,
        "hidden_activation": spec.hidden_act,
        "enable_moe_block": True,
        "num_experts": moe.experts,
        "top_k_experts": moe.experts_per_token,
        "moe_intermediate_size": max(spec.ffn_widths) // moe.granularity,
        "use_double_wide_mlp": False,
        "intermediate_size": EMPTY_SHARED_WIDTH,
    }


def _unsupported(spec: DenseSpec, moe: MoeShape) -> list[str]:
    return common_reasons(spec, mixed_windows=True) + no_shared_reasons(moe)


def _constants(spec: DenseSpec, moe: MoeShape) -> tuple[ConstantRow, ...]:
    norm_1, norm_2 = (f"{LAYER}post_feedforward_layernorm_{number}.weight" for number in (1, 2))
    return (
        *zero_ffn(_MLP, EMPTY_SHARED_WIDTH),
        ConstantRow(name=norm_1, shape=("hidden",), value=1.0),
        ConstantRow(name=norm_2, shape=("hidden",), value=norm_after_experts(spec.rms_norm_eps)),
        ConstantRow(name=LAYER + "router.per_expert_scale", shape=(moe.experts,), value=EXPERT_SCALE),
    )


GEMMA_ARCHITECTURES = (
    MoeArchitecture(
        name="gemma4_moe",
        title="Gemma 4 MoE",
        model_type="gemma4_text",
        class_name="Gemma4ForCausalLM",
        accepts=("gemma4_text",),
        backbone={row.role: row.name for row in GEMMA4_ROWS if not row.is_ffn},
        expert=fused_experts(""),
        copies={"norm.pre_ffn": (LAYER + "pre_feedforward_layernorm_2.weight", LAYER + "router.scale")},
        router=LAYER + "router.proj.weight",
        router_factor=math.sqrt,
        constants=_constants,
        config=_config,
        unsupported_reasons=_unsupported,
        dense_family="gemma4_text",
        dense_keys={"enable_moe_block": False},
        aliases={PER_TOKEN_KEY: "top_k_experts"},
        min_transformers="5.23",
        note="the dense FFN beside the experts is zeros, and constants cancel the norm after the experts",
    ),
)
