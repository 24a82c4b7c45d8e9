"""Scores the routers on held-out prompts: each fold is scored with rows that were fitted without it.

A layer's *accuracy* is the share of held-out prompt tokens that are routed to their prompt's expert first. Its *load*
is the share of tokens that each expert gets first. Every expert's prompts have equal weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymoe.formatting import number_ranges
from raymoe.gate_modes import GateMode
from raymoe.gate_modes.layer_values import LayerScores

_WEAKEST = 3
# An expert is starved in a layer where it comes first for less than this share of its fair share.
_STARVED = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSummary:
    """The layers that could be scored, by number."""

    experts: int
    layers: Mapping[int, LayerScores]

    @property
    def accuracy(self) -> float:
        return sum(layer.accuracy for layer in self.layers.values()) / len(self.layers)

    def starved_layers(self) -> dict[int, list[int]]:
        """Experts, with the layers where they get almost no tokens."""
        limit = _STARVED / self.experts
        found = {
            expert: [number for number, layer in self.layers.items() if layer.load[expert] < limit]
            for expert in range(self.experts)
        }
        return {expert: layers for expert, layers in found.items() if layers}

    def plain(self) -> dict[str, Any]:
        """As JSON values, for records."""
        return {
            "accuracy": round(self.accuracy, 4),
            "layers": [
                {
                    "layer": number,
                    "accuracy": round(layer.accuracy, 4),
                    "load": [round(share, 4) for share in layer.load],
                    **({"lambda": layer.ridge, "scale": layer.scale} if layer.ridge is not None else {}),
                }
                for number, layer in sorted(self.layers.items())
            ],
        }


def summary_lines(summary: RouterSummary, names: Sequence[str]) -> list[str]:
    """Two lines for the user: how well the routers tell the prompts apart, and each expert's share of tokens."""
    weakest = sorted(summary.layers, key=lambda number: summary.layers[number].accuracy)[:_WEAKEST]
    weak = ", ".join(f"layer {number} {summary.layers[number].accuracy:.0%}" for number in sorted(weakest))
    count = len(summary.layers)
    loads = [sum(layer.load[expert] for layer in summary.layers.values()) / count for expert in range(summary.experts)]
    shares = ", ".join(f"{name} {load:.0%}" for name, load in zip(names, loads, strict=True))
    chance = 1 / summary.experts
    return [
        f"routers on held-out prompts: {summary.accuracy:.0%} of tokens routed to their expert first "
        f"(chance {chance:.0%}); weakest: {weak}",
        f"first choices by expert: {shares}",
    ]


def router_warnings(summary: RouterSummary, names: Sequence[str], *, better: GateMode | None) -> list[str]:
    """Warnings about the routers, with numbers and the remedy. `better`: a mode that routes better, if any."""
    warnings = []
    other_mode = f", or use gate_mode: {better.name}" if better else ""
    chance = 1 / summary.experts
    if summary.experts > 1 and summary.accuracy < chance + 0.25 * (1 - chance):
        warnings.append(
            f"the routers hardly tell the experts' prompts apart: {summary.accuracy:.0%} of held-out prompt tokens go "
            f"to their expert first, and {chance:.0%} would by chance; give each expert more prompts, of the kind of "
            f"text that it is to work on{other_mode}"
        )
    for expert, layers in summary.starved_layers().items():
        if len(layers) * 2 >= len(summary.layers):
            warnings.append(
                f"{names[expert]} will be starved: it comes first for less than {_STARVED / summary.experts:.0%} of "
                f"prompt tokens in {len(layers)} of {len(summary.layers)} layers ({number_ranges(layers)}); its "
                "prompts look like another expert's: give it prompts that differ more, or add negative_prompts"
                f"{other_mode}"
            )
    return warnings
