"""Tokenizing without torch: the same tokens, and torch is not imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pico import merge_config

_TOKENIZE = """
import json, sys
from pathlib import Path
from raymoe.runtime.import_blocker import block_torch_import
if sys.argv[2] == "without":
    block_torch_import()
from raymoe.planning.owner import Owner
from raymoe.routers.tokenize import load_tokenizer, tokenize
tokenizer = load_tokenizer(Path(sys.argv[1]), trust_remote_code=False)
ids = tokenize(tokenizer, ["word one", "  two\\n", "ünï 3"], vocab=1 << 30, owner=Owner.expert(0))
print(json.dumps([ids, sys.modules.get("torch") is not None]))
"""


def tokenize(folder: Path, how: str) -> tuple[list[list[int]], bool]:
    run = [sys.executable, "-c", _TOKENIZE, str(folder), how]
    done = subprocess.run(run, capture_output=True, text=True, check=True, timeout=120)
    assert "PyTorch" not in done.stderr
    ids, has_torch = json.loads(done.stdout.splitlines()[-1])
    return ids, has_torch


@pytest.mark.processes
def test_same_tokens(zoo: Callable[..., Path]) -> None:
    folder = zoo("llama")
    ids, has_torch = tokenize(folder, "with")
    assert has_torch, "transformers no longer imports torch to tokenize: nothing is to be left out"
    without, still_has_torch = tokenize(folder, "without")
    assert without == ids
    assert all(without)
    assert not still_has_torch


def test_torch_that_is_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from raymoe.runtime.import_blocker import block_torch_import

    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "")
    block_torch_import()
    assert sys.modules["torch"] is torch


def test_actors_of_cheap_embed(ray_merge: Callable[..., Any], zoo: Callable[..., Path], tmp_path: Path) -> None:
    """An actor with torch has more than 350 MB."""
    models = [zoo("llama", seed=seed) for seed in range(3)]

    def peak(mode: str) -> int:
        result = ray_merge(merge_config(models[0], models[1:], mode=mode), tmp_path / mode)
        return int(result.peak_actor_bytes[0])

    assert peak("cheap_embed") < 250_000_000
    assert peak("hidden") > 350_000_000
