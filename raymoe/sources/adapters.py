"""A PEFT LoRA adapter: which weights of the model it changes, by which pair of factors, with which scaling.

    base_model.model.<module>.lora_A.weight  (rank, in_features)   \\
    base_model.model.<module>.lora_B.weight  (out_features, rank)   --> <module>.weight += scaling * B @ A
    base_model.model.<module>.lora_magnitude_vector  (out_features,), with DoRA: lengths of that weight's rows

Everything that PEFT can put into an adapter beyond that is refused by name: silently leaving part of it out
would make an expert that nobody trained. The way out is the same for all: merge the adapter into its model
with peft, and use the result as an expert.

Sources: the checkpoint format, https://huggingface.co/docs/peft/developer_guides/checkpoint; the matching of
`rank_pattern` and `alpha_pattern`, `get_pattern_key` in peft/utils/other.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from raymoe.errors import CheckpointError, Problem
from raymoe.sources.types import AdapterFacts, CheckpointIndex, LoraPair, TensorEntry

__all__ = ["adapter_facts"]

_REMEDY = "merge the adapter into its model with peft (merge_and_unload, save_pretrained) and use the result"
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(lora_(?P<factor>[AB])\.weight|(?P<magnitude>lora_magnitude_vector)(\.weight)?)"
)
_MAGNITUDE = "magnitude"
_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
_NAMED = 5  # how many of many problems of a kind are listed

# Settings that do not change what the factors mean. (Where modules are targeted shows in the tensors
# themselves.)
_INERT = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
    }
)

# Settings that do, with what they are.
_REFUSED: Mapping[str, str] = {
    "fan_in_fan_out": "weights stored transposed",
    "lora_bias": "biases on the factors",
    "modules_to_save": "whole modules that replace the model's",
    "trainable_token_indices": "trained embedding rows",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on bare parameters",
    "use_qalora": "QALoRA, which pools the inputs",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA, which depends on the prompt",
    "arrow_config": "Arrow routing between adapters",
    "kasa_config": "KaSA, which adds singular values",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "loftq_config": "LoftQ, which changed the model's weights",
}

# `init_lora_weights` that leave the model's own weights as they were; the others (PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA) change them, so that the factors only fit the changed model.
_INITS_KEEPING_BASE = ("gaussian", "eva", "orthogonal", "mica")

# Tensors that are no pair of factors: part of the key -> what it is.
_FOREIGN_KEYS: Mapping[str, str] = {
    "lora_embedding_": "LoRA on an embedding",
    "token_adapter": "trained embedding rows",
    "trainable_tokens": "trained embedding rows",
    ".lora_B.bias": "a bias on a factor",
    ".lora_A.bias": "a bias on a factor",
    ".base_layer.": "a copy of the model's own weight (peft saves it with targeted or resized embeddings)",
    "modules_to_save": "a whole module that replaces the model's",
}


def adapter_facts(
    label: str,
    revision: str | None,
    config: Mapping[str, Any],
    index: CheckpointIndex,
    model: CheckpointIndex,
) -> AdapterFacts:
    """Check an adapter against its model, and pair its tensors.

    `config` is adapter_config.json, `index` the adapter's tensors, `model` those of the model that it is put
    on. `base_model_name_or_path` is not compared: models move and are renamed; shapes are compared. Raises
    CheckpointError with all problems.
    """
    problems = [Problem(where=label, what=what, remedy=_REMEDY) for what in _config_problems(config)]
    if problems:
        raise CheckpointError(problems)  # what the tensors are can't be told without the config
    factors, wrong = _factors(index)
    pairs: dict[str, LoraPair] = {}
    for module, found in factors.items():
        try:
            pairs[f"{module}.weight"] = _pair(module, found, config, model)
        except ValueError as error:
            wrong.append(str(error))
    if not pairs and not wrong:
        wrong.append("the adapter holds no LoRA factors")
    if len(wrong) > _NAMED:
        wrong = [*wrong[:_NAMED], f"and {len(wrong) - _NAMED} more tensors that don't fit"]
    if wrong:
        made_for = config.get("base_model_name_or_path")
        remedy = f"{_REMEDY}; it was made for {made_for}" if made_for else _REMEDY
        raise CheckpointError([Problem(where=label, what=what, remedy=remedy) for what in wrong])
    return AdapterFacts(label=label, revision=revision, config=config, index=index, pairs=pairs)


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        return [f"an adapter of type {peft_type!r} (adapter_config.json: peft_type); only LORA is supported"]
    problems = [
        f"the adapter uses {what} ({key}), which is not supported" for key, what in _REFUSED.items() if config.get(key)
    ]
    if config.get("bias", "none") != "none":
        problems.append(f"the adapter trains biases (bias: {config['bias']!r}), which is not supported")
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool) and init is not None and str(init).lower() not in _INITS_KEEPING_BASE:
        problems.append(f"the adapter was made with init_lora_weights {init!r}, which changed its model's own weights")
    for key in sorted(config.keys() - _INERT - _REFUSED.keys() - {"bias"}):
        if config[key]:
            problems.append(f"unknown setting {key!r} = {config[key]!r:.80} in adapter_config.json")
    return problems + _number_problems(config)


def _number_problems(config: Mapping[str, Any]) -> list[str]:
    problems: list[str] = []
    for key, kind in (("r", int), ("lora_alpha", (int, float))):
        if not _is_positive(config.get(key), kind):
            problems.append(f"{key!r} in adapter_config.json is {config.get(key)!r:.80}, not a number over 0")
    for key, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        patterns = config.get(key) or {}
        if not isinstance(patterns, Mapping):
            problems.append(f"{key!r} in adapter_config.json is not an object")
            continue
        for pattern, value in patterns.items():
            if not _is_positive(value, kind):
                problems.append(f"{key!r} gives {pattern!r} the value {value!r:.80}, not a number over 0")
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"{key!r} has {pattern!r}, which is no regular expression: {error}")
    return problems


def _is_positive(value: Any, kind: type[int] | tuple[type[int], type[float]]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < math.inf


def _factors(index: CheckpointIndex) -> tuple[dict[str, dict[str, TensorEntry]], list[str]]:
    """module -> {'A': ..., 'B': ..., with DoRA 'magnitude': ...}, and what is wrong with names of anything else."""
    factors: dict[str, dict[str, TensorEntry]] = {}
    wrong: list[str] = []
    for name, entry in index.tensors.items():
        foreign = next((what for part, what in _FOREIGN_KEYS.items() if part in name), None)
        match = _KEY.fullmatch(name)
        if foreign:
            wrong.append(f"tensor {name!r} is {foreign}, which is not supported")
        elif match is None:
            wrong.append(
                f"tensor {name!r} is not a LoRA factor (base_model.model.<module>.lora_A.weight or lora_B): "
                "a whole weight, perhaps of resized embeddings?"
            )
        else:
            factors.setdefault(match["module"], {})[match["factor"] or _MAGNITUDE] = entry
    return factors, wrong


def _pair(module: str, found: Mapping[str, TensorEntry], config: Mapping[str, Any], model: CheckpointIndex) -> LoraPair:
    """The factors of one module. Raises ValueError with the first thing that does not fit."""
    for factor, other in (("A", "B"), ("B", "A")):
        if factor not in found:
            raise ValueError(f"{module!r} has lora_{other} but no lora_{factor}")
    a, b = found["A"], found["B"]
    target = model.tensors.get(f"{module}.weight")
    if target is None:
        hint = " (the model ties it to its embeddings)" if module.endswith("lm_head") else ""
        raise ValueError(
            f"the adapter changes '{module}.weight', which the model does not have{hint}: another base model?"
        )
    for entry in (a, b):
        if entry.dtype not in _FLOATS or len(entry.shape) != 2:
            raise ValueError(f"tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}; a float matrix is expected")
    rank, alpha = _rank_and_alpha(module, config)
    if a.shape[0] != rank or b.shape[1] != rank:
        shapes = f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"
        raise ValueError(f"{module!r}: {shapes} don't have the rank {rank} of adapter_config.json")
    if target.shape != (b.shape[0], a.shape[1]):
        delta = [b.shape[0], a.shape[1]]
        raise ValueError(f"{module!r}: the adapter's delta is {delta}, the model's weight {list(target.shape)}")
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraPair(a=a, b=b, scaling=scaling, magnitude=_magnitude(module, found, config, rows=b.shape[0]))


def _magnitude(
    module: str, found: Mapping[str, TensorEntry], config: Mapping[str, Any], rows: int
) -> TensorEntry | None:
    """DoRA's lengths of the rows, if the adapter is one. Raises ValueError for one without the other."""
    entry = found.get(_MAGNITUDE)
    if bool(config.get("use_dora")) is not (entry is not None):
        there, not_there = ("a", "no use_dora") if entry is not None else ("no", "use_dora")
        raise ValueError(f"{module!r} has {there} lora_magnitude_vector, and adapter_config.json has {not_there}")
    if entry is not None and (entry.dtype not in _FLOATS or entry.shape != (rows,)):
        raise ValueError(f"tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}; {rows} floats are expected")
    return entry


def _rank_and_alpha(module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank: int = _matched(ranks, module, config["r"])
    alpha: float = _matched(alphas, module, config["lora_alpha"])
    return rank, alpha


def _matched(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the module's name, or its end after a dot."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
