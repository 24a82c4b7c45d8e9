"""What is run: dense models and mixtures as tables of weights that `StreamedDecoder` can load.

A mixture is a dense decoder with another module where the FFN was, so its weights go under the dense names, and what
belongs to the mixture under `mlp.` of the layer:

    mlp.experts.3.gate   mlp.experts.3.up   mlp.experts.3.down   mlp.router
    mlp.shared.gate      mlp.shared.up      mlp.shared.down      mlp.shared_router
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raymoe.architectures import HOSTS, DenseSpec, MoeHost, read_spec
from raymoe.errors import Problem, ProblemReport
from raymoe.planning.compat import FLOAT_DTYPES, check_tensors, spec_of
from raymoe.planning.tensors import weight_refs
from raymoe.planning.types import WeightRef
from raymoe.sources.types import ModelFacts

__all__ = ["EvaluatedModel", "RoutingRule", "dense_model", "mixture_model"]

_EXPERTS_KEY = {
    "mixtral": "num_local_experts",
    "deepseek": "n_routed_experts",
    "qwen2_moe": "num_experts",
    "qwen3_moe": "num_experts",
}
_DENSE_TYPE = {"mixtral": "llama", "deepseek": "llama", "qwen2_moe": "qwen2", "qwen3_moe": "qwen3"}
# Keys of a host's config.json that mean the same in the dense model whose attention and norms it has.
_DENSE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "tie_word_embeddings",
    "attention_bias",
)
_REMEDY = "evaluate a merge as raymoe wrote it"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRule:
    """How a host goes from router scores to weights: softmax over all experts, the highest `per_token` of them,
    which sum to one again where it `renormalises`. `gates_shared`: the shared expert counts by its own gate's sigmoid.
    """

    experts: int
    per_token: int
    renormalises: bool
    shared: bool
    gates_shared: bool
    activation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel:
    """A model to be streamed. `config` is a dense config.json; `rule` is None for a dense model."""

    label: str
    spec: DenseSpec
    config: Mapping[str, Any]
    weights: Mapping[str, WeightRef]
    rule: RoutingRule | None = None


def dense_model(facts: ModelFacts, where: str) -> EvaluatedModel:
    """A whole dense model, LoRA included. Raises ProblemReport if its files do not hold what its config says."""
    spec, problems = spec_of(facts, where)
    if spec is not None:
        problems += check_tensors(facts, spec, where, ffn_only=False)
    if problems or spec is None:
        raise ProblemReport(problems)
    return EvaluatedModel(label=facts.label, spec=spec, config=facts.config, weights=weight_refs(facts, spec))


def mixture_model(facts: ModelFacts) -> EvaluatedModel:
    """A merged checkpoint. Raises ProblemReport if it has no architecture that raymoe writes, or lacks tensors."""
    host = next((host for host in HOSTS.values() if host.model_type == facts.config.get("model_type")), None)
    if host is None:
        what = f"model_type is {facts.config.get('model_type')!r}, which is no mixture that raymoe writes"
        raise ProblemReport([Problem(where=f"{facts.label}/config.json", what=what, remedy=_REMEDY)])
    config = _dense_config(host, facts.config)
    spec = read_spec(config, facts.label)
    if not isinstance(spec, DenseSpec):
        raise ProblemReport(spec)
    rule = _rule(host, facts, spec)
    names = dict(_names(host, spec, rule))
    tensors = facts.index.tensors
    if missing := [name for name in names.values() if name not in tensors]:
        what = f"{len(missing)} tensor(s) missing: {', '.join(missing[:4])}"
        raise ProblemReport([Problem(where=facts.label, what=what, remedy=_REMEDY)])
    if odd := sorted({tensors[name].dtype for name in names.values()} - set(FLOAT_DTYPES)):
        raise ProblemReport([Problem(where=facts.label, what=f"weights of type {', '.join(odd)}", remedy=_REMEDY)])
    weights = {name: WeightRef(entry=tensors[output]) for name, output in names.items()}
    return EvaluatedModel(label=facts.label, spec=spec, config=config, weights=weights, rule=rule)


def _dense_config(host: MoeHost, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the dense model that has the mixture's attention and norms."""
    dense = {key: config[key] for key in _DENSE_KEYS if config.get(key) is not None}
    dense["model_type"] = _DENSE_TYPE[host.name]
    if dense["model_type"] == "llama" and config.get("sliding_window"):
        dense["model_type"] = "mistral"
    scaling = config.get("rope_scaling")
    if scaling and "rope_type" not in scaling:
        dense["rope_scaling"] = {**scaling, "rope_type": scaling.get("type", "default")}
    return dense


def _rule(host: MoeHost, facts: ModelFacts, spec: DenseSpec) -> RoutingRule:
    config = facts.config
    experts, per_token = config.get(_EXPERTS_KEY[host.name]), config.get("num_experts_per_tok")
    if not isinstance(experts, int) or not isinstance(per_token, int) or not 1 <= per_token <= experts:
        what = f"{_EXPERTS_KEY[host.name]} is {experts!r} and num_experts_per_tok is {per_token!r}"
        raise ProblemReport([Problem(where=f"{facts.label}/config.json", what=what, remedy=_REMEDY)])
    # Mixtral's softmax over the chosen ones is the same as one over all that is made to sum to one again.
    renormalises = host.name == "mixtral" or bool(config.get("norm_topk_prob"))
    return RoutingRule(
        experts=experts,
        per_token=per_token,
        # The code of DeepSeek-MoE leaves the weight of a single expert as it is.
        renormalises=renormalises and not (host.name == "deepseek" and per_token == 1),
        shared=bool(host.shared) and (host.name != "deepseek" or bool(config.get("n_shared_experts"))),
        gates_shared=bool(host.shared_router),
        activation=spec.hidden_act,
    )


def _names(host: MoeHost, spec: DenseSpec, rule: RoutingRule) -> Iterator[tuple[str, str]]:
    """(name to load under, name in the checkpoint) of every tensor."""
    for row, layer, name in spec.tensors():
        if not row.is_ffn:
            yield name, host.backbone[row.role].format(layer=layer)
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}.mlp."
        yield f"{prefix}router", host.router.format(layer=layer)
        for role, name in host.expert.items():
            for expert in range(rule.experts):
                yield f"{prefix}experts.{expert}.{role[4:]}", name.format(layer=layer, expert=expert)
        if rule.shared:
            for role, name in host.shared.items():
                yield f"{prefix}shared.{role[4:]}", name.format(layer=layer)
            if rule.gates_shared:
                yield f"{prefix}shared_router", host.shared_router.format(layer=layer)
