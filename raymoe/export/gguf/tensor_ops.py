"""What a tensor of the file has in another form than the model's: the order of rows and columns, and its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorOp:
    """Done to every `unit` rows of a matrix, in this order.

    `rows` of them are taken (all, where it is empty), columns are put in the order of `columns`, rows and columns
    change places if `transposed`, and `function` is done to each number.
    """

    unit: int = 1
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    transposed: bool = False
    function: Callable[[Float32], Float32] | None = None

    def __call__(self, rows: Float32) -> Float32:
        """Of (units * unit, columns), row after row of all units."""
        units = rows.reshape(-1, self.unit, rows.shape[1])
        if self.rows:
            units = units[:, list(self.rows)]
        if self.columns:
            units = units[:, :, list(self.columns)]
        if self.transposed:
            units = units.swapaxes(1, 2)
        changed: Float32 = units.reshape(-1, units.shape[2])
        return self.function(changed) if self.function else changed


IDENTITY = TensorOp()


def interleave_order(dimensions: int, before: int = 0) -> tuple[int, ...]:
    """The rows of a head of q or k in the order of a rotary embedding that turns neighbours.

    Rows i and i + dimensions / 2 become rows 2i and 2i + 1: the pairs that are turned together, and by which angle,
    stay the same. `before` of them are rows that are not turned.

    Source: ggml's GGML_ROPE_TYPE_NORMAL, and `rotate_half` of transformers' models/llama.
    """
    half = dimensions // 2
    turned = (before + i + side * half for i in range(half) for side in (0, 1))
    return (*range(before), *turned)


def plus_one(numbers: Float32) -> Float32:
    """Weights of a norm that multiplies by one plus them."""
    added: Float32 = numbers + np.float32(1)
    return added


def minus_exp(numbers: Float32) -> Float32:
    """The rate of decay of a state, of which checkpoints have the logarithm."""
    rates: Float32 = -np.exp(numbers)
    return rates
