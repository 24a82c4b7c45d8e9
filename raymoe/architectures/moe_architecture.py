"""What a MoE architecture is: names of output tensors, the output's config.json, its routing rule, and its limits.

A MoE architecture represents a dense model exactly if, with the dense model's FFN as every expert, it computes what the
dense model computes. Features that it can't express (a bias that its attention lacks, a window on some layers only) are
refused by name: a checkpoint that loads but computes something else is worse than none. The architectures are in
moe/. How names and shapes are written:

    backbone, router      `{layer}` stands for the number of the layer
    expert                `{layer}`, and `{expert}` for the number of the expert. A name without `{expert}` is a tensor
                          with all experts of the layer, (experts, rows, columns). Roles with the same name lie one
                          after the other in it, in the order of the mapping. If `transposes_experts`, it is
                          (experts, columns, rows)
    ConstantRow.shape     numbers, and symbols of `DenseSpec.size_of` (dense_family.py)
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raymoe.architectures.dense_family import FFN_ROLES
from raymoe.architectures.dense_spec import DenseSpec
from raymoe.architectures.families import FAMILIES
from raymoe.architectures.moe_layers import LayerRule
from raymoe.tensor_names import EMBEDDING, HEAD, LAYER

PER_TOKEN_KEY = "num_experts_per_tok"
"""How many experts run for a token, in a config.json that raymoe writes."""

MIXTURE_KEYS = frozenset(
    {
        # How many experts, under all names that a configuration class of transformers reads.
        *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        *("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
        # How many run for a token, and with which weights.
        *(PER_TOKEN_KEY, "moe_k", "moe_topk", "top_k_experts"),
        *("norm_topk_prob", "moe_norm_min", "routed_scaling_factor"),
        *("scoring_func", "topk_method", "n_group", "topk_group", "expert_selection_fn", "use_expert_bias"),
        # How wide they are.
        *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
        *("prefix_dense_intermediate_size", "shared_expert_combination_strategy", "use_mixed_mlp_moe"),
        # Which layers have them.
        *("enable_moe_block", "decoder_sparse_step", "mlp_only_layers", "mlp_layer_types"),
        *("first_k_dense_replace", "moe_layer_freq"),
        *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "num_dense_layers"),
        *("prefix_dense_sliding_window_pattern", "num_nextn_predict_layers", "num_mtp_layers"),
        # Training.
        *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "aux_loss_alpha", "seq_aux"),
    }
)
"""Keys that only a mixture's config.json has. In that of a dense model they are leftovers, and would change the merge,
since MoE architectures read several of them. Some are other names of keys that raymoe writes (the `attribute_map` of
transformers)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeShape:
    """How many experts a merge has, and how it makes routers.

    Attributes:
        experts: How many experts there are.
        experts_per_token: How many of them run for a token.
        shared: How many experts run for every token, beyond these.
        shared_has_prompts: The shared experts have prompts.
        needs_prompts: The gate mode computes routers from prompts.
        granularity: In how many experts each FFN is cut. `experts` and `experts_per_token` count these.
        dense_layers: The layers without experts, in ascending order.
    """

    experts: int
    experts_per_token: int
    shared: int = 0
    shared_has_prompts: bool = False
    needs_prompts: bool = False
    granularity: int = 1
    dense_layers: tuple[int, ...] = ()

    def width(self, spec: DenseSpec) -> int:
        """The width of an expert that is made of a FFN of this model."""
        return spec.intermediate // self.granularity

    @property
    def shared_widths(self) -> int:
        """How many experts wide the shared experts are together."""
        return self.shared * self.granularity

    def layers(self, spec: DenseSpec) -> list[int]:
        """The layers with experts."""
        return [layer for layer in range(spec.layers) if layer not in self.dense_layers]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantRow:
    """A tensor that the MoE architecture needs and the dense model lacks.

    Attributes:
        name: Its name, with `{layer}`.
        shape: Its shape: numbers, and symbols of `DenseSpec.size_of`.
        value: The value that fills it, chosen so that it has no effect.
        is_of_attention: It belongs to attention, so that layers without experts have it too.
    """

    name: str
    shape: tuple[str | int, ...]
    value: float = 0.0
    is_of_attention: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeArchitecture:
    """One MoE architecture. The head of this module says how names are written.

    Attributes:
        name: Its name in raymoe: the config key `architecture`, `raymoe archs`.
        title: Its name in messages and docs.
        model_type: Its `model_type` in config.json.
        class_name: Its class in transformers, the entry of `architectures` in config.json.
        accepts: The dense families that it takes.
        backbone: Role to tensor name, of all but experts and routers. A model with another role does not fit.
        expert: Role to tensor name, of the FFN of an expert.
        expert_also_read: Other names of these, which checkpoints may have that older versions of raymoe wrote or that
            transformers has saved again. Empty: there are none.
        wrapper: The wrapper (a key of `MIXTURE_WRAPPERS`) as which a mixture is written also if it reads text only: its
            own keys are under `text_config` then. Empty: config.json is that of a text model.
        copies: Role to further names of the same tensor, for what the MoE architecture has several times over.
        transposes_experts: Its tensors with all experts of a layer hold their matrices transposed.
        tied_head_for: Engines, with their versions, whose class never ties the head to the embedding. If the model is
            tied, its head is stored for them, as a copy of the embedding. transformers ties it as before. Empty: the
            head of a tied model is not stored.
        written_for: What else is written though transformers does without it, and the engines, with their versions,
            that need it.
        router: The tensor name of a layer's router.
        router_factor: From the width of hidden states to the number that rows of the router are multiplied by in the
            file, since the architecture divides by it.
        config: Keys that it adds to the config.json that `moe_config` makes.
        unsupported_reasons: Features of a dense model, or numbers of experts, that it can't represent: one text per
            reason, with the config key.
        layer_rule: How its config.json says which layers have experts. None: all have them.
        dense_family: The family whose attention and norms it has. `raymoe eval` and `raymoe gguf` read a merge as one
            of this family.
        second_choice_for: Features of a model, as booleans of `DenseSpec`, that engines compute otherwise in it without
            a word. A config that names no architecture gets another one that holds the model too, if there is one.
        windowed_family: The family to use instead if config.json has a `sliding_window`, which `dense_family` has not.
        qk_norm_family: The family to use instead if config.json has norms on q and k (`use_qk_norm`).
        partial_rotary_family: The family to use instead if RoPE rotates a part of each head, which it does not in
            `dense_family`.
        shared: Role to tensor name, of the FFN of the shared expert. Empty: it has none.
        shared_router: The tensor name of the shared expert's gate. Empty: it has none.
        constants: Tensors that it needs and the dense model lacks.
        experts_key: The config key with the number of experts.
        shared_key: The config key with the number, or the width, of shared experts. Empty: it always has one.
        renormalize_key: The config key that makes the weights of the chosen experts sum to one. Empty: they always do.
        renormalizes_one: Its code applies `renormalize_key` also if one expert runs for a token.
        aliases: Other names of `experts_key` and `PER_TOKEN_KEY` that transformers reads (the `attribute_map` of its
            configuration). When it saves a merge again, it writes only one of them.
        score_function: The function of router scores before it chooses the highest: softmax or sigmoid.
        dense_keys: Keys to add to the dense config.json as which a merge is read.
        min_transformers: The oldest transformers that merges were loaded with (scripts/check_loading.py). Empty: its
            code is not in transformers.
        code_repository: The repository on the Hub with its code.
        min_transformers_mixed_windows: The oldest transformers that computes it with a window on some layers only.
        reads_tokenizer_as_is: As in `DenseFamily`.
        runs_in_llama_cpp: Whether `raymoe gguf` writes a merge with these numbers of experts. The command checks
            everything else.
        note: A further note for docs and `raymoe archs`.
    """

    name: str
    title: str
    model_type: str
    class_name: str
    accepts: tuple[str, ...]
    backbone: Mapping[str, str]
    expert: Mapping[str, str]
    router: str
    config: Callable[[DenseSpec, MoeShape], dict[str, Any]]
    unsupported_reasons: Callable[[DenseSpec, MoeShape], list[str]]
    dense_family: str
    layer_rule: LayerRule | None = None
    expert_also_read: Mapping[str, str] = field(default_factory=dict)
    wrapper: str = ""
    copies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transposes_experts: bool = False
    router_factor: Callable[[int], float] = lambda hidden: 1.0
    tied_head_for: str = ""
    written_for: Mapping[str, str] = field(default_factory=dict)
    second_choice_for: tuple[str, ...] = ()
    windowed_family: str = ""
    qk_norm_family: str = ""
    partial_rotary_family: str = ""
    shared: Mapping[str, str] = field(default_factory=dict)
    shared_router: str = ""
    constants: Callable[[DenseSpec, MoeShape], tuple[ConstantRow, ...]] = lambda spec, moe: ()
    experts_key: str = "num_experts"
    shared_key: str = ""
    renormalize_key: str = ""
    renormalizes_one: bool = True
    aliases: Mapping[str, str] = field(default_factory=dict)
    score_function: str = "softmax"
    dense_keys: Mapping[str, Any] = field(default_factory=dict)
    min_transformers: str = ""
    code_repository: str = ""
    min_transformers_mixed_windows: str = ""
    reads_tokenizer_as_is: bool = False
    runs_in_llama_cpp: Callable[[MoeShape], bool] = lambda moe: True
    note: str = ""

    @property
    def rope_is_interleaved(self) -> bool:
        """As in `DenseFamily`."""
        return FAMILIES[self.dense_family].rope_is_interleaved

    @property
    def dense_lacks_partial_rotary(self) -> bool:
        """Whether the RoPE of `dense_family` rotates whole heads only, while that of the MoE architecture may rotate a
        part."""
        return (
            any(FAMILIES[name].has_partial_rotary for name in self.accepts)
            and not FAMILIES[self.dense_family].has_partial_rotary
        )

    def is_second_choice(self, spec: DenseSpec) -> bool:
        """Whether the model has a feature of `second_choice_for`."""
        return any(getattr(spec, feature) for feature in self.second_choice_for)

    def stores_tied_head(self, spec: DenseSpec) -> bool:
        """Whether the output of a tied model holds its head too, as a copy of the embedding."""
        return spec.tied and bool(self.tied_head_for)

    def backbone_names(self, role: str, spec: DenseSpec) -> tuple[str, ...]:
        """The tensors, with `{layer}`, that hold what the model has in a role of its backbone: mostly one."""
        head = (self.backbone["lm_head"],) if role == "embed" and self.stores_tied_head(spec) else ()
        return (self.backbone[role], *self.copies.get(role, ()), *head)

    def min_transformers_for(self, layer_types: Sequence[object] | None) -> str:
        """The oldest transformers that computes a merge whose config.json has these `layer_types`; empty: its code is
        not in transformers.
        """
        return (
            self.min_transformers_mixed_windows
            if self.min_transformers_mixed_windows and len(set(layer_types or ())) > 1
            else self.min_transformers
        )

    def entry(self, config: Mapping[str, Any], key: str) -> tuple[str, Any]:
        """The first name of a key that a merge's config has, with its value; (key, None) if it has none."""
        names = (key, self.aliases.get(key, key))
        return next(((name, config[name]) for name in names if config.get(name) is not None), (key, None))

    @property
    def is_fused(self) -> bool:
        """Whether all experts of a layer are in the same tensors."""
        return any("{expert}" not in name for name in self.expert.values())

    def moe_layers(self, config: Mapping[str, Any]) -> list[int]:
        """The layers with experts of a mixture with this config.json, in ascending order. The others have a plain FFN,
        whose tensors `layer_rule.ffn` names.

        Example:
            >>> keys = {"num_hidden_layers": 4, "mlp_only_layers": [0, 2]}
            >>> MOE_ARCHITECTURES["qwen3_moe"].moe_layers(keys)
            [1, 3]
        """
        layers = config["num_hidden_layers"]
        return list(range(layers)) if self.layer_rule is None else self.layer_rule.read(config, layers)

    def reasons_against(self, spec: DenseSpec, moe: MoeShape) -> list[str]:
        """Why it can't represent a model with these experts: one text per reason, with the config key."""
        return [*self.unsupported_reasons(spec, moe), *self._layer_reasons(spec, moe)]

    def _layer_reasons(self, spec: DenseSpec, moe: MoeShape) -> list[str]:
        if not moe.dense_layers:
            return []
        if self.layer_rule is None:
            return ["moe_layers: it has experts in all layers"]
        if self.layer_rule.write(spec, moe.layers(spec)) is None:
            return [f"moe_layers: its experts may be in {self.layer_rule.text}"]
        return []

    def as_stored(self, names: Container[str]) -> MoeArchitecture:
        """The architecture with the tensor names of experts that a checkpoint has; `names` are all its tensors."""
        other = (name.format(layer=0, expert=0) for name in self.expert_also_read.values())
        return replace(self, expert=self.expert_also_read) if any(name in names for name in other) else self


