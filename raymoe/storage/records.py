"""Names of the files that make an output, and what is noted of each file that is written."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from raymoe.sources.folder import SIDE_FILES

__all__ = [
    "CARD_NAME",
    "CHECKPOINT_FILES",
    "INDEX_NAME",
    "JOURNAL",
    "PROBE",
    "RECORD_NAME",
    "RESULT_NAME",
    "FileRecord",
    "is_part_of_a_model",
    "is_written_by_a_merge",
]

JOURNAL = ".raymoe"
PROBE = "probe-"  # with what follows, an object in the journal's place that is there for a moment
CARD_NAME = "README.md"
RECORD_NAME = "raymoe.json"
RESULT_NAME = "result.json"  # how the run went: times, retries, memory; no part of the checkpoint
INDEX_NAME = "model.safetensors.index.json"
# The weights of a checkpoint.
CHECKPOINT_FILES = ("model*.safetensors", "pytorch_model*.bin", "pytorch_model.bin.index.json")
# What transformers puts on top of a model that lies beside it.
_ADAPTERS = ("adapter_config.json", "adapter_model*.safetensors", "adapter_model*.bin")


def is_part_of_a_model(name: str) -> bool:
    """Whether a reader of a folder would take this file for a part of the model in it: weights, adapters, tokenizer.

    Of another model, these are removed where a merge takes its place; anything else is somebody's own and stays.
    """
    patterns = (*CHECKPOINT_FILES, INDEX_NAME, *_ADAPTERS, *SIDE_FILES)
    return any(fnmatch.fnmatchcase(name, p) for p in patterns if name.count("/") == p.count("/"))


def is_written_by_a_merge(name: str) -> bool:
    """Whether a merge writes a file of this name, or removes one where it takes the place of another model."""
    return is_part_of_a_model(name) or name in (RECORD_NAME, RESULT_NAME, CARD_NAME, "config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A finished file: name, size in bytes, checksum as `algorithm:hex`.

    `xxh3-128` (local files, streams) and `sha256` are of the file's bytes. `etag` is the object store's own: for an
    upload in parts on S3 usually the MD5 of the parts' MD5s, and how many they were.
    """

    name: str
    size: int
    checksum: str
