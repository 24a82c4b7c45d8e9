"""Models of real shapes that have headers and no bytes: what a merge plans from is real, bodies are made when read.

    python scripts/sparse_models.py                 # the mixtures: experts, tensors, bytes

A body is a pattern of its own: the 8 bytes at each multiple of 8 hold the number of the file and their place in it. So
a range of one file is never equal to another range, and what was read of it can be checked without keeping it.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from random_model import Shape, config_of, group_by_size, tensor_shapes

_PLACE_BITS = 40  # of a word: files of up to 8 TiB
_EXPERT = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
_MATRICES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2}, "unk_token": "<unk>"},
}

LLAMA_8B = Shape(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocab=128256)
LLAMA_70B = Shape(hidden=8192, intermediate=28672, layers=80, heads=64, kv_heads=8, vocab=128256)


@dataclass(frozen=True)
class SparseFile:
    """A file of `size` bytes: `head`, then (of weights) the pattern of the file. Copies of a model share heads."""

    name: str
    head: bytes
    size: int


@dataclass(frozen=True)
class Mixture:
    """What is merged: `experts` models of one shape; the first is the base too."""

    shape: Shape
    experts: int

    @cached_property
    def files(self) -> tuple[SparseFile, ...]:
        """The files of each of its models."""
        return tuple(model_files(self.shape))

    @property
    def source_tensors(self) -> int:
        return self.experts * len(tensor_shapes(self.shape))

    @property
    def source_file_sizes(self) -> list[int]:
        """Of each of its models."""
        return [file.size for file in self.files]

    @property
    def source_bytes(self) -> int:
        return self.experts * sum(self.source_file_sizes)

    @cached_property
    def output_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of the tensors of the merge."""
        dense = tensor_shapes(self.shape)
        shapes = {name: dims for name, dims in dense.items() if ".mlp." not in name}
        for layer in range(self.shape.layers):
            block = f"model.layers.{layer}.block_sparse_moe"
            shapes[f"{block}.gate.weight"] = (self.experts, self.shape.hidden)
            for expert in range(self.experts):
                for role, matrix in _MATRICES.items():
                    dims = dense[f"model.layers.{layer}.mlp.{matrix}.weight"]
                    shapes[f"{block}.experts.{expert}.{role}.weight"] = dims
        return shapes

    @property
    def output_bytes(self) -> int:
        return sum(math.prod(dims) * 2 for dims in self.output_shapes.values())


MIXTURES: Mapping[str, Mixture] = {
    "tiny": Mixture(Shape(hidden=1024, intermediate=4096, layers=3, heads=8, kv_heads=2, vocab=4096), 4),
    "l8x8": Mixture(LLAMA_8B, 8),
    "l70x8": Mixture(LLAMA_70B, 8),
    "l70x80": Mixture(LLAMA_70B, 80),
    "x1024": Mixture(Shape(hidden=1024, intermediate=4096, layers=22, heads=8, kv_heads=2, vocab=8192), 1024),
}


def model_files(shape: Shape) -> Iterator[SparseFile]:
    """The files of a model, weights in shards of at most 5 GB."""
    shapes = tensor_shapes(shape)
    groups, weight_map = group_by_size(shapes), {}
    for number, names in enumerate(groups, start=1):
        file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file_name)
        yield _weights(file_name, {name: shapes[name] for name in names})
    total = sum(math.prod(dims) * 2 for dims in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    small = {"model.safetensors.index.json": index, "config.json": config_of(shape), "tokenizer.json": _TOKENIZER}
    for name, content in small.items():
        data = json.dumps(content).encode()
        yield SparseFile(name, data, len(data))


def _weights(name: str, shapes: Mapping[str, tuple[int, ...]]) -> SparseFile:
    header: dict[str, object] = {}
    at = 0
    for tensor, dims in shapes.items():
        end = at + math.prod(dims) * 2
        header[tensor] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return SparseFile(name, struct.pack("<Q", len(text)) + text, 8 + len(text) + at)


def body_bytes(number: int, start: int, end: int) -> bytes:
    """Bytes [start, end) of the pattern of file `number` (below 2**24)."""
    first, last = start >> 3, -(-end >> 3)
    words = np.arange(first, last, dtype="<u8") | np.uint64(number << _PLACE_BITS)
    return words.tobytes()[start - 8 * first : end - 8 * first]


def source_of(name: str) -> tuple[int, str] | None:
    """(number of the model, tensor) that a tensor of the merge is a copy of; None for a router, which is computed."""
    if match := _EXPERT.fullmatch(name):
        layer, expert, role = match.groups()
        return int(expert), f"model.layers.{layer}.mlp.{_MATRICES[role]}.weight"
    return None if ".block_sparse_moe." in name else (0, name)


def main() -> None:
    for name, mixture in MIXTURES.items():
        sizes = f"{mixture.source_bytes / 1e9:,.1f} GB to {mixture.output_bytes / 1e9:,.1f} GB"
        tensors = f"{mixture.source_tensors:,} tensors to {len(mixture.output_shapes):,}"
        print(f"{name}: {mixture.experts} experts, {mixture.shape.layers} layers, {tensors}, {sizes}")


if __name__ == "__main__":
    main()
