"""A regularized least-squares classifier for each layer, on the exact inputs of its router: gate mode `ridge`.

For the tokens of all experts' prompts, with `x` the state (hidden,) that the layer's router sees, `t` one-hot of the
prompt's expert minus 1 / experts, and token weights `w` that give every expert the same total:

    W = argmin  sum_n w_n |W x_n - t_n|^2 + lambda s |W|^2        s = mean diagonal of sum_n w_n x_n x_n^T

`lambda` is the one with the least squared error on held-out *prompts* (never tokens of one prompt on both sides), and
the rows are `W` times the factor that makes the softmax over their scores most likely on the same held-out prompts: the
routing weights are then neither flat nor saturated. Tokens of an expert's negative prompts have the target 'any of the
others'. Everything is summed in float64; of the two forms of ridge regression (hidden x hidden, or the dual, tokens x
tokens) the smaller is solved. Torch computes on the device of the states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from raymoe.gate_modes.layer_values import FOLDS, LayerActivations, LayerRows, LayerScores, score_heldout
from raymoe.gate_modes.least_squares_memory import CHOICE_SIZE, CHUNK

_RIDGES = tuple(10.0**exponent for exponent in (-5, -4, -3, -2.5, -2, -1.5, -1, -0.5, 0))
_RIDGE_WITHOUT_FOLDS, _SCALE_WITHOUT_FOLDS = 0.1, 8.0
_SCALES = tuple(2.0 ** (step / 2) for step in range(13))  # 1 to 64
_BLOCK = 1024

Heartbeat = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """One expert's training examples for the classifier of one layer.

    `states` (tokens, hidden) in any float dtype, on the device to compute on; `prompts` (tokens,) int64 is the number
    of each token's prompt; `negative` (tokens,) bool marks those of negative prompts, which are numbered apart.
    """

    states: torch.Tensor
    prompts: torch.Tensor
    negative: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedRows:
    """Rows (experts, hidden) float32 of one layer's router, and its scores on held-out prompts (None: too few)."""

    rows: npt.NDArray[np.float32]
    scores: LayerScores | None


def fit_activations(
    experts: Sequence[LayerActivations],
    shared: Sequence[LayerActivations],
    device: str,
    heartbeat: Heartbeat | None = None,
) -> LayerRows:
    """The rows of one layer, computed on `device` from the activations of the experts' prompts."""

    def examples(member: LayerActivations) -> Examples:
        # Copied, since arrays from Ray's object store are read-only, and torch expects writable ones.
        states = torch.from_numpy(member.states.copy()).view(torch.bfloat16).to(device)
        prompts, negative = torch.from_numpy(member.prompts.copy()), torch.from_numpy(member.negative.copy())
        return Examples(states=states, prompts=prompts.to(device), negative=negative.to(device))

    given = [examples(member) for member in experts]
    fitted = fit_rows(given, heartbeat)
    gate = fit_shared_gate([examples(member) for member in shared], given, heartbeat) if shared else None
    return LayerRows(experts=fitted.rows, shared=gate, scores=fitted.scores)


def fit_rows(examples: Sequence[Examples], heartbeat: Heartbeat | None = None) -> FittedRows:
    """The router of one layer; `examples` has one entry per expert, in their order. `heartbeat` is called with each
    chunk of tokens that is summed, and each system that is solved."""
    if len(examples) == 1:  # one expert gets every token whatever its score
        return FittedRows(rows=np.zeros((1, examples[0].states.shape[1]), np.float32), scores=None)
    problem = _RidgeProblem(examples, heartbeat or (lambda: None))
    sample = problem.sample()
    if sample.has_folds(experts=len(examples)):
        ridge, scale, check = _choose(sample)
    else:
        ridge, scale, check = _RIDGE_WITHOUT_FOLDS, _SCALE_WITHOUT_FOLDS, None
    rows = (_solve(problem, ridge) * scale).T
    return FittedRows(rows=rows.float().cpu().numpy(), scores=check)


