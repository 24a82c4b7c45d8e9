"""Runs models over the same texts, one after another, and adds what is done to the progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from raymoe.checkpoints.weight_table import CheckpointModel
from raymoe.evaluation.scoring import Variant, log_likelihoods, pass_work
from raymoe.progress_line import ProgressLine
from raymoe.storage.source_reader import SourceReader

Ids = Sequence[Sequence[int]]
Values = dict[str, list[npt.NDArray[np.float32]]]
"""Log-likelihoods of each text's tokens, by name of the model or routing."""


class Passes:
    """One pass over the layers of a model per call. `ids` are the tokens of all texts."""

    def __init__(self, ids: Ids, device: str, reader: SourceReader, progress: ProgressLine) -> None:
        self._ids, self._device, self._reader, self._progress = ids, device, reader, progress

    def run(self, model: CheckpointModel, variants: Sequence[Variant]) -> Values:
        """Log-likelihoods of a model in several ways of routing."""
        names = ", ".join(each.name for each in variants)
        self._progress.stage(f"texts read by {names}", pass_work(model, self._ids, len(variants)))
        return log_likelihoods(model, self._ids, variants, self._reader, self._device, work_done=self._progress.add)

    def run_all(self, models: Mapping[str, CheckpointModel]) -> Values:
        """Log-likelihoods of several models. Equal models are run once."""
        by_label = {
            label: self.run(model, [Variant(name=name)])[name]
            for label, (name, model) in _distinct_models(models).items()
        }
        return {name: by_label[model.label] for name, model in models.items()}


def models_work(models: Mapping[str, CheckpointModel], ids: Ids) -> int:
    """The work of `Passes.run_all`, in tokens x layers."""
    return sum(pass_work(model, ids, 1) for _, model in _distinct_models(models).values())


def _distinct_models(models: Mapping[str, CheckpointModel]) -> dict[str, tuple[str, CheckpointModel]]:
    """The distinct models by label, with the first of their names."""
    found: dict[str, tuple[str, CheckpointModel]] = {}
    for name, model in models.items():
        found.setdefault(model.label, (name, model))
    return found
