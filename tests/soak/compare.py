"""An output against that of an undisturbed merge, byte for byte."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from tests.soak.places import FolderPlace, Place

__all__ = ["INDEX", "JOURNAL", "RECORD", "differences", "noted_shards"]

INDEX, RECORD, JOURNAL = "model.safetensors.index.json", "raymoe.json", ".raymoe/"
RESULT = "result.json"
_CARD = "README.md"
# In a folder, and in an object store, where the note's name may have the size and the ETag of the shard.
_DONE_NOTE = re.compile(rf"{re.escape(JOURNAL)}done/(?:\w+/)?(?P<file>[^/]+\.safetensors)(?:\.\d+\.[0-9a-f-]+)?\.json")


def differences(place: Place, reference: Path) -> list[str]:
    """Names of files other than in the undisturbed merge in folder `reference`, and why. The journal is left out, and
    what tells of one run."""
    expected, found = FolderPlace(reference).files(), place.files()
    found = {name: size for name, size in found.items() if not name.startswith(JOURNAL) and name != RESULT}
    expected.pop(RESULT, None)
    if found.keys() != expected.keys():
        return [f"other files: {', '.join(sorted(found.keys() ^ expected.keys()))}"]
    same = [name for name in expected if name not in (RECORD, _CARD)]
    wrong = [f"{name} differs" for name in same if not _same_bytes(place, name, reference / name)]
    if _card(b"".join(place.chunks(_CARD))) != _card((reference / _CARD).read_bytes()):
        wrong.append(f"{_CARD} differs")
    return wrong + _record_differences(place, reference, found)


def noted_shards(files: Iterable[str]) -> int:
    """How many shards the journal among these files calls finished; each run notes its own in a folder of its name."""
    notes = (_DONE_NOTE.fullmatch(name) for name in files)
    return len({note["file"] for note in notes if note is not None})


def _card(content: bytes) -> bytes:
    """The model card without the config's storage block: it names the endpoint, and every proxy has its own port."""
    return re.sub(rb"^storage:\n(  .*\n)+", b"", content, flags=re.MULTILINE)


def _same_bytes(place: Place, name: str, path: Path) -> bool:
    with open(path, "rb") as file:
        return all(chunk == file.read(len(chunk)) for chunk in place.chunks(name)) and not file.read(1)


def _record_differences(place: Place, reference: Path, sizes: dict[str, int]) -> list[str]:
    """raymoe.json: the storage block and the kind of checksums may be others, and have to be right; nothing else."""
    record = json.loads(b"".join(place.chunks(RECORD)))
    expected = json.loads((reference / RECORD).read_text())
    wrong = [
        f"{RECORD}: {name} has another checksum"
        for name, file in record["files"].items()
        if not _is_checksum(file.pop("checksum"), place, name) or file["size"] != sizes[name]
    ]
    record["files"][_CARD]["size"] = expected["files"][_CARD]["size"]
    for file in expected["files"].values():
        file.pop("checksum")
    for content in (record, expected):
        content["config"].pop("storage", None)
    return wrong + ([] if record == expected else [f"{RECORD} differs"])


def _is_checksum(recorded: str, place: Place, name: str) -> bool:
    kind, _, digest = recorded.partition(":")
    if kind == "etag":
        return place.etag(name) == digest
    hasher: Any = hashlib.sha256() if kind == "sha256" else xxhash.xxh3_128()
    for chunk in place.chunks(name):
        hasher.update(chunk)
    return bool(hasher.hexdigest() == digest)
