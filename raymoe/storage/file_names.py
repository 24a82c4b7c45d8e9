"""Names of an output's files, and the record of each finished file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raymoe.errors import Problem
from raymoe.formatting import short_list
from raymoe.sources.folder_protocol import SIDE_FILES, is_inside, matches
from raymoe.untrusted_files import read_json

JOURNAL = ".raymoe"
PROBE = "probe-"  # followed by a random name: an object in the journal's place that exists only for a moment
CARD_NAME = "README.md"
RECORD_NAME = "raymoe.json"
RESULT_NAME = "result.json"  # times, retries and memory of the run; not part of the checkpoint
MAX_RESULT_BYTES = 16 << 20  # of a result file: 50 bytes per actor
INDEX_NAME = "model.safetensors.index.json"
# The weights of a checkpoint.
CHECKPOINT_FILES = ("model*.safetensors", "pytorch_model*.bin", "pytorch_model.bin.index.json")
# Adapters: transformers applies them to a model in the same folder.
_ADAPTERS = ("adapter_config.json", "adapter_model*.safetensors", "adapter_model*.bin")


def is_part_of_a_model(name: str) -> bool:
    """Whether a reader of a folder would take this file for a part of its model: weights, adapters, tokenizer.

    Such files of another model are removed when a merge replaces it; other files belong to the user and stay.
    """
    patterns = (*CHECKPOINT_FILES, INDEX_NAME, *_ADAPTERS, *SIDE_FILES)
    return matches(name, patterns)


def is_written_by_a_merge(name: str) -> bool:
    """Whether a merge writes a file of this name, or removes one when it replaces another model."""
    return is_part_of_a_model(name) or name in (RECORD_NAME, RESULT_NAME, CARD_NAME, "config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A finished file: name, size in bytes, checksum as `algorithm:hex`.

    `xxh3-128` (local files, streams) and `sha256` are checksums of the file's bytes. `etag` is the object store's own:
    for a multipart upload on S3, usually the MD5 of the parts' MD5s and the number of parts.
    """

    name: str
    size: int
    checksum: str


def json_object(content: bytes | str) -> dict[str, Any]:
    """A JSON object; empty if the text is not one. The text may be half a file, or another program's file."""
    try:
        found = read_json(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def is_recorded_file(name: object) -> bool:
    """Whether a record may list such a file of the output. Files of the journal belong to a run, not to a merge."""
    return isinstance(name, str) and is_inside(name) and name.split("/")[0] != JOURNAL


def is_result(content: bytes) -> bool:
    """Whether a file is the result of a run (`result.json`, or the file of `--result`).

    A failed run may leave one in an output that is otherwise empty. The next run may still use that output.
    """
    return {"exit_reason", "raymoe_version"} <= json_object(content).keys()


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedMerge:
    """A finished merge as its record (`raymoe.json`) describes it: the plan's digest, and the files. `local_files` are
    samples of the local weights that it was made of, by location; records of an older raymoe have none."""

    digest: str
    files: tuple[FileRecord, ...]
    local_files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> FinishedMerge | None:
        """The merge that a record describes; None if it is not the record of a merge."""
        digest, files = record.get("plan_digest"), record.get("files")
        if not isinstance(digest, str) or not isinstance(files, Mapping) or INDEX_NAME not in files:
            return None
        if not all(_is_entry(name, entry) for name, entry in files.items()):
            return None
        records = (FileRecord(name=n, size=e["size"], checksum=str(e.get("checksum", ""))) for n, e in files.items())
        local = record.get("local_files")
        samples = {str(name): str(sample) for name, sample in local.items()} if isinstance(local, Mapping) else {}
        return cls(digest=digest, files=tuple(records), local_files=samples)

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)

    def problems(self, location: str, size_of: Callable[[str], int | None]) -> list[Problem]:
        """Files that are missing or have another size now. The model card may be edited."""
        wrong = []
        for file in self.files:
            size = size_of(file.name)
            if size is None:
                wrong.append(f"{file.name} is missing")
            elif size != file.size and file.name != CARD_NAME:
                wrong.append(f"{file.name} has {size:,} bytes, and had {file.size:,} when it was merged")
        if not wrong:
            return []
        what = f"the finished merge here is damaged: {short_list(wrong, most=3)}"
        return [Problem(where=location, what=what, remedy="put the files back, or use --overwrite to merge again")]


def _is_entry(name: Any, entry: Any) -> bool:
    is_file = isinstance(name, str) and is_inside(name)
    return is_file and isinstance(entry, Mapping) and type(entry.get("size")) is int
