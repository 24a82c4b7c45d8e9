"""Shards and sources made by hand: real files, real headers, no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from raymoe.planning.owner import BASE, Owner
from raymoe.planning.plan import Copy, PartSource, Shard
from raymoe.planning.shard_packing import OutputTensor, pack_shards
from raymoe.sources.facts import TensorEntry
from raymoe.sources.local_folder import LocalFolder
from raymoe.sources.weight_index import index_model_weights

Array = np.ndarray[Any, Any]


def save(folder: Path, tensors: Mapping[str, Array]) -> Mapping[str, TensorEntry]:
    """Write a checkpoint of one file and index it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors")
    return index_model_weights(LocalFolder(str(folder))).tensors


def tensor(
    entry: TensorEntry, what: PartSource | None = None, *, name: str = "", dtype: str = "", owner: Owner = BASE
) -> OutputTensor:
    """An output tensor made from a source tensor; a copy of it, unless `what` says otherwise."""
    return OutputTensor(
        name=name or entry.name,
        dtype=dtype or entry.dtype,
        shape=entry.shape,
        owner=owner,
        what=what or Copy(source=entry),
    )


def one_shard(tensors: Sequence[OutputTensor]) -> Shard:
    (shard,) = pack_shards(tensors, [tensors[0].owner], 1 << 40)
    return shard
