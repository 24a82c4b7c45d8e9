"""DeepSeek-MoE v1, small and slow, to compute with merges of that layout: transformers does not ship its code.

Attention, norms, RoPE and head are Llama's and are taken from transformers. The feed-forward part is the paper's
(https://arxiv.org/abs/2401.06066, section 3): softmax scores over the routed experts, the `num_experts_per_tok`
highest of them, renormalised to one with `norm_topk_prob` (for more than one expert only), and the shared experts'
output added. Checkpoints are loaded strictly: every name that the layout has, and no other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN

from tests.pico import tensors_of

_LLAMA_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "attention_bias",
)


class FeedForward(torch.nn.Module):
    def __init__(self, hidden: int, width: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(hidden, width, bias=False)
        self.up_proj = torch.nn.Linear(hidden, width, bias=False)
        self.down_proj = torch.nn.Linear(width, hidden, bias=False)
        self.activation = ACT2FN[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return result


class DeepseekMoe(torch.nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        assert config["scoring_func"] == "softmax"
        hidden, width, act = config["hidden_size"], config["moe_intermediate_size"], config["hidden_act"]
        self.top_k: int = config["num_experts_per_tok"]
        self.renormalise = config["norm_topk_prob"] and self.top_k > 1
        self.gate = torch.nn.Linear(hidden, config["n_routed_experts"], bias=False)
        self.experts = torch.nn.ModuleList(FeedForward(hidden, width, act) for _ in range(config["n_routed_experts"]))
        self.shared_experts = None
        if config["n_shared_experts"] is not None:
            # All shared experts are one wide feed-forward network.
            self.shared_experts = FeedForward(hidden, width * config["n_shared_experts"], act)

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        x = hidden_BTH.flatten(0, 1)
        weights, chosen = self.gate(x).softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.renormalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == number)
            result[rows] += weights[rows, place, None] * expert(x[rows])
        if self.shared_experts is not None:
            result = result + self.shared_experts(x)
        return result.reshape(hidden_BTH.shape)


def load_deepseek(folder: Path) -> LlamaForCausalLM:
    """The checkpoint in `folder`, for inference in float32. Raises RuntimeError for names that don't fit."""
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["DeepseekForCausalLM"]
    assert config["model_type"] == "deepseek"
    model = LlamaForCausalLM(LlamaConfig(**{k: config[k] for k in _LLAMA_KEYS}, rope_parameters=_rope(config)))
    for number, layer in enumerate(model.model.layers):
        if number >= config["first_k_dense_replace"] and number % config["moe_layer_freq"] == 0:
            layer.mlp = DeepseekMoe(config)
    tensors = tensors_of(folder)
    if config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # as transformers 4, whatever the file holds
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE as DeepSeek-MoE's own code reads it: `type` is linear or dynamic, and nothing else."""
    scaling = config["rope_scaling"]
    if scaling is None:
        return {"rope_type": "default", "rope_theta": config["rope_theta"]}
    if scaling["type"] not in ("linear", "dynamic"):
        raise ValueError(f"Unknown RoPE scaling type {scaling['type']}")
    return {"rope_type": scaling["type"], "factor": scaling["factor"], "rope_theta": config["rope_theta"]}
