"""Computes results from log-likelihoods and the choices of routers. numpy only.

Losses are nats per token, over the tokens of all texts of a label. Routing results count every token except BOS;
means over labels give each label the same weight, however many tokens it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

MEAN = "mean"
SMALLEST_GAP = 0.005
"""Nats per token; half of it is the rounding of the printed losses."""
Float64 = npt.NDArray[np.float64]


def losses(values: Sequence[npt.NDArray[np.float32]], labels: Sequence[str]) -> dict[str, float]:
    """Loss of each label, in order of appearance, and `mean` over labels.

    `values` are the log-likelihoods of each text's tokens, `labels` the texts' labels; none of them is `mean`.
    """
    found = {}
    for label in dict.fromkeys(labels):
        own = [value for value, text in zip(values, labels, strict=True) if text == label]
        total = sum(float(value.sum(dtype=np.float64)) for value in own)
        found[label] = -total / sum(value.size for value in own)
    return found | {MEAN: sum(found.values()) / len(found)}


def own_losses(by_model: Mapping[str, Mapping[str, float]], owners: Mapping[str, str]) -> dict[str, float] | None:
    """Loss of each label by the model in `owners` for it, and `mean` over labels; None if a model has no losses."""
    if any(model not in by_model for model in owners.values()):
        return None
    found = {label: by_model[model][label] for label, model in owners.items()}
    return found | {MEAN: sum(found.values()) / len(found)}


def as_json_losses(loss: Mapping[str, float]) -> dict[str, float | None]:
    """Losses as JSON values: infinity and NaN become null."""
    return {label: round_values(value) if math.isfinite(value) else None for label, value in loss.items()}


def loss_warnings(by_model: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """A warning for each model with a loss that is infinite or NaN."""
    for name, loss in by_model.items():
        if broken := [label for label, value in loss.items() if not math.isfinite(value) and label != MEAN]:
            what = "its weights or its arithmetic overflow"
            yield f"the loss of {name} on {', '.join(broken)} is not a finite number: {what}"


def gap_closed(merged: float, hidden: float, oracle: float) -> float | None:
    """The share of the gap between `hidden` and `oracle` that the merge closes; None if the gap is too small.

    A share of a gap that comes from rounding or a few texts is meaningless, and often far above 100%.
    """
    gap = hidden - oracle
    return (hidden - merged) / gap if gap >= SMALLEST_GAP else None


class RoutingCounts:
    """The choices of each layer's router for the tokens of each label; arrays are (labels, layers, experts)."""

    def __init__(self, labels: Sequence[str], own: Sequence[int], layers: Sequence[int], experts: int) -> None:
        """`own` is the number of the expert of each label, `layers` are those with experts."""
        self._labels, self._own = list(labels), np.array(own)
        self._places = {layer: place for place, layer in enumerate(layers)}
        shape = (len(labels), len(layers), experts)
        self._first, self._chosen, self._weight = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self._slots = np.zeros(shape[:2])
        self._tokens = np.zeros(shape[:2])

    def add(
        self, label: int, layer: int, experts_TK: npt.NDArray[np.int64], weights_TK: npt.NDArray[np.float32]
    ) -> None:
        """The experts chosen for some tokens of a label, highest score first, and their weights.

        If a token's state has overflowed, its weights are NaN and count as zero.
        """
        count, layer = self._first.shape[2], self._places[layer]
        weights_TK = np.nan_to_num(weights_TK, nan=0.0)
        self._first[label, layer] += np.bincount(experts_TK[:, 0], minlength=count)
        self._chosen[label, layer] += np.bincount(experts_TK.ravel(), minlength=count)
        self._weight[label, layer] += np.bincount(experts_TK.ravel(), weights_TK.ravel(), minlength=count)
        self._tokens[label, layer] += len(experts_TK)
        self._slots[label, layer] += experts_TK.size

    def shares(self) -> dict[str, Any]:
        """`routing` of eval.json."""
        tokens = np.maximum(self._tokens, 1)[..., None]
        first, chosen, weight = self._first / tokens, self._chosen / tokens, self._weight / tokens
        load = (self._chosen / np.maximum(self._slots, 1)[..., None]).mean(axis=0)
        first_accuracy, chosen_accuracy = self._accuracy(first), self._accuracy(chosen)
        return {
            "first_choice": self._by_label(first),
            "chosen": self._by_label(chosen),
            "weight": self._by_label(weight),
            "first_accuracy": round_values(first_accuracy),
            "chosen_accuracy": round_values(chosen_accuracy),
            "first_accuracy_mean": round_values(first_accuracy.mean()),
            "chosen_accuracy_mean": round_values(chosen_accuracy.mean()),
            "load": round_values(load),
            "load_entropy": round_values(_entropy(load)),
            "confusion": self._by_label(first.mean(axis=1)),
        }

    def _accuracy(self, shares: Float64) -> Float64:
        """(layers,): mean over labels of the share for the label's own expert."""
        own: Float64 = np.take_along_axis(shares, self._own[:, None, None], axis=2)[..., 0]
        mean: Float64 = own.mean(axis=0)
        return mean

    def _by_label(self, shares: Float64) -> dict[str, Any]:
        return {label: round_values(values) for label, values in zip(self._labels, shares, strict=True)}


def round_values(values: npt.ArrayLike) -> Any:
    """Values for JSON, rounded to six decimals: more than a few thousand tokens can resolve."""
    return np.round(np.asarray(values, dtype=np.float64), 6).tolist()


def _entropy(load: Float64) -> Float64:
    """(layers,): entropy of each layer's load over its largest value; 1 is even."""
    experts = load.shape[1]
    if experts == 1:
        return np.ones(len(load))
    terms = load * np.log(np.where(load > 0, load, 1.0))
    entropy: Float64 = -terms.sum(axis=1) / math.log(experts)
    return np.clip(entropy, 0.0, 1.0)
