"""A mixture's config.json and tensor names, read backwards: which dense model has its attention, norms and embeddings.

The tables are those that merges are written by (moe/). Published mixtures of these architectures are read by them too:
a saver of transformers 4 or 5 gives tensors the same names, except with `save_original_format=False`, which leaves the
experts of a layer in the two tensors that transformers 5 has in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from raymoe.architectures.dense_spec import NULL_MEANS_NONE
from raymoe.architectures.families import FAMILIES
from raymoe.architectures.moe import find_moe_architecture
from raymoe.architectures.moe_architecture import MoeArchitecture, fused_experts
from raymoe.architectures.rope import rotary_share

# Keys of a MoE config.json that have the same meaning in the dense model with the same attention and norms.
DENSE_KEYS = (
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
    "rope_parameters",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "per_layer_config",
    "tie_word_embeddings",
    "attention_bias",
)
_FUSED = re.compile(r"model\.layers\.\d+\.(?P<module>(?:.+\.)?)experts\.gate_up_proj")


class NoDenseModel(ValueError):
    """No dense family has the attention of this mixture. The message says which feature is missing."""


def is_mixture(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a mixture that raymoe writes. Some dense models have the same `model_type`, with
    no experts."""
    architecture = find_moe_architecture(config)
    if architecture is None:
        return False
    _, experts = architecture.entry(config, architecture.experts_key)
    return config.get("model_type") not in FAMILIES or bool(experts)


def dense_config(architecture: MoeArchitecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the dense model that has a mixture's attention and norms. Raises NoDenseModel.

    Its values are not checked, except for RoPE's, which must be valid (`rope_value_problems`).
    """
    family = FAMILIES[architecture.dense_family]
    own_names = [name for names in family.keys.values() for name in names]
    keys = {*DENSE_KEYS, *own_names, *family.switches.values(), *family.carried}
    # For these keys, null means that the model lacks the feature; for other keys, null means the default.
    dense = {key: config[key] for key in keys & config.keys() if config[key] is not None or key in NULL_MEANS_NONE}
    dense |= {"model_type": _read_as(architecture, config), **architecture.dense_keys}
    # A MoE architecture may use this name for the width of its shared expert.
    dense |= dict.fromkeys(family.keys.get("intermediate_size", ()), config.get("intermediate_size"))
    scaling = config.get("rope_scaling")
    if scaling and isinstance(scaling, Mapping) and "rope_type" not in scaling:
        dense["rope_scaling"] = {**scaling, "rope_type": scaling.get("type", "default")}
    if (share := rotary_share(config)) != 1.0 and architecture.dense_lacks_partial_rotary:
        if not architecture.partial_rotary_family or config.get("use_qk_norm"):
            raise NoDenseModel(f"partial_rotary_factor is {share}")
        dense |= {"model_type": architecture.partial_rotary_family, "partial_rotary_factor": share}
    return dense


def _read_as(architecture: MoeArchitecture, config: Mapping[str, Any]) -> str:
    """The dense family that the mixture is read as."""
    if architecture.windowed_family and config.get("sliding_window"):
        return architecture.windowed_family
    if architecture.qk_norm_family and config.get("use_qk_norm"):
        return architecture.qk_norm_family
    return architecture.dense_family


def as_saved(architecture: MoeArchitecture, names: Iterable[str]) -> MoeArchitecture:
    """The architecture with the names of experts that a checkpoint has, of whichever version of transformers; `names`
    are all its tensors."""
    names = names if isinstance(names, Mapping) else frozenset(names)
    found = architecture.as_stored(names)
    if found is not architecture or found.transposes_experts:
        return found
    fused = next((match for name in names if (match := _FUSED.fullmatch(name))), None)
    return found if fused is None else replace(found, expert=fused_experts(fused["module"]))
