"""scripts/serve_example.py says where served answers leave those of transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.pico import REPOSITORY


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(REPOSITORY / "scripts"))  # as for a script that is run
    import serve_example

    yield serve_example
    sys.path.remove(str(REPOSITORY / "scripts"))


def test_answers_are_compared_token_for_token(script: ModuleType) -> None:
    expected = [script.Answer([1, 2, 3], [3.0, 0.02, 1.0]), script.Answer([4, 5], [1.0, 1.0, 0.5])]
    assert script.compare(expected, [[1, 2, 3], [4, 5]]) == (2, [])
    equal, places = script.compare(expected, [[1, 9, 3], [4, 5, 6]])
    assert equal == 0
    assert places == ["prompt 1, token 2 of 3 (2.0e-02 nats)", "prompt 2, token 3 of 2 (5.0e-01 nats)"]


def test_a_checkpoint_in_float32_has_the_same_numbers(script: ModuleType, tmp_path: Path) -> None:
    folder, numbers = tmp_path / "merge", torch.tensor([0.1, -3.0], dtype=torch.bfloat16)
    folder.mkdir()
    save_file({"a": numbers}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", "vocab_size": 4}))
    (folder / "tokenizer.json").write_text("{}")
    copy = script.in_float32(folder, tmp_path / "copy")
    found = load_file(copy / "model.safetensors")["a"]
    assert found.dtype == torch.float32 and torch.equal(found, numbers.float())
    assert json.loads((copy / "config.json").read_text()) == {"torch_dtype": "float32", "vocab_size": 4}
    assert (copy / "tokenizer.json").read_text() == "{}"
