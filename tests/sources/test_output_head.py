"""Whether a checkpoint's output head is one of its own, and how much is read to know it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from raymoe.config.model_refs import parse_model_ref
from raymoe.sources.facts import SourceFile
from raymoe.sources.local_folder import LocalFolder
from raymoe.sources.output_head import has_own_head
from raymoe.sources.resolve import resolve_models
from raymoe.sources.weight_index import index_model_weights
from raymoe.tensor_names import EMBEDDING, HEAD
from tests.sources.checkpoints import write_json

ROWS, COLUMNS = 8_000, 256  # 8 MB each
TIED = {"tie_word_embeddings": True}


class CountingFolder(LocalFolder):
    bytes_read = 0

    def read_range(self, file: SourceFile, start: int, end: int) -> bytes:
        self.bytes_read += end - start
        return super().read_range(file, start, end)


def embedding() -> np.ndarray[Any, Any]:
    return (np.arange(ROWS * COLUMNS, dtype="f4") % 1000).reshape(ROWS, COLUMNS)


def answer(path: Path, head: np.ndarray[Any, Any], config: dict[str, Any] = TIED) -> tuple[bool, int]:
    """Whether the head is its own, and the bytes of both tensors that were read."""
    path.mkdir(exist_ok=True)
    save_file({EMBEDDING: embedding(), HEAD: head}, path / "model.safetensors")
    folder = CountingFolder(str(path))
    index = index_model_weights(folder)
    folder.bytes_read = 0
    return has_own_head(folder, config, index), folder.bytes_read


def test_equal_tensors_are_read_whole(tmp_path: Path) -> None:
    own, read = answer(tmp_path, embedding())
    assert not own
    assert read >= 2 * embedding().nbytes


def test_a_trained_head_is_known_by_a_sample(tmp_path: Path) -> None:
    own, read = answer(tmp_path, embedding() + 1)
    assert own
    assert read <= 2 * 8 * 64 * 1024


@pytest.mark.parametrize("row", [0, 1_700, 5_667, ROWS - 1])
def test_one_other_row_is_enough(row: int, tmp_path: Path) -> None:
    head = embedding()
    head[row] += 1
    assert answer(tmp_path, head)[0]


@pytest.mark.parametrize("head", [embedding().astype("f2"), embedding()[:-1]])
def test_another_dtype_or_shape_is_another_head(head: np.ndarray[Any, Any], tmp_path: Path) -> None:
    assert answer(tmp_path, head) == (True, 0)


@pytest.mark.parametrize(
    ("config", "own"),
    [
        ({"tie_word_embeddings": False}, False),
        ({"tie_embedding": False, "tie_word_embeddings": True}, False),
        ({"tie_embedding": True, "tie_word_embeddings": False}, True),
        ({}, True),  # the family's default says
    ],
)
def test_a_config_that_does_not_tie_is_believed(config: dict[str, Any], own: bool, tmp_path: Path) -> None:
    found, read = answer(tmp_path, embedding() + 1, config)
    assert found is own
    assert bool(read) is own


def test_one_storage_under_two_names(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.ones(8, 4)
    torch.save({EMBEDDING: weight, HEAD: weight}, tmp_path / "pytorch_model.bin")
    folder = CountingFolder(str(tmp_path))
    assert not has_own_head(folder, TIED, index_model_weights(folder))
    assert folder.bytes_read == 0


def test_only_whole_models_are_compared(tmp_path: Path) -> None:
    refs = []
    for name in ("base", "expert"):
        answer(tmp_path / name, embedding() + 1)
        write_json(tmp_path / name / "config.json", {"model_type": "llama", **TIED})
        refs.append(parse_model_ref(str(tmp_path / name)))
    facts = resolve_models(refs, whole=refs[:1])
    assert [facts[ref].own_head for ref in refs] == [True, False]
    assert all(found.own_head for found in resolve_models(refs).values())
