"""Fixtures for the tests of sources."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.object_store.fixtures import bucket, server
from tests.sources.checkpoints import Tensors, write_json

__all__ = ["bucket", "make_model", "server", "tensors"]


@pytest.fixture
def tensors() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(7)
    return {
        "model.embed.weight": rng.standard_normal((8, 4)).astype("float32"),
        "model.layers.0.up.weight": rng.standard_normal((6, 4)).astype("float16"),
        "model.norm.weight": rng.standard_normal(4).astype("float32"),
    }


@pytest.fixture
def make_model(tmp_path: Path, tensors: Tensors) -> Callable[..., Path]:
    """make_model(name, tensors=..., config=...) writes a folder with one model.safetensors."""

    def make(name: str = "model", tensors: Tensors = tensors, config: object = None) -> Path:
        folder = tmp_path / name
        write_json(folder / "config.json", {"model_type": "llama"} if config is None else config)
        save_file(dict(tensors), folder / "model.safetensors")
        return folder

    return make
