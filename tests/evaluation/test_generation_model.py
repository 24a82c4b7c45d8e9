"""What `raymoe try` generates, against transformers with the same checkpoint: every MoE architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raymoe.evaluation.generation_model import GenerationModel
from raymoe.evaluation.options import GenerationOptions
from raymoe.evaluation.token_routing import TokenRouting
from raymoe.sources.hub import HubOptions
from raymoe.storage.source_reader import SourceReader
from tests.architectures.pairs import PAIRS, Mixture, Pair, load_merged
from tests.evaluation.streamed import open_mixture
from tests.pico import LAYERS, token_ids

pytestmark = pytest.mark.engines

NEW, EXPERTS = 6, 3
# Layers are read again for each token in the same way whatever the family is.
STREAMED = [pair for number, pair in enumerate(PAIRS) if pair.host not in {before.host for before in PAIRS[:number]}]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_tokens_are_those_of_transformers(pair: Pair, mixture: Callable[..., Mixture]) -> None:
    """Greedily, resident and, for each architecture, streamed. The experts of each token are the same both ways."""
    pair.skip_where_unknown()
    folder = mixture(pair).folder
    ids = token_ids(20)
    expected = _greedy_tokens(load_merged(folder), ids)
    routings = []
    for resident in (True, False) if pair in STREAMED else (True,):
        tokens, routing = _generated(folder, ids[0].tolist(), resident=resident)
        assert tokens == expected
        routings.append(routing)
    first, weight = routings[0].shares(0)
    assert all(routing.shares(0) == (first, weight) for routing in routings)
    assert np.isclose(sum(first), 1) and np.isclose(sum(weight), 1)
    assert len(routings[0].shares_per_token(0)) == 20 + NEW - 1


def _greedy_tokens(model: Any, ids: torch.Tensor) -> list[int]:
    """Without a cache: some of the published modeling code has none that transformers still knows."""
    for _ in range(NEW):
        with torch.inference_mode():
            best = model(ids, use_cache=False).logits[:, -1].argmax(dim=-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
    found: list[int] = ids[0, -NEW:].tolist()
    return found


def _generated(folder: Path, ids: list[int], *, resident: bool) -> tuple[list[int], TokenRouting]:
    routing, loaded = TokenRouting(EXPERTS), []
    with SourceReader(HubOptions()) as reader:
        model = GenerationModel(
            open_mixture(folder), reader, "cpu", resident=resident, on_routing=routing.add, layer_loaded=loaded.append
        )
        tokens = model.generate(ids, GenerationOptions(max_new_tokens=NEW), ())
    assert len(loaded) == (LAYERS if resident else 0)
    return tokens, routing
