"""Reads `eval.json` for both views of an evaluation (terminal and page): losses by model, weak layers, loads.

The file's terms are used: a *label* is a kind of text, its *own expert* is the one that should be chosen for it. A loss
that was not computed is `null` or missing in the file, and None here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MEAN = "mean"
_ROW_ORDER = ("model", "base", "average", "hidden", "merged", "oracle", "experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """A merge with `count` experts for a token. `active`: its parameters that work on a token; `share`: the same as a
    share of those with the config's number, None if that was not evaluated too."""

    count: int
    active: int
    share: float | None
    losses: Mapping[str, float | None]


def is_dense(result: Mapping[str, Any]) -> bool:
    """Whether it is the evaluation of a dense model, which has no routers."""
    return "routing" not in result


def read_labels(result: Mapping[str, Any]) -> list[str]:
    return list(result["data"]["per_label"])


def own_expert(result: Mapping[str, Any], label: str) -> int | None:
    """Number of the expert for this label's texts."""
    number: int | None = result["data"]["per_label"][label].get("expert")
    return number


def read_loss(result: Mapping[str, Any], model: str, label: str) -> float | None:
    """Loss of a model ('merged', 'base', 'expert go', ...) on a label, or 'mean' over labels."""
    losses = result["loss"].get(model) or {}
    value: float | None = losses.get(label)
    return value


def loss_rows(result: Mapping[str, Any]) -> list[str]:
    """The models that have a loss: first merge, base, average and routings, then the dense experts and further
    models."""
    known = [
        model for model in result["loss"] if any(value is not None for value in (result["loss"][model] or {}).values())
    ]
    return [model for model in _ROW_ORDER if model in known] + [model for model in known if model not in _ROW_ORDER]


def own_expert_loss(result: Mapping[str, Any], label: str) -> float | None:
    """Loss of a label's own dense expert; for 'mean', the mean of these losses over labels.

    Files of older versions have no `experts` among the losses.
    """
    if (loss := read_loss(result, "experts", label)) is not None:
        return loss
    if label == MEAN:
        losses = [own_expert_loss(result, each) for each in read_labels(result)]
        present = [loss for loss in losses if loss is not None]
        return sum(present) / len(present) if losses and len(present) == len(losses) else None
    number = own_expert(result, label)
    return None if number is None else read_loss(result, f"expert {result['experts'][number]}", label)


def best_expert(result: Mapping[str, Any]) -> tuple[str, float] | None:
    """The dense expert with the lowest mean loss on all labels; None if not all experts have one."""
    means = {name: read_loss(result, f"expert {name}", MEAN) for name in result.get("experts") or ()}
    known = {name: loss for name, loss in means.items() if loss is not None}
    return min(known.items(), key=lambda item: item[1]) if known and len(known) == len(means) else None


def references(result: Mapping[str, Any]) -> dict[str, float]:
    """Mean losses that a merge has to beat to be worth its size: of the best single expert, and of the average."""
    found = {}
    if (best := best_expert(result)) is not None:
        found[f"the best single expert ({best[0]})"] = best[1]
    if (average := read_loss(result, "average", MEAN)) is not None:
        found["a plain average of the experts"] = average
    return found


def best_loss(result: Mapping[str, Any], label: str) -> float | None:
    """The lowest loss on a label over all models."""
    losses = [read_loss(result, model, label) for model in loss_rows(result)]
    return min((loss for loss in losses if loss is not None), default=None)


def perplexity(loss: float) -> str:
    """exp(loss) to three digits; that of a broken model may exceed any float."""
    value = math.exp(loss) if loss < 700 else math.inf
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def mean_load(result: Mapping[str, Any]) -> list[float]:
    """An expert's share of the work, mean over layers."""
    layers: Sequence[Sequence[float]] = result["routing"]["load"]
    return [sum(column) / len(layers) for column in zip(*layers)]


def top_k_rows(result: Mapping[str, Any]) -> list[TopK]:
    """Loss and cost of a merge for each number of experts for a token; none if they were not asked for."""
    rows = result.get("by_experts_per_token") or ()
    own = next((row for row in rows if row["experts_per_token"] == result["experts_per_token"]), None)
    found = []
    for row in rows:
        active = int(row["active_parameters"])
        share = None if own is None else active / int(own["active_parameters"])
        losses: Mapping[str, float | None] = row["loss"]
        found.append(TopK(count=int(row["experts_per_token"]), active=active, share=share, losses=losses))
    return found


def top_k_name(result: Mapping[str, Any], count: int) -> str:
    """The number, with a mark on that of the merge's config."""
    return f"{count} (config)" if count == result["experts_per_token"] else str(count)


def weakest_layers(result: Mapping[str, Any], count: int = 3) -> list[tuple[int, float]]:
    """(layer, accuracy of the first choice) of the layers with the lowest accuracy."""
    accuracy = result["routing"]["first_accuracy"]
    return sorted(zip(routed_layers(result), accuracy, strict=True), key=lambda pair: pair[1])[:count]


def routed_layers(result: Mapping[str, Any]) -> Sequence[int]:
    """The numbers of the layers with experts, in the order of the lists by layer."""
    found: Sequence[int] = result.get("moe_layers") or range(len(result["routing"]["first_accuracy"]))
    return found


def merge_origin(result: Mapping[str, Any]) -> list[str]:
    """How a merge was made, as far as it is known: gate mode, the model that read the prompts, backbone."""
    origin = {
        "gate mode": result.get("gate_mode"),
        "prompt model": result.get("prompt_model"),
        "backbone": result.get("backbone"),
    }
    return [f"{what} {name}" for what, name in origin.items() if name]
