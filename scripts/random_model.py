"""Writes dense models with random weights of any shape straight to disk, for measurements.

    python scripts/random_model.py out/random/7b --shape mistral-7b
    python scripts/random_model.py out/random/1b --shape mistral-1b --seed 1 --tokenizer models/SmolLM2-135M-Instruct

The weights are cut from one block of normal numbers (bfloat16, standard deviation 0.02, norms near 1): a 14 GB model is
written as fast as the disk takes it. They compute finite numbers, and nothing sensible.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

BLOCK = 1 << 24
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Shape:
    """Sizes of a Mistral-type model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 32000


SHAPES = {
    "tiny": Shape(256, 768, 4, 4, 2),
    "mistral-0.5b": Shape(1024, 4096, 30, 16, 4),
    "mistral-1b": Shape(1536, 6144, 28, 12, 4),
    "mistral-2b": Shape(2048, 8192, 32, 16, 4),
    "mistral-7b": Shape(4096, 14336, 32, 32, 8),
}


def config_of(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, in the order in which they are written."""
    head = shape.hidden // shape.heads
    kv = shape.kv_heads * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (shape.hidden,),
            prefix + "mlp.down_proj.weight": (shape.hidden, shape.intermediate),
            prefix + "mlp.gate_proj.weight": (shape.intermediate, shape.hidden),
            prefix + "mlp.up_proj.weight": (shape.intermediate, shape.hidden),
            prefix + "post_attention_layernorm.weight": (shape.hidden,),
            prefix + "self_attn.k_proj.weight": (kv, shape.hidden),
            prefix + "self_attn.o_proj.weight": (shape.hidden, shape.hidden),
            prefix + "self_attn.q_proj.weight": (shape.hidden, shape.hidden),
            prefix + "self_attn.v_proj.weight": (kv, shape.hidden),
        }
    return shapes | {"model.norm.weight": (shape.hidden,), "lm_head.weight": (shape.vocab, shape.hidden)}


def write_model(folder: Path, shape: Shape, *, seed: int = 0, tokenizer: Path | None = None) -> int:
    """Write a model; the bytes of its weights. A folder that is complete is left as it is."""
    shapes = tensor_shapes(shape)
    total = sum(math.prod(size) * 2 for size in shapes.values())
    if (folder / "config.json").exists():
        return total
    folder.mkdir(parents=True, exist_ok=True)
    block = (np.random.default_rng(seed).standard_normal(BLOCK, dtype=np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    ones = np.ones(shape.hidden, dtype=ml_dtypes.bfloat16)
    groups = group_by_size(shapes)
    weight_map = {}
    for number, names in enumerate(groups, start=1):
        file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file_name)
        write_shard(folder / file_name, {name: shapes[name] for name in names}, block, ones)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in tokenizer.glob("*token*") if tokenizer else ():
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config_of(shape), indent=2))
    return total


def group_by_size(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, dims in shapes.items():
        count = math.prod(dims) * 2
        if size + count > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += count
    return groups


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], block: np.ndarray, ones: np.ndarray) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in shapes.items():
        end = offset + math.prod(dims) * 2
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = 0
        for dims in shapes.values():
            left = math.prod(dims)
            if len(dims) == 1:
                file.write(ones.tobytes())
                continue
            start = (start + 7919) % BLOCK  # another place in the block for every tensor
            while left:
                piece = block[start : start + left]
                file.write(piece.view(np.uint16).data)
                left -= len(piece)
                start = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer to copy")
    arguments = parser.parse_args()
    count = write_model(arguments.folder, SHAPES[arguments.shape], seed=arguments.seed, tokenizer=arguments.tokenizer)
    print(f"{arguments.folder}: {count:,} bytes of weights")


if __name__ == "__main__":
    main()
