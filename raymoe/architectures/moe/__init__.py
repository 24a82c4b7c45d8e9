"""The MoE architectures that experts are put into, by the families that they take.

Output names are those of the checkpoints on the Hub, mostly one tensor per expert and matrix, which transformers 4 and
5, vLLM, SGLang and llama.cpp's converter read. Published mixtures of newer families (Qwen3.5, Gemma 4) have all experts
of a layer in two tensors, as transformers 5 has them in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymoe.architectures.moe.gemma import GEMMA_ARCHITECTURES
from raymoe.architectures.moe.granite import GRANITE_ARCHITECTURES
from raymoe.architectures.moe.llama_like import LLAMA_LIKE_ARCHITECTURES
from raymoe.architectures.moe.same_family import SAME_FAMILY_ARCHITECTURES
from raymoe.architectures.moe.sigmoid_routed import SIGMOID_ROUTED_ARCHITECTURES
from raymoe.architectures.moe_architecture import MoeArchitecture

__all__ = ["MOE_ARCHITECTURES", "find_moe_architecture"]

# In order of preference where a config does not force one: the most widely supported layout first.
MOE_ARCHITECTURES: Mapping[str, MoeArchitecture] = {
    architecture.name: architecture
    for architecture in (
        *LLAMA_LIKE_ARCHITECTURES,
        *GRANITE_ARCHITECTURES,
        *SAME_FAMILY_ARCHITECTURES,
        *SIGMOID_ROUTED_ARCHITECTURES,
        *GEMMA_ARCHITECTURES,
    )
}


def find_moe_architecture(config: Mapping[str, Any]) -> MoeArchitecture | None:
    """The architecture that a mixture's config.json names; None if raymoe writes no such mixtures."""
    return next(
        (
            architecture
            for architecture in MOE_ARCHITECTURES.values()
            if architecture.model_type == config.get("model_type")
        ),
        None,
    )
