"""Small real checkpoints on disk, for the tests of sources."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Tensors = Mapping[str, np.ndarray[Any, Any]]


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def write_sharded(folder: Path, shards: Mapping[str, Tensors]) -> dict[str, str]:
    """Shards, an index and a config; returns the weight map."""
    write_json(folder / "config.json", {"model_type": "llama"})
    weight_map: dict[str, str] = {}
    for file_name, tensors in shards.items():
        save_file(dict(tensors), folder / file_name)
        weight_map |= dict.fromkeys(tensors, file_name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return weight_map