def fit_shared_gate(
    shared: Sequence[Examples], others: Sequence[Examples], heartbeat: Heartbeat | None = None
) -> npt.NDArray[np.float32]:
    """The gate (hidden,) of all shared experts, a sigmoid: open on their prompts, closed on their negative ones and on
    the experts' prompts."""
    own = _concatenate(shared)
    rest = Examples(
        states=torch.cat([own.states[own.negative], *(e.states[~e.negative] for e in others)]),
        prompts=torch.cat([own.prompts[own.negative], *(e.prompts[~e.negative] for e in others)]),
        negative=torch.zeros(
            int(own.negative.sum()) + sum(int((~e.negative).sum()) for e in others),
            dtype=torch.bool,
            device=own.states.device,
        ),
    )
    positive = Examples(
        states=own.states[~own.negative], prompts=own.prompts[~own.negative], negative=own.negative[~own.negative]
    )
    rows = fit_rows([positive, rest], heartbeat).rows
    difference: npt.NDArray[np.float32] = rows[0] - rows[1]
    return difference


def _concatenate(examples: Sequence[Examples]) -> Examples:
    return Examples(
        states=torch.cat([e.states for e in examples]),
        prompts=torch.cat([e.prompts for e in examples]),
        negative=torch.cat([e.negative for e in examples]),
    )


