"""Flags of mergekit-moe that have nothing left to do here: they are accepted, and say so."""

from __future__ import annotations

from typing import Annotated, Any

import typer

# name -> why
_IGNORED_FLAGS: dict[str, str] = {
    "lazy_unpickle": "pickled checkpoints are always read by byte range",
    "low_cpu_memory": "memory does not grow with the model",
    "read_to_gpu": "weights that are only copied never visit a GPU",
    "multi_gpu": "every expert gets a GPU of the Ray cluster",
    "gpu_rich": "every expert gets a GPU of the Ray cluster",
    "cuda": "GPUs that the Ray cluster has are used",
    "async_write": "shards are always written in parallel",
    "write_threads": "shards are always written in parallel",
    "num_threads": "work is spread over Ray actors (--actors)",
    "clone_tensors": "tensors are copied as bytes",
    "safe_serialization": "the output is always safetensors",
    "lora_merge_cache": "LoRA deltas are applied while writing; no merged copy is kept",
    "lora_merge_dtype": "LoRA deltas are applied in float32",
    "unsafe_truncate_embeddings": "the base model's embeddings are used whole",
}


def noop(name: str, *declarations: str, kind: Any = bool) -> Any:
    return Annotated[
        kind, typer.Option(*declarations, help=f"Accepted, nothing to do: {_IGNORED_FLAGS[name]}.", hidden=True)
    ]


def ignored_flag_notes(context: typer.Context) -> list[str]:
    """One line for each given flag that has nothing to do."""
    # By name: newer versions of typer bring their own copy of click's enumeration.
    sources = {name: context.get_parameter_source(name) for name in _IGNORED_FLAGS}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    return [
        f"note: --{name.replace('_', '-')} is accepted and changes nothing here: {_IGNORED_FLAGS[name]}"
        for name in given
    ]
