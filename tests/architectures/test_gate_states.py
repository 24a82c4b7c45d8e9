"""What a gate pass sees of each family: the streamed states against hooks on a resident transformers model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raymoe.architectures import FAMILIES
from raymoe.errors import ProblemReport
from raymoe.routers.tokenize import batches
from tests.routers.test_decoder_router_inputs import hooked, readable, streamed
from tests.routers.test_streamed_decoder import prompts_of

pytestmark = pytest.mark.engines

LENGTHS = (3, 30, 17, 8)
# Families whose tables are Llama's are looked at in tests/routers.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES if name not in ("llama", "mistral", "qwen2", "qwen3")},
    "phi3, window": ("phi3", {"sliding_window": 12}),
    "phi3, part": ("phi3", {"partial_rotary_factor": 0.5}),
    "youtu, one q": ("youtu", {"q_lora_rank": None}),
}


def test_a_family_that_transformers_does_not_have_is_named(
    zoo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = readable(zoo("youtu"), last_ffn=True)
    monkeypatch.setattr("transformers.CONFIG_MAPPING", {"llama": None})
    with pytest.raises(
        ProblemReport, match=r"transformers 5\S* has no youtu models(.|\n)*install a newer transformers"
    ):
        streamed(model, [[[3, 4, 5]]])


def test_a_config_that_transformers_refuses_is_said_in_its_words(zoo: Callable[..., Path]) -> None:
    model = readable(zoo("olmo2"), last_ffn=True)
    odd = replace(model, config={**model.config, "initializer_range": "wide"})
    with pytest.raises(ProblemReport, match=r"olmo2: transformers 5\S* refuses this config: .*'wide'"):
        streamed(odd, [[[3, 4, 5]]])


@pytest.mark.parametrize("name", OTHERS)
def test_router_inputs_are_what_the_ffns_get(name: str, zoo: Callable[..., Path]) -> None:
    family, options = OTHERS[name]
    folder, texts = zoo(family, **options), prompts_of(LENGTHS)
    found = streamed(readable(folder, last_ffn=True), list(batches(texts)))
    for text, expected in zip(texts, hooked(folder, texts), strict=True):
        assert expected[-1].std() > 0.1
        torch.testing.assert_close(found[tuple(text)], expected, rtol=1e-4, atol=2e-5)