BACKBONE = {
    "embed": EMBEDDING,
    "norm.input": LAYER + "input_layernorm.weight",
    "norm.post": LAYER + "post_attention_layernorm.weight",
    "norm.final": "model.norm.weight",
    "lm_head": HEAD,
    **{f"attn.{p}": f"{LAYER}self_attn.{p}_proj.weight" for p in "qkvo"},
}
QKV_BIAS = {f"attn.{p}.bias": f"{LAYER}self_attn.{p}_proj.bias" for p in "qkv"}
O_BIAS = {"attn.o.bias": f"{LAYER}self_attn.o_proj.bias"}
QK_NORM = {f"attn.{p}_norm": f"{LAYER}self_attn.{p}_norm.weight" for p in "qk"}
EXPERTS = {role: f"{LAYER}mlp.experts.{{expert}}.{role[4:]}_proj.weight" for role in FFN_ROLES}


def fused_experts(module: str) -> dict[str, str]:
    """Names of a layer's experts in two tensors of a module, as transformers 5 has them in memory: gate above up,
    (experts, 2 * intermediate, hidden), and down, (experts, hidden, intermediate)."""
    gate_up = f"{LAYER}{module}experts.gate_up_proj"
    return {"ffn.gate": gate_up, "ffn.up": gate_up, "ffn.down": f"{LAYER}{module}experts.down_proj"}


