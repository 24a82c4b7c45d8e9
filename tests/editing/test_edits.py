"""An edit of a mixture is the merge that would have made the result, byte for byte, for every architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raymoe
from tests.architectures.pairs import PAIRS, Pair
from tests.pico import merge_here
from tests.runtime.in_process import in_this_process

FIRST = [pair for number, pair in enumerate(PAIRS) if pair.host not in {other.host for other in PAIRS[:number]}]
"""One pair for each architecture."""


def edit_here(old: Path | str, new: Path | str, **changes: Any) -> Any:
    with in_this_process():
        return raymoe.edit(old, new, **changes)


def same_weights(one: Path, other: Path) -> None:
    """The same files of weights and the same config.json, byte for byte."""
    names = sorted(path.name for path in one.iterdir() if path.suffix == ".safetensors" or path.name == "config.json")
    assert "config.json" in names and len(names) > 1
    assert names == sorted(p.name for p in other.iterdir() if p.suffix == ".safetensors" or p.name == "config.json")
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    index = "model.safetensors.index.json"
    assert json.loads((one / index).read_text()) == json.loads((other / index).read_text())


@pytest.mark.parametrize("pair", FIRST, ids=str)
def test_an_edit_is_the_merge_of_the_sources(pair: Pair, zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Three experts; one is added, one removed, one replaced, in one edit, in a mode of each kind."""
    pair.skip_where_unknown()
    base, *models = (zoo(pair.family, seed=seed, **pair.options) for seed in range(6))
    shared = models[4]
    mode = ("hidden", "ridge", "random", "cheap_embed")[FIRST.index(pair) % 4]
    whole = pair.config(base, models[:4], shared, mode=mode)
    entries = whole["experts"]
    old, new, expected = tmp_path / "old", tmp_path / "new", tmp_path / "expected"
    merge_here({**whole, "experts": entries[:3]}, old)
    replaced = {**entries[2], "source_model": str(models[4])}
    edit_here(old, new, add=[entries[3]], remove=[0], replace={2: str(models[4])})
    merge_here({**whole, "experts": [entries[1], replaced, entries[3]]}, expected)
    same_weights(new, expected)
    record = json.loads((new / "raymoe.json").read_text())
    assert record["edit"]["removed"] == [{"expert": 0, "model": str(models[0])}]
    assert [expert["how"] for expert in record["edit"]["experts"]] == ["kept", "replaced", "added"]
    # A mixture of this architecture may have the FFNs in other tensors than the family whose layers read the prompts.
    is_view = record["config"]["experts"][0]["source_model"].endswith("#1")
    assert is_view or mode == "ridge"
