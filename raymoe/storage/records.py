"""Names of the files that make an output, and what is noted of each file that is written."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CHECKPOINT_FILES", "INDEX_NAME", "JOURNAL", "RECORD_NAME", "RESULT_NAME", "FileRecord"]

JOURNAL = ".raymoe"
RECORD_NAME = "raymoe.json"
RESULT_NAME = "result.json"  # how the run went: times, retries, memory; no part of the checkpoint
INDEX_NAME = "model.safetensors.index.json"
# The weights of a checkpoint: what --overwrite removes, beside the files that the record of the merge names. Anything
# else is somebody's own and stays.
CHECKPOINT_FILES = ("model*.safetensors", "pytorch_model*.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A finished file: name, size in bytes, checksum as `algorithm:hex`.

    `xxh3-128` (local files, streams) and `sha256` are of the file's bytes. `etag` is the object store's own: for an
    upload in parts on S3 usually the MD5 of the parts' MD5s, and how many they were.
    """

    name: str
    size: int
    checksum: str