# The width of a shared expert of zeros, which a merge without shared experts gets if its architecture has one in every
# layer. 256 is a multiple of every block size that quantized formats use. llama.cpp does not read a width of 0.
EMPTY_SHARED_WIDTH = 256


def moe_config(architecture: MoeArchitecture, spec: DenseSpec, moe: MoeShape) -> dict[str, Any]:
    """Keys of the output's config.json that follow from the dense model and the MoE architecture.

    Written out in full, since the defaults of dense and MoE configurations differ (RMSNorm's epsilon does, for one).
    RoPE is written in the older form, `rope_theta` and `rope_scaling`, which every program reads. An architecture that
    transformers 4 lacks may name `rope_parameters`, which are then written alone, since `rope_scaling` would override
    them. Where these have settings for each kind of layer, even an empty `rope_scaling` would.
    """
    family = FAMILIES[architecture.dense_family]
    carried = family.carried
    keys = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "hidden_act": spec.hidden_act,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_scaling": dict(spec.rope_scaling) if spec.rope_scaling else None,
        "sliding_window": spec.sliding_window,
        "tie_word_embeddings": spec.tied,
        PER_TOKEN_KEY: moe.experts_per_token,
        **{key: value for key, value in spec.extra.items() if key in carried},
        **architecture.config(spec, moe),
        **((architecture.layer_rule.write(spec, moe.layers(spec)) or {}) if architecture.layer_rule else {}),
    }
    if family.rope_kinds:
        return {key: value for key, value in keys.items() if key not in ("rope_scaling", "rope_theta")}
    return {**keys, "rope_scaling": None} if keys.get("rope_parameters") else keys


