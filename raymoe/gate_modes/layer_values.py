"""The activations that are captured at a layer, and the rows that a mode fits to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FOLDS = 5
"""Prompt n of an expert is in fold n % FOLDS, counted in the order of batches."""

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerActivations:
    """The activations of one expert's prompts at one layer.

    `states` (tokens, hidden) are bfloat16 as int16 (numpy has no bfloat16), `prompts` (tokens,) is the number of each
    token's prompt, `negative` (tokens,) whether that prompt is negative. No tokens: no states were kept. `sums` (FOLDS,
    hidden), `counts` (FOLDS,) and `negative_mean` (hidden,) are for the modes that sum. If an expert's prompts are read
    in parts, each part has its own states, sums and counts, and its share of the mean.
    """

    states: npt.NDArray[np.int16]
    prompts: npt.NDArray[np.int64]
    negative: npt.NDArray[np.bool_]
    sums: Float64 | None = None
    counts: npt.NDArray[np.int64] | None = None
    negative_mean: Float64 | None = None


def join_parts(parts: Sequence[LayerActivations]) -> LayerActivations:
    """The activations of one expert's prompts at a layer, joined from their parts in order."""
    if len(parts) == 1:
        return parts[0]
    sums = [part.sums for part in parts if part.sums is not None]
    counts = [part.counts for part in parts if part.counts is not None]
    means = [part.negative_mean for part in parts if part.negative_mean is not None]
    return LayerActivations(
        states=np.concatenate([part.states for part in parts]),
        prompts=np.concatenate([part.prompts for part in parts]),
        negative=np.concatenate([part.negative for part in parts]),
        sums=np.sum(sums, axis=0) if sums else None,
        counts=np.sum(counts, axis=0) if counts else None,
        negative_mean=np.sum(means, axis=0) if means else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScores:
    """One layer on held-out prompts: per expert, the share of its own tokens that it gets first, and its share of all
    tokens."""

    accuracy_by_expert: tuple[float, ...]
    load: tuple[float, ...]
    ridge: float | None = None
    scale: float | None = None

    @property
    def accuracy(self) -> float:
        return sum(self.accuracy_by_expert) / len(self.accuracy_by_expert)


def score_heldout(
    labels: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    experts: int,
    *,
    ridge: float | None = None,
    scale: float | None = None,
) -> LayerScores:
    """Score a layer on held-out tokens: the experts of their prompts and their first choices, both (tokens,)."""
    shares = np.zeros((experts, experts))  # share of expert i's tokens that are routed to expert j first
    np.add.at(shares, (labels, first), 1)
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1)
    right, load = tuple(shares.diagonal().tolist()), tuple(shares.mean(axis=0).tolist())
    return LayerScores(accuracy_by_expert=right, load=load, ridge=ridge, scale=scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRows:
    """`experts` (experts, hidden); `shared` (hidden,) is the one gate of all shared experts, if they have prompts;
    `scores`: None if nothing could be held out."""

    experts: npt.NDArray[np.float32]
    shared: npt.NDArray[np.float32] | None
    scores: LayerScores | None
