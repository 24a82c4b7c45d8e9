"""Opens and reads a finished checkpoint, in a folder or in an object store."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import xxhash

from raymoe.errors import Problem, ProblemReport
from raymoe.object_store.location import Location
from raymoe.object_store.options import StorageOptions
from raymoe.sources.bucket_folder import open_object_folder
from raymoe.sources.facts import SourceFile
from raymoe.sources.folder_protocol import Folder, read_json_object
from raymoe.sources.local_folder import LocalFolder
from raymoe.storage.checksums import hex_digest
from raymoe.storage.file_names import JOURNAL
from raymoe.storage.source_reader import SourceReader

_MD5 = re.compile(r"[0-9a-f]{32}")


def open_checkpoint(place: str | Path, storage: StorageOptions) -> Folder:
    """The folder of a finished checkpoint. Raises ProblemReport if there is none, or the merge is not finished."""
    try:
        location = Location.parse(place)
    except ValueError as error:
        raise ProblemReport([Problem(where=str(place), what=str(error))]) from None
    folder: Folder
    if location.kind.is_object:
        folder = open_object_folder(location.text, "checkpoint", storage)
    elif Path(location.text).is_dir():
        folder = LocalFolder(location.text)
    else:
        remedy = "name the folder or URL of a checkpoint"
        raise ProblemReport([Problem(where=location.text, what="there is no such folder", remedy=remedy)])
    if folder.find(f"{JOURNAL}/plan.json") is not None:
        remedy = "run the merge command again to finish it"
        raise ProblemReport([Problem(where=location.text, what="this merge is not finished", remedy=remedy)])
    return folder


def read_object(folder: Folder, name: str, missing: str, remedy: str) -> dict[str, Any]:
    """A JSON object of the checkpoint. Raises ProblemReport; `missing` says what it means if the file is not there."""
    if folder.find(name) is None:
        raise ProblemReport([Problem(where=folder.label, what=missing, remedy=remedy)])
    return read_json_object(folder, name)


def checksum_like(recorded: str, file: SourceFile, reader: SourceReader) -> str | None:
    """The file's current checksum, of the kind that was recorded. Reads all bytes, except for an object's `etag`.

    None if it can't be computed: a local copy of an object has no ETag, unless the recorded ETag is the MD5 of the
    bytes. Most stores use that for an object that was not uploaded in parts.
    """
    kind, _, digits = recorded.partition(":")
    if kind == "etag" and file.etag is not None:
        return f"etag:{file.etag}"
    if kind == "etag":
        is_md5 = _MD5.fullmatch(digits) and _digest(file, reader, hashlib.md5(usedforsecurity=False)) == digits
        return recorded if is_md5 else None
    return f"{kind}:{_digest(file, reader, hashlib.sha256() if kind == 'sha256' else xxhash.xxh3_128())}"


def _digest(file: SourceFile, reader: SourceReader, hasher: Any) -> str:
    return hex_digest(hasher, reader.chunks(file, 0, file.size))