# --- reasons and rows that several architectures share


def common_reasons(spec: DenseSpec, *, mixed_windows: bool = False) -> list[str]:
    """`mixed_windows`: the architecture may have a window on some layers only."""
    reasons = []
    if spec.mlp_bias:
        reasons.append("mlp_bias: its experts have no bias")
    if spec.partial_rotary != 1.0:
        reasons.append(f"partial_rotary_factor {spec.partial_rotary:g}: it applies RoPE to whole heads only")
    if spec.has_mixed_windows and not mixed_windows:
        reasons.append("sliding window on some layers only (max_window_layers / layer_types): it has one rule for all")
    return reasons


def bias_reasons(spec: DenseSpec, *, qkv: bool, o: bool) -> list[str]:
    if (spec.qkv_bias and not qkv) or (spec.o_bias and not o):
        missing = "q, k, v and output projections" if not qkv else "output projection"
        return [f"attention_bias: its {missing} of attention have no bias"]
    return []


def head_dim_reason(spec: DenseSpec) -> list[str]:
    if spec.explicit_head_dim:
        return [f"head_dim {spec.head_dim}: its head_dim is always hidden_size / num_attention_heads"]
    return []


def no_shared_reasons(moe: MoeShape) -> list[str]:
    return ["shared_experts: it has none"] if moe.shared else []


def ungated_shared_reasons(moe: MoeShape) -> list[str]:
    """For architectures with shared experts that have no gate."""
    return ["prompts of the shared expert: its shared expert has no gate"] if moe.shared_has_prompts else []


def zero_ffn(names: Mapping[str, str], width: int | str) -> tuple[ConstantRow, ...]:
    """A shared expert of zeros: its output is exactly zero."""
    shapes: dict[str, tuple[str | int, ...]] = {
        "ffn.gate": (width, "hidden"),
        "ffn.up": (width, "hidden"),
        "ffn.down": ("hidden", width),
    }
    return tuple(ConstantRow(name=names[role], shape=shape) for role, shape in shapes.items())
