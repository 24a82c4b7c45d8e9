"""One layer's experts and router as a module that replaces a dense layer's FFN.

Sizes: N tokens, E experts, K experts chosen for a token, H hidden. Only the experts that a token chose are computed
for it. Formulas: transformers' modeling files of the MoE architectures; for DeepSeek-MoE its own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from raymoe.checkpoints.weight_table import TRANSPOSED, RoutingRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """How tokens are routed instead of by the checkpoint's own rows: by other rows of the router (E, H) and of the
    shared expert's gate; or with `forced` (texts,), each text's tokens go to one expert, without a router.
    `per_token`: how many experts are chosen, if not as many as the checkpoint's config says."""

    router: torch.Tensor | None = None
    shared_router: torch.Tensor | None = None
    forced: torch.Tensor | None = None
    per_token: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The chosen experts (N, K), highest score first, and their weights (N, K) in float32."""

    experts: torch.Tensor
    weights: torch.Tensor


def make_ffn(rule: RoutingRule, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """The module for the FFN of a layer, from its tensors: a MoE block, or a plain FFN if it has no experts."""
    return MoeBlock(rule, tensors) if "router" in tensors else PlainFfn(rule, tensors)


class PlainFfn(torch.nn.Module):  # type: ignore[misc]  # torch is Any to mypy here
    """The FFN of a layer without experts. `tensors` as in `MoeBlock`."""

    def __init__(self, rule: RoutingRule, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._block = MoeBlock(rule, tensors)

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        return self._block.run_ffn("plain", hidden_BTH)


class MoeBlock(torch.nn.Module):  # type: ignore[misc]  # torch is Any to mypy here
    """`tensors` have the names of `checkpoints.weight_table`. `route` may be set before a call; `choice` is that of the
    last call."""

    def __init__(self, rule: RoutingRule, tensors: Mapping[str, torch.Tensor]) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        self._rule, self._tensors = rule, dict(tensors)
        self._activation = ACT2FN[rule.activation]
        self.route = Route()
        self.choice: Choice | None = None

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        states_NH = hidden_BTH.flatten(0, 1)
        self.choice = self._choose(states_NH, hidden_BTH.shape[1])
        output_NH = torch.zeros_like(states_NH)
        for expert in range(self._rule.experts):
            token, place = torch.where(self.choice.experts == expert)
            if len(token):
                weights = self.choice.weights[token, place, None].to(states_NH.dtype)
                output_NH.index_add_(0, token, self.run_ffn(f"experts.{expert}", states_NH[token]) * weights)
        if self._rule.has_shared_expert:
            output_NH += self._shared(states_NH)
        return output_NH.reshape(hidden_BTH.shape)

    @property
    def choice_of_sources(self) -> Choice | None:
        """`choice` by source model: the `sources_per_token` of them whose experts have the largest weights together."""
        parts = self._rule.granularity
        if self.choice is None or parts == 1:
            return self.choice
        weights = torch.zeros(len(self.choice.experts), self._rule.experts // parts, device=self.choice.weights.device)
        weights.scatter_add_(1, self.choice.experts // parts, self.choice.weights.float())
        largest, sources = weights.topk(min(self._rule.sources_per_token, weights.shape[1]), dim=-1)
        return Choice(experts=sources, weights=largest)

    def _choose(self, states_NH: torch.Tensor, tokens: int) -> Choice:
        if self.route.forced is not None:
            parts = torch.arange(self._rule.granularity, device=states_NH.device)
            chosen = self.route.forced.repeat_interleave(tokens)[:, None] * len(parts) + parts
            return Choice(experts=chosen, weights=torch.full(chosen.shape, 1 / len(parts), device=states_NH.device))
        if self.route.router is None:
            scores_NE = torch.nn.functional.linear(states_NH, self._tensors["router"]) / self._rule.router_factor
        else:
            scores_NE = torch.nn.functional.linear(states_NH, self.route.router)
        if self._rule.score_function == "sigmoid":
            scores_NE = scores_NE.float().sigmoid()
        else:
            scores_NE = scores_NE.softmax(dim=-1, dtype=torch.float32)
        count = self.route.per_token or self._rule.per_token
        weights, chosen = scores_NE.topk(count, dim=-1)
        if self._rule.renormalizes and (count > 1 or self._rule.renormalizes_one):
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Choice(experts=chosen, weights=weights)

    def _shared(self, states_NH: torch.Tensor) -> torch.Tensor:
        output_NH = self.run_ffn("shared", states_NH)
        if not self._rule.has_shared_gate:
            return output_NH
        gate = self._tensors["shared_router"] if self.route.shared_router is None else self.route.shared_router
        return torch.sigmoid(torch.nn.functional.linear(states_NH, gate)) * output_NH

    def run_ffn(self, name: str, states_NH: torch.Tensor) -> torch.Tensor:
        """The output of one of its FFNs, by the beginning of its tensors' names."""
        linear, held = torch.nn.functional.linear, self._tensors
        gate_up, down = (f"{name}.{each}" for each in TRANSPOSED)
        if gate_up in held:
            gate, up = (states_NH @ held[gate_up]).chunk(2, dim=-1)
            return (self._activation(gate) * up) @ held[down]
        inner = self._activation(linear(states_NH, held[f"{name}.gate"])) * linear(states_NH, held[f"{name}.up"])
        return linear(inner, held[f"{name}.down"])
