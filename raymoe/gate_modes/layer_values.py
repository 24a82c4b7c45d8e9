"""What is captured of prompts at a layer, and what a mode makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FOLDS = 5
"""Prompt n of a member is in fold n % FOLDS, counted in the order in which batches hold them."""

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerActivations:
    """One member's prompts at one layer.

    `states` (tokens, hidden) are bfloat16 as int16 (numpy has no bfloat16), `prompts` (tokens,) the number of the
    prompt that each token is of, `negative` (tokens,) whether that is a negative one. No tokens: nothing was kept here.
    `sums` (FOLDS, hidden), `counts` (FOLDS,) and `negative_mean` (hidden,) belong to the modes that sum. Of a member
    that is read in parts, each part has one of these: its own states, sums and counts, its share of the mean.
    """

    states: npt.NDArray[np.int16]
    prompts: npt.NDArray[np.int64]
    negative: npt.NDArray[np.bool_]
    sums: Float64 | None = None
    counts: npt.NDArray[np.int64] | None = None
    negative_mean: Float64 | None = None


def join_parts(parts: Sequence[LayerActivations]) -> LayerActivations:
    """One member's prompts at a layer, out of the parts that they were read in, in their order."""
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
    """One layer on held-out prompts: by expert the share of its tokens that it gets, and its share of all tokens."""

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
    """The check of a layer from its held-out tokens: their prompts' experts and their first choices, both (tokens,)."""
    shares = np.zeros((experts, experts))  # of the tokens of expert i, those that get expert j first
    np.add.at(shares, (labels, first), 1)
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1)
    right, load = tuple(shares.diagonal().tolist()), tuple(shares.mean(axis=0).tolist())
    return LayerScores(accuracy_by_expert=right, load=load, ridge=ridge, scale=scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRows:
    """`experts` (experts, hidden); `shared` (hidden,) is the one gate of all shared experts, if they have prompts;
    `scores`: None where nothing could be held out."""

    experts: npt.NDArray[np.float32]
    shared: npt.NDArray[np.float32] | None
    scores: LayerScores | None
