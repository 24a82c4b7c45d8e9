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

TEXTS = ["word one", "  two\n", "ünï 3"]
_TOKENIZE = f"""
import json, sys
from pathlib import Path
from raymoe.runtime.import_blocker import block_torch_import
if sys.argv[2] == "without":
    block_torch_import()
from raymoe.planning.owner import Owner
from raymoe.routers.tokenize import load_tokenizer, tokenize
tokenizer = load_tokenizer(Path(sys.argv[1]), trust_remote_code=False)
ids = tokenize(tokenizer, {TEXTS!r}, vocab=1 << 30, owner=Owner.expert(0))
print(json.dumps([ids, sys.modules.get("torch") is not None]))
"""


def tokenized(folder: Path, how: str) -> tuple[list[list[int]], bool]:
    """Token ids from another process, and whether it has imported torch."""
    run = [sys.executable, "-c", _TOKENIZE, str(folder), how]
    done = subprocess.run(run, capture_output=True, text=True, check=True, timeout=120)
    assert "PyTorch" not in done.stderr
    ids, has_torch = json.loads(done.stdout.splitlines()[-1])
    return ids, has_torch


@pytest.mark.processes
def test_same_tokens(zoo: Callable[..., Path]) -> None:
    """As in this process, which has torch."""
    from raymoe.planning.owner import Owner
    from raymoe.routers.tokenize import load_tokenizer, tokenize

    folder = zoo("llama")
    assert sys.modules.get("torch") is not None
    ids, has_torch = tokenized(folder, "without")
    assert ids == tokenize(load_tokenizer(folder, trust_remote_code=False), TEXTS, vocab=1 << 30, owner=Owner.expert(0))
    assert all(ids)
    assert not has_torch


@pytest.mark.soak
def test_torch_is_imported_unless_it_is_blocked(zoo: Callable[..., Path]) -> None:
    _, has_torch = tokenized(zoo("llama"), "with")
    assert has_torch, "transformers no longer imports torch to tokenize: nothing is to be left out"


def test_torch_that_is_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from raymoe.runtime.import_blocker import block_torch_import

    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "")
    block_torch_import()
    assert sys.modules["torch"] is torch


def test_actors_of_cheap_embed(ray_merge: Callable[..., Any], zoo: Callable[..., Path], tmp_path: Path) -> None:
    """An actor with torch has more than 350 MB (test_determinism.py)."""
    models = [zoo("llama", seed=seed) for seed in range(3)]
    result = ray_merge(merge_config(models[0], models[1:], mode="cheap_embed"), tmp_path / "out")
    assert result.peak_actor_bytes[0] < 250_000_000
