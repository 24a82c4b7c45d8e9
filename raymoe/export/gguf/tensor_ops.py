"""Operations that convert a tensor of the model for the file: they reorder rows and columns, and change numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorOp:
    """A sequence of operations on each block of `unit` rows of a matrix.

    First `rows` selects rows (all, if it is empty), then columns are put in the order of `columns`, the block is
    transposed if `transposed`, and `function` is applied to each number.
    """

    unit: int = 1
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    transposed: bool = False
    function: Callable[[Float32], Float32] | None = None

    def __call__(self, rows: Float32) -> Float32:
        """Apply the operation to (units * unit, columns); the results of all units are concatenated."""
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
    """The rows of a head of q or k in the order of an interleaved RoPE.

    Rows i and i + dimensions / 2 become rows 2i and 2i + 1, so that each pair is still rotated together, by the same
    angle. The first `before` rows are not rotated.

    Source: ggml's GGML_ROPE_TYPE_NORMAL, and `rotate_half` of transformers' models/llama.
    """
    half = dimensions // 2
    turned = (before + i + side * half for i in range(half) for side in (0, 1))
    return (*range(before), *turned)


def plus_one(numbers: Float32) -> Float32:
    """Weights of a norm that multiplies by 1 + weight, plus one."""
    added: Float32 = numbers + np.float32(1)
    return added


def minus_exp(numbers: Float32) -> Float32:
    """The decay rate of a state; checkpoints store its logarithm."""
    rates: Float32 = -np.exp(numbers)
    return rates
