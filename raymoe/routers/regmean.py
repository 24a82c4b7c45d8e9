"""Merges the matrices of attention by RegMean: the matrix whose outputs are closest to all experts' on their inputs.

For a matrix with the experts' versions W_i (rows, columns), weights w_i, and the inputs x (columns,) that it has in
expert i's own model, for the expert's prompts:

    W = argmin  sum_i w_i mean_x |W x - W_i x|^2  =  (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1        G_i = mean of x x^T

Off-diagonal elements of G_i are multiplied by `alpha` below 1, so that the sum has an inverse. Source: Jin et al. 2023,
"Dataless Knowledge Fusion by Merging Weights of Language Models", https://arxiv.org/abs/2212.09849 (there W is
transposed, and `alpha` is 0.9 in most experiments). Columns that are zero in all inputs get the experts' mean.

It is computed as W_1 + (sum_i w_i (W_i - W_1) G_i) (sum_i w_i G_i)^-1, in float64, expert by expert in the plan's order
and in blocks of fixed sizes. So equal experts give their own bits, and the bytes do not depend on what else is computed
at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from raymoe.errors import MergeFailed
from raymoe.planning.owner import Owner
from raymoe.planning.plan import Combination, MatrixMoments
from raymoe.routers.attention_inputs import LayerInputs
from raymoe.routers.regmean_memory import BLOCK
from raymoe.storage.combine import add_changes, weight_rows, with_scale
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transform import NUMPY_DTYPES, Float32, check_float16

MatrixBytes = dict[str, npt.NDArray[np.uint8]]
"""The merged matrices of a layer by the names of the base's tensors: (rows, bytes of a row in the output's dtype)."""
Heartbeat = Callable[[], None]


def merge_layer(
    matrices: Sequence[Combination],
    inputs: Mapping[Owner, LayerInputs],
    reader: SourceReader,
    device: str,
    heartbeat: Heartbeat | None = None,
) -> MatrixBytes:
    """Merge the matrices of one layer.

    Args:
        matrices: Their models, all with `moments`.
        inputs: The inputs of each expert's prompts at this layer.
        reader: Reads the models.
        device: Where torch computes.
        heartbeat: Called while the work makes progress.

    Returns:
        The merged matrices in the output's dtype.

    Raises:
        MergeFailed: If second moments have no inverse, or float16 can't hold the result.
    """
    found: MatrixBytes = {}
    for together in _by_inputs(matrices, inputs):
        found |= _merge_with_same_inputs(together, inputs, reader, torch.device(device), heartbeat or (lambda: None))
    return found


def _by_inputs(matrices: Sequence[Combination], inputs: Mapping[Owner, LayerInputs]) -> Iterator[list[Combination]]:
    """Groups of matrices with the same inputs and the same experts."""
    groups: dict[object, list[Combination]] = {}
    for matrix in matrices:
        moments = _moments(matrix)
        module = inputs[moments.experts[0]].module_of[moments.module]
        groups.setdefault((module, moments.experts, moments.alpha), []).append(matrix)
    yield from groups.values()


def _moments(matrix: Combination) -> MatrixMoments:
    assert matrix.moments is not None
    return matrix.moments


def _merge_with_same_inputs(
    matrices: Sequence[Combination],
    inputs: Mapping[Owner, LayerInputs],
    reader: SourceReader,
    device: torch.device,
    heartbeat: Heartbeat,
) -> MatrixBytes:
    moments, weights = _moments(matrices[0]), matrices[0].weights
    states = [_states(inputs[owner], moments.module) for owner in moments.experts]
    width = states[0].shape[1]
    total_XX = torch.zeros((width, width), dtype=torch.float64, device=device)
    is_unused = _unused_columns(states, device)
    changes = [torch.zeros((matrix.shape[0], width), dtype=torch.float64, device=device) for matrix in matrices]
    for number, (bits, weight) in enumerate(zip(states, weights, strict=True)):
        moments_XX = weight * _second_moments(bits, moments.alpha, is_unused, device, heartbeat)
        total_XX += moments_XX
        for matrix, change in zip(matrices, changes, strict=True):
            for rows in _blocks(matrix.shape[0]) if number else ():
                difference = _rows(reader, matrix, number, rows).astype(np.float64)
                difference -= _rows(reader, matrix, 0, rows)
                change[rows] += torch.from_numpy(difference).to(device) @ moments_XX
                heartbeat()
        del moments_XX
    factor_XX = _factorize(total_XX, moments)
    return {
        matrix.base.entry.name: _finish(reader, matrix, change, factor_XX, heartbeat)
        for matrix, change in zip(matrices, changes, strict=True)
    }


def _states(inputs: LayerInputs, module: str) -> npt.NDArray[np.int16]:
    return inputs.states[inputs.module_of[module]]


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, BLOCK):
        yield slice(start, min(start + BLOCK, count))


def _rows(reader: SourceReader, matrix: Combination, number: int, rows: slice) -> Float32:
    return weight_rows(reader, matrix.experts[number], rows)


def _chunks(bits: npt.NDArray[np.int16], device: torch.device) -> Iterator[torch.Tensor]:
    """The inputs of some tokens at a time, in float64."""
    for tokens in _blocks(len(bits)):
        # Copied, since arrays from Ray's object store are read-only, and torch expects writable ones.
        yield torch.from_numpy(bits[tokens].copy()).view(torch.bfloat16).to(device).double()


def _unused_columns(states: Sequence[npt.NDArray[np.int16]], device: torch.device) -> torch.Tensor:
    """Which columns are zero in all inputs, (columns,) bool."""
    is_used = torch.zeros(states[0].shape[1], dtype=torch.bool, device=device)
    for bits in states:
        for chunk in _chunks(bits, device):
            is_used |= (chunk != 0).any(0)
    return ~is_used


def _second_moments(
    bits: npt.NDArray[np.int16], alpha: float, is_unused: torch.Tensor, device: torch.device, heartbeat: Heartbeat
) -> torch.Tensor:
    """The mean of x x^T, (columns, columns), with its off-diagonal elements times `alpha`. Unused columns have 1 on the
    diagonal."""
    width = bits.shape[1]
    sum_XX = torch.zeros((width, width), dtype=torch.float64, device=device)
    for chunk in _chunks(bits, device):
        sum_XX.addmm_(chunk.T, chunk)
        heartbeat()
    sum_XX /= len(bits)
    diagonal = sum_XX.diagonal().clone()
    sum_XX *= alpha
    sum_XX.diagonal().copy_(torch.where(is_unused, torch.ones_like(diagonal), diagonal))
    return sum_XX


def _factorize(total_XX: torch.Tensor, moments: MatrixMoments) -> torch.Tensor:
    """The Cholesky factor of the summed second moments."""
    factor_XX, failed = torch.linalg.cholesky_ex(total_XX)
    # What is left of a column beside those before it, as a share of it. Rounding may leave some of a singular matrix.
    left = factor_XX.diagonal().square() / total_XX.diagonal()
    if int(failed) or left.min() <= len(total_XX) * torch.finfo(total_XX.dtype).eps:
        raise MergeFailed(
            f"backbone: the second moments of the inputs of {moments.module} in layer {moments.layer} have no inverse, "
            f"with alpha {moments.alpha:g}. Use a smaller alpha, or give the experts more prompts"
        )
    return factor_XX


def _finish(
    reader: SourceReader, matrix: Combination, change: torch.Tensor, factor_XX: torch.Tensor, heartbeat: Heartbeat
) -> npt.NDArray[np.uint8]:
    """The merged matrix from the sum of its weighted changes, (rows, columns), in the output's dtype."""
    dtype = np.dtype(NUMPY_DTYPES[matrix.dtype])
    merged = np.empty(matrix.shape, dtype)
    for rows in _blocks(matrix.shape[0]):
        solved = torch.cholesky_solve(change[rows].T, factor_XX).T
        block = add_changes(_rows(reader, matrix, 0, rows), np.ascontiguousarray(solved.float().cpu().numpy()))
        if matrix.scale != 1.0:
            block = with_scale(weight_rows(reader, matrix.base, rows), block, matrix.scale)
        with np.errstate(over="ignore", invalid="ignore"):
            merged[rows] = block.astype(dtype)
        check_float16(matrix.base.entry.name, block, merged[rows])
        heartbeat()
    return merged.view(np.uint8)
