"""Rows that are directions: differences at unit length, and those of mean prompt vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raymoe.gate_modes.layer_values import FOLDS, LayerActivations, LayerRows, LayerScores, score_heldout

Float32 = npt.NDArray[np.float32]


def normalize(vectors: npt.ArrayLike) -> Float32:
    """Each vector (last axis) at unit length; a zero vector stays zero."""
    array = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(array, axis=-1, keepdims=True)
    units: Float32 = (array / np.maximum(norms, 1e-8)).astype(np.float32)
    return units


def expert_rows(positive: Float32, negative: Float32 | None) -> Float32:
    """Router rows of one expert, (layers, hidden), each at unit length."""
    return normalize(positive if negative is None else positive.astype(np.float64) - negative)


def shared_gate_row(rows: Sequence[Float32]) -> Float32:
    """The one gate (hidden,) of all shared experts, from one row per shared expert, with equal weights.

    MoE architectures have one gate for all shared experts.
    """
    return rows[0] if len(rows) == 1 else normalize(np.sum(rows, axis=0, dtype=np.float64))


def mean_directions(experts: Sequence[LayerActivations], shared: Sequence[LayerActivations]) -> LayerRows:
    """The rows of one layer from the sums of prompt vectors; each fold is scored with rows of the other folds."""
    return LayerRows(
        experts=np.stack([_expert_row(member) for member in experts]),
        shared=shared_gate_row([_expert_row(member) for member in shared]) if shared else None,
        scores=_score_folds(experts),
    )


def _mean(member: LayerActivations, without: int | None = None) -> npt.NDArray[np.float32]:
    """Mean over the prompts of all folds but one, (hidden,)."""
    assert member.sums is not None and member.counts is not None
    folds = [fold for fold in range(FOLDS) if fold != without]
    mean: Float32 = (member.sums[folds].sum(axis=0) / member.counts[folds].sum()).astype(np.float32)
    return mean


def _expert_row(member: LayerActivations, without: int | None = None) -> Float32:
    negative = None if member.negative_mean is None else member.negative_mean.astype(np.float32)
    return expert_rows(_mean(member, without), negative)


def _score_folds(experts: Sequence[LayerActivations]) -> LayerScores | None:
    """The states of each fold, scored with rows of the other folds."""
    if len(experts) < 2 or any(len(e.prompts) == 0 or e.counts is None or e.counts.sum() < 2 for e in experts):
        return None
    labels, first = [], []
    for fold in range(FOLDS):
        rows = np.stack([_expert_row(member, fold) for member in experts])
        for number, member in enumerate(experts):
            outside = (member.prompts % FOLDS == fold) & ~member.negative
            first.append((_bfloat16_to_float64(member.states[outside]) @ rows.T).argmax(axis=1))
            labels.append(np.full(len(first[-1]), number))
    return score_heldout(np.concatenate(labels), np.concatenate(first), len(experts))


def _bfloat16_to_float64(bits: npt.NDArray[np.int16]) -> npt.NDArray[np.float64]:
    """Convert the bits of bfloat16, which are the upper half of the same number in float32. In float64, the order of
    sums in a product, which depends on the number of threads, changes no first choice."""
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
