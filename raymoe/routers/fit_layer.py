"""One layer's router out of what all experts' prompts left there, and how it does on prompts it was not made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raymoe.config.gate_modes import MODES
from raymoe.routers.activations import FOLDS, LayerActivations
from raymoe.routers.heldout_report import LayerScores, score_heldout
from raymoe.routers.router_math import expert_rows, shared_gate_row

__all__ = ["LayerRows", "fit_layer", "join_parts"]

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRows:
    """`experts` (experts, hidden); `shared` (hidden,) is the one gate of all shared experts, if they have prompts;
    `scores`: None where nothing could be held out."""

    experts: Float32
    shared: Float32 | None
    scores: LayerScores | None


def fit_layer(
    mode: str,
    experts: Sequence[LayerActivations],
    shared: Sequence[LayerActivations],
    device: str,
    heartbeat: Callable[[], None] | None = None,
) -> LayerRows:
    """The rows of one layer, in the members' order. Ridge regression is computed on `device`; `heartbeat` is called
    with each system of equations that is set up or solved."""
    if MODES[mode].is_fitted:
        return _fit(experts, shared, device, heartbeat)
    return LayerRows(
        experts=np.stack([_expert_row(member) for member in experts]),
        shared=shared_gate_row([_expert_row(member) for member in shared]) if shared else None,
        scores=_score_folds(experts),
    )


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
    """The states of each fold, scored by the rows of the others."""
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
    """bfloat16, as its bits: the upper half of the same number in float32. Given in float64, in which the order of a
    product's sums, which the number of threads decides, changes no first choice."""
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _fit(
    experts: Sequence[LayerActivations],
    shared: Sequence[LayerActivations],
    device: str,
    heartbeat: Callable[[], None] | None,
) -> LayerRows:
    import torch

    from raymoe.routers.ridge import Examples, fit_rows, fit_shared_gate

    def examples(member: LayerActivations) -> Examples:
        # Copied, since what comes out of Ray's store can't be written to, which torch wants of its tensors.
        states = torch.from_numpy(member.states.copy()).view(torch.bfloat16).to(device)
        prompts, negative = torch.from_numpy(member.prompts.copy()), torch.from_numpy(member.negative.copy())
        return Examples(states=states, prompts=prompts.to(device), negative=negative.to(device))

    given = [examples(member) for member in experts]
    fitted = fit_rows(given, heartbeat)
    gate = fit_shared_gate([examples(member) for member in shared], given, heartbeat) if shared else None
    return LayerRows(experts=fitted.rows, shared=gate, scores=fitted.scores)