class _RidgeProblem:
    """All examples of a layer, concatenated: states (N, hidden), targets (N, experts), weights (N,), folds to be
    cut."""

    def __init__(self, examples: Sequence[Examples], heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat
        device, experts = examples[0].states.device, len(examples)
        self.states = torch.cat([e.states for e in examples])
        self.prompts = torch.cat([e.prompts for e in examples])
        self.negative = torch.cat([e.negative for e in examples])
        counts = torch.tensor([len(e.prompts) for e in examples], device=device)
        self.labels = torch.repeat_interleave(torch.arange(experts, device=device), counts)
        one_hot = torch.nn.functional.one_hot(self.labels, experts).double()
        anything_else = (1 - one_hot) / (experts - 1)
        self.targets = torch.where(self.negative[:, None], anything_else, one_hot) - 1 / experts
        self.weights = torch.zeros(len(self.labels), dtype=torch.float64, device=device)
        for expert in range(experts):
            positive = (self.labels == expert) & ~self.negative
            count = int(positive.sum())
            self.weights[positive] = 1 / (experts * count)
            negative = (self.labels == expert) & self.negative
            # A negative token weighs as much as a positive one, but all of them no more than all positive ones.
            self.weights[negative] = 1 / (experts * max(count, int(negative.sum())))

    def subset(self, chosen: torch.Tensor) -> _RidgeProblem:
        part = object.__new__(_RidgeProblem)
        part.heartbeat = self.heartbeat
        for name in ("states", "prompts", "negative", "labels", "targets", "weights"):
            setattr(part, name, getattr(self, name)[chosen])
        return part

    def sample(self) -> _RidgeProblem:
        """The tokens that lambda is chosen with: every n-th one if hidden and tokens both exceed CHOICE_SIZE."""
        tokens, hidden = self.states.shape
        if min(tokens, hidden) <= CHOICE_SIZE:
            return self
        return self.subset(torch.arange(0, tokens, -(-tokens // CHOICE_SIZE), device=self.states.device))

    def has_folds(self, *, experts: int) -> bool:
        """Whether every expert has positive prompts outside of each fold."""
        held = [(self.prompts[(self.labels == n) & ~self.negative] % FOLDS).unique() for n in range(experts)]
        return all(len(folds) > 1 for folds in held)

    def weighted_states(self, start: int, end: int) -> torch.Tensor:
        """Rows [start, end) of the states, each times the square root of its weight; float64."""
        return self.states[start:end].double() * self.weights[start:end, None].sqrt()

    def weighted_targets(self) -> torch.Tensor:
        return self.targets * self.weights[:, None].sqrt()


def _solve(problem: _RidgeProblem, ridge: float) -> torch.Tensor:
    """W^T, (hidden, experts)."""
    tokens, hidden = problem.states.shape
    if tokens < hidden:
        weighted = problem.weighted_states(0, tokens)
        kernel = weighted @ weighted.T
        _add_ridge(kernel, ridge, float(kernel.diagonal().sum()) / hidden)
        return weighted.T @ torch.cholesky_solve(problem.weighted_targets(), torch.linalg.cholesky(kernel))
    gram, right = _gram(problem)
    _add_ridge(gram, ridge, float(gram.diagonal().mean()))
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))


def _add_ridge(matrix: torch.Tensor, ridge: float, scale: float) -> None:
    # If all states are zero, their scale is undefined; any number works.
    matrix.diagonal().add_(ridge * scale if scale > 0 else 1.0)


def _gram(problem: _RidgeProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted states^T states (hidden, hidden) and states^T targets, in chunks: never all states in float64."""
    (tokens, hidden), targets = problem.states.shape, problem.weighted_targets()
    options = {"dtype": torch.float64, "device": problem.states.device}
    gram, right = torch.zeros((hidden, hidden), **options), torch.zeros((hidden, targets.shape[1]), **options)
    for start in range(0, tokens, CHUNK):
        end = min(start + CHUNK, tokens)
        weighted = problem.weighted_states(start, end)
        right += weighted.T @ targets[start:end]
        for at in range(0, hidden, _BLOCK):  # only the upper triangle: the matrix is symmetric
            gram[at : at + _BLOCK, at:] += weighted[:, at : at + _BLOCK].T @ weighted[:, at:]
        problem.heartbeat()
    return gram.triu() + gram.triu(1).T, right


def _choose(problem: _RidgeProblem) -> tuple[float, float, LayerScores]:
    """Lambda, the rows' scale, and the router's scores on held-out prompts."""
    held_out = _held_out_scores(problem)
    errors = [float((((scores - problem.targets) ** 2).sum(dim=1) * problem.weights).sum()) for scores in held_out]
    best = min(range(len(errors)), key=lambda number: errors[number])
    positive = ~problem.negative
    scores, labels, weights = held_out[best][positive], problem.labels[positive], problem.weights[positive]
    scale = min(_SCALES, key=lambda factor: _cross_entropy(scores * factor, labels, weights))
    first = scores.argmax(dim=1).cpu().numpy()
    check = score_heldout(labels.cpu().numpy(), first, scores.shape[1], ridge=_RIDGES[best], scale=scale)
    return _RIDGES[best], scale, check


def _held_out_scores(problem: _RidgeProblem) -> list[torch.Tensor]:
    """For each lambda, each token's scores (tokens, experts) from the fit without its fold."""
    tokens, hidden = problem.states.shape
    scores = [torch.empty_like(problem.targets) for _ in _RIDGES]
    for fold in (_dual_folds if tokens < hidden else _primal_folds)(problem):
        for ridge, into in zip(_RIDGES, scores, strict=True):
            matrix = fold.system.clone()
            _add_ridge(matrix, ridge, fold.scale)
            into[fold.held_out] = fold.features @ torch.cholesky_solve(fold.right, torch.linalg.cholesky(matrix))
            problem.heartbeat()
    return scores


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fold:
    """The system to solve without a fold, and the factor that turns its solution into scores of the tokens in
    `held_out`."""

    held_out: torch.Tensor
    system: torch.Tensor
    right: torch.Tensor
    features: torch.Tensor
    scale: float


def _primal_folds(problem: _RidgeProblem) -> Iterator[_Fold]:
    whole, right = _gram(problem)
    scale = float(whole.diagonal().mean())
    for number in range(FOLDS):
        outside = (problem.prompts % FOLDS == number).nonzero()[:, 0]
        part = problem.subset(outside)
        gram, part_right = _gram(part)
        yield _Fold(
            held_out=outside, system=whole - gram, right=right - part_right, features=part.states.double(), scale=scale
        )


def _dual_folds(problem: _RidgeProblem) -> Iterator[_Fold]:
    tokens, hidden = problem.states.shape
    weighted, targets = problem.weighted_states(0, tokens), problem.weighted_targets()
    kernel = weighted @ weighted.T
    scale = float(kernel.diagonal().sum()) / hidden
    for number in range(FOLDS):
        held_out = problem.prompts % FOLDS == number
        fit_tokens, held_out_tokens = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
        yield _Fold(
            held_out=held_out_tokens,
            system=kernel[fit_tokens][:, fit_tokens],
            right=targets[fit_tokens],
            features=kernel[held_out_tokens][:, fit_tokens] / problem.weights[held_out_tokens, None].sqrt(),
            scale=scale,
        )


def _cross_entropy(scores: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> float:
    """Mean cross-entropy of the softmax over all experts, in nats."""
    likely = torch.log_softmax(scores, dim=1).gather(1, labels[:, None])[:, 0]
    return float(-(likely * weights).sum() / weights.sum())
