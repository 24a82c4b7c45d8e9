"""Which experts the layers' routers chose for the tokens of one prompt and its answer. numpy only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from raymoe.evaluation.metrics import Float64, round_values


class TokenRouting:
    """Per token and expert: first choices and router weight, summed over layers."""

    def __init__(self, experts: int, first_layer: int = 0) -> None:
        """`first_layer`: the first layer with experts."""
        self._first_layer = first_layer
        self._first: Float64 = np.zeros((0, experts))
        self._weight: Float64 = np.zeros((0, experts))

    def add(self, layer: int, experts_TK: npt.NDArray[np.int64], weights_TK: npt.NDArray[np.float32]) -> None:
        """Add a layer's choices for the tokens of one step, highest score first. Steps begin with the first layer."""
        tokens, experts = len(experts_TK), self._first.shape[1]
        if layer == self._first_layer:
            self._first = np.concatenate([self._first, np.zeros((tokens, experts))])
            self._weight = np.concatenate([self._weight, np.zeros((tokens, experts))])
        rows = np.arange(len(self._first) - tokens, len(self._first))
        self._first[rows, experts_TK[:, 0]] += 1
        weights_TK = np.nan_to_num(weights_TK, nan=0.0)  # for states that have overflowed
        np.add.at(self._weight, (rows[:, None], experts_TK), weights_TK)

    def shares(self, skipped: int) -> tuple[list[float], list[float]]:
        """Per expert: the share of first choices and of router weight, over all tokens after the `skipped` first
        ones."""
        first, weight = (sums[skipped:].sum(axis=0, keepdims=True) for sums in (self._first, self._weight))
        return _shares(first)[0], _shares(weight)[0]

    def shares_per_token(self, skipped: int) -> list[tuple[list[float], list[float]]]:
        """The same for each token."""
        return list(zip(_shares(self._first[skipped:]), _shares(self._weight[skipped:]), strict=True))


def _shares(sums: Float64) -> list[list[float]]:
    """Rows that sum to one, or to zero if nothing was counted."""
    totals = sums.sum(axis=1, keepdims=True)
    shares: list[list[float]] = round_values(np.divide(sums, totals, out=np.zeros_like(sums), where=totals > 0))
    return shares
