"""Merges the backbone by what prompts give, in this process, one expert after the other, without Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
import numpy.typing as npt

from raymoe.planning.owner import Owner
from raymoe.planning.plan import MomentPlan
from raymoe.routers.activations import LayerDone
from raymoe.routers.attention_inputs import LayerInputs, capture_inputs, join_inputs
from raymoe.routers.prompt_passes import plan_readings
from raymoe.storage.source_reader import SourceReader


class FiledMatrices:
    """Merged matrices in an unlinked temporary file, so that memory does not grow with the model."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._end = file, 0
        self._places: dict[tuple[int, str], tuple[int, tuple[int, ...]]] = {}

    def add(self, layer: int, name: str, matrix: npt.NDArray[np.uint8]) -> None:
        """Write a matrix to the file."""
        self._file.seek(self._end)
        self._file.write(np.ascontiguousarray(matrix).data)
        self._file.flush()
        self._places[layer, name] = self._end, matrix.shape
        self._end += matrix.nbytes

    def rows_of(self, layer: int, name: str) -> npt.NDArray[np.uint8]:
        """As `MergedMatrices.rows_of`."""
        start, shape = self._places[layer, name]
        return np.memmap(self._file, np.uint8, "r", start, shape)


@contextmanager
def merged_locally(
    plan: MomentPlan | None,
    reader: SourceReader,
    *,
    device: str,
    trust_remote_code: bool = False,
    layer_done: LayerDone | None = None,
    on_begin: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Merge the matrices of `plan`, if there is one, and give them to `reader` for the time of the context.

    `on_begin` is called with each next step. Raises the errors of `capture_inputs` and `merge_layer`.
    """
    if plan is None:
        yield
        return
    with tempfile.TemporaryFile() as file:
        reader.matrices = _merge(plan, reader, FiledMatrices(file), device, trust_remote_code, layer_done, on_begin)
        try:
            yield
        finally:
            reader.matrices = None


def _merge(
    plan: MomentPlan,
    reader: SourceReader,
    found: FiledMatrices,
    device: str,
    trust_remote_code: bool,
    layer_done: LayerDone | None,
    on_begin: Callable[[str], None] | None,
) -> FiledMatrices:
    import torch

    from raymoe.compute import limit_threads
    from raymoe.routers.regmean import merge_layer

    passes, threads = plan_readings(plan.experts, 1, plan.hidden), torch.get_num_threads()
    inputs: list[dict[Owner, list[LayerInputs]]] = [{} for _ in range(plan.layers)]
    for taken in passes:
        if on_begin is not None:
            on_begin(f"reading the prompts of {', '.join(part.name for part in taken)} for the backbone")
        layers = capture_inputs(
            plan,
            taken,
            reader,
            members=len(plan.experts),
            device=device,
            trust_remote_code=trust_remote_code,
            layer_done=layer_done,
        )
        for layer, captured in enumerate(layers):
            for part, each in zip(taken, captured, strict=True):
                inputs[layer].setdefault(part.owner, []).append(each)
            if taken is not passes[-1]:
                continue
            joined = {owner: join_inputs(parts) for owner, parts in inputs[layer].items()}
            inputs[layer].clear()
            limit_threads(1)  # as in an actor
            for name, matrix in merge_layer(plan.matrices[layer], joined, reader, device).items():
                found.add(layer, name, matrix)
            limit_threads(threads)
    return found
