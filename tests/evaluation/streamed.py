"""Log-likelihoods of pico models: streamed by raymoe, and by transformers with the whole model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raymoe.checkpoints.weight_table import CheckpointModel, dense_model, mixture_model
from raymoe.config.model_refs import parse_model_ref
from raymoe.evaluation.scoring import Variant, log_likelihoods
from raymoe.sources.hub import HubOptions
from raymoe.sources.resolve import resolve_model
from raymoe.storage.source_reader import SourceReader

LENGTHS = (2, 31, 17, 5, 40, 17)


def texts_of(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = np.random.default_rng(5)
    return [generator.integers(3, 400, length).tolist() for length in lengths]


def open_dense(place: Path | str) -> CheckpointModel:
    return dense_model(resolve_model(parse_model_ref(str(place))), "model")


def open_mixture(folder: Path) -> CheckpointModel:
    return mixture_model(resolve_model(parse_model_ref(str(folder))))


def streamed(model: CheckpointModel, texts: Sequence[Sequence[int]], *variants: Variant) -> dict[str, list[Any]]:
    with SourceReader(HubOptions()) as reader:
        return log_likelihoods(model, texts, variants or [Variant(name="own")], reader, "cpu")


def resident(model: Any, texts: Sequence[Sequence[int]]) -> list[Any]:
    """Each text alone through a transformers model, float32."""
    found = []
    for text in texts:
        ids = torch.tensor([text])
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[0, :-1].float()
        found.append(logits.log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0].numpy())
    return found


def assert_close(found: Sequence[Any], expected: Sequence[Any], tolerance: float = 1e-5) -> None:
    assert [len(values) for values in found] == [len(values) for values in expected]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
