"""What of a finished merge is published: the files that its record names, and the record. Nothing else that lies there.

    raymoe.json --> ManifestFile by name: a file of the output, or for the card and the record the bytes to publish

The card calls the model by its name on the Hub, and so differs from the output's; the published record says so, and
leaves out by which endpoint and profile object stores were reached. The card may have been edited; any other file that
is missing or has another size than recorded is refused. So is a link that leads out of the folder: somebody who sends a
folder must not choose which of the receiver's files are published.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from raymoe.checkpoints.merge_record import recorded_experts
from raymoe.checkpoints.open_checkpoint import open_checkpoint, read_object
from raymoe.errors import Problem, ProblemReport
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.urls import is_url
from raymoe.report.model_card import PATH_PLACEHOLDER
from raymoe.safe_text import json_text
from raymoe.sources.facts import SourceFile
from raymoe.sources.folder_protocol import Folder, is_inside
from raymoe.sources.hub import is_hub_id
from raymoe.storage.file_names import CARD_NAME, INDEX_NAME, RECORD_NAME

__all__ = ["Manifest", "ManifestFile", "open_manifest"]

# Keys of the config's `storage`: an address, perhaps of an inner network, and a name in somebody's ~/.aws.
_USER_KEYS = ("endpoint", "profile")


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestFile:
    """One file of the repository-to-be, of `size` bytes: `content` where it is set, else `file`. `sha256` (hex) is
    there where the record has it, so that nothing has to be read to compare."""

    name: str
    size: int
    file: SourceFile | None = None
    content: bytes | None = None
    sha256: str | None = None

    @property
    def is_shard(self) -> bool:
        return self.name.endswith(".safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A finished merge as it is published; `folder` reads its files. `title` says what it is, in a few words. Sources
    are paths of this machine, and models of the Hub with their commits."""

    folder: Folder
    files: tuple[ManifestFile, ...]
    title: str
    card: str | None
    local_sources: tuple[str, ...]
    hub_sources: tuple[str, ...] = ()
    plan_digest: str = ""

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


def open_manifest(place: str | Path, repo: str, storage: StorageOptions) -> Manifest:
    """The merge at a folder or URL as `repo` would have it. Raises ProblemReport with all that is not in order."""
    folder = open_checkpoint(place, storage)
    record = _record(folder)
    problems: list[Problem] = []
    files = [_manifest_file(folder, name, recorded, problems) for name, recorded in record["files"].items()]
    if (of_record := folder.find(RECORD_NAME)) is not None and _is_outside(folder, of_record):
        problems.append(_broken_problem(folder, f"{RECORD_NAME} is a link to a file outside of the folder"))
    if INDEX_NAME not in record["files"]:
        problems.append(_broken_problem(folder, f"no {INDEX_NAME} is among its files"))
    if not problems and not is_url(folder.label) and _record(folder) != record:
        what, remedy = "another merge was written here just now", "push again when no merge writes here"
        problems.append(Problem(where=folder.label, what=what, remedy=remedy))
    if problems:
        raise ProblemReport(problems)
    found = [file for file in files if file is not None and file.name != CARD_NAME]
    card = _card(folder, record, repo)
    if card is not None:
        content = card.encode()
        found.append(ManifestFile(name=CARD_NAME, size=len(content), content=content))
    plain = _record_to_publish(record, card, repo)
    found.append(ManifestFile(name=RECORD_NAME, size=len(plain), content=plain))
    return Manifest(
        folder=folder,
        files=tuple(sorted(found, key=lambda file: file.name)),
        title=_title(record),
        card=card,
        local_sources=_local_sources(record),
        plan_digest=str(record.get("plan_digest")),
        hub_sources=tuple(name for name in _sources(record) if "@" in name and not name.startswith("/")),
    )


def _record(folder: Folder) -> dict[str, Any]:
    missing = "no finished merge is here: it has no raymoe.json"
    record = read_object(folder, RECORD_NAME, missing, "name the output of `raymoe merge`, and let it finish")
    files = record.get("files")
    if not isinstance(files, Mapping) or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise ProblemReport(
            [_broken_problem(folder, f"{RECORD_NAME} can't be read: it names no files with their sizes")]
        )
    for key in ("sources", "prompt_files"):
        entries = record.get(key) or []
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise ProblemReport(
                [_broken_problem(folder, f"{RECORD_NAME} can't be read: its {key} are no list of objects")]
            )
    return record


def _is_entry(name: Any, entry: Any) -> bool:
    is_file = isinstance(name, str) and is_inside(name)
    return is_file and isinstance(entry, Mapping) and isinstance(entry.get("size"), int)


def _manifest_file(
    folder: Folder, name: str, recorded: Mapping[str, Any], problems: list[Problem]
) -> ManifestFile | None:
    file, size = folder.find(name), recorded["size"]
    if file is None:
        problems.append(_broken_problem(folder, f"{name} is missing"))
        return None
    if _is_outside(folder, file):
        what = f"{name} is a link to a file outside of the folder, which a push does not follow"
        problems.append(Problem(where=folder.label, what=what, remedy="copy the file there in place of the link"))
        return None
    if name != CARD_NAME and file.size != size:
        problems.append(_broken_problem(folder, f"{name} has {file.size:,} bytes, and had {size:,} when it was merged"))
        return None
    kind, _, digits = str(recorded.get("checksum", "")).partition(":")
    return ManifestFile(name=name, size=file.size, file=file, sha256=digits if kind == "sha256" else None)


def _is_outside(folder: Folder, file: SourceFile) -> bool:
    if is_url(folder.label):
        return False
    root = os.path.realpath(folder.label)
    return os.path.commonpath([root, os.path.realpath(file.location)]) != root


def _broken_problem(folder: Folder, what: str) -> Problem:
    remedy = "merge again (with --overwrite), or put the file back; `raymoe verify` compares every byte"
    return Problem(where=folder.label, what=what, remedy=remedy)


def _card(folder: Folder, record: Mapping[str, Any], repo: str) -> str | None:
    """The card with the repository's name in place of the folder, or of where it was published before; None for a
    merge without one."""
    file = folder.find(CARD_NAME) if CARD_NAME in record["files"] else None
    if file is None:
        return None
    try:
        card = folder.read(file).decode().replace(PATH_PLACEHOLDER, repo)
    except UnicodeDecodeError as error:
        what, remedy = f"{CARD_NAME} is no text in UTF-8: {error.reason}", "save it as UTF-8"
        raise ProblemReport([Problem(where=folder.label, what=what, remedy=remedy)]) from None
    before = record.get("published_as")
    return card.replace(f'"{before}"', f'"{repo}"') if isinstance(before, str) and is_hub_id(before) else card


def _record_to_publish(record: Mapping[str, Any], card: str | None, repo: str) -> bytes:
    """The record, with the repository, and size and checksum of the card as it is published; without what the config
    tells of this user's way to object stores, which a reader replaces by his own."""
    files = dict(record["files"])
    if card is not None:
        content = card.encode()
        files[CARD_NAME] = {"size": len(content), "checksum": f"xxh3-128:{xxhash.xxh3_128(content).hexdigest()}"}
    published = {**record, "published_as": repo, "files": files}
    config = record.get("config")
    if isinstance(config, Mapping) and isinstance(config.get("storage"), Mapping):
        storage = {key: value for key, value in config["storage"].items() if key not in _USER_KEYS}
        published["config"] = {**config, "storage": storage}
    return f"{json_text(published)}\n".encode()


def _title(record: Mapping[str, Any]) -> str:
    experts = len(recorded_experts(record.get("sources") or []))
    return f"{record.get('architecture', 'MoE')} merge of {experts} experts"


def _local_sources(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Models and files of prompts that the record names by a path of this machine."""
    names = [*_sources(record), *(str(file.get("file", "")) for file in record.get("prompt_files") or [])]
    return tuple(dict.fromkeys(name for name in names if name.startswith("/")))


def _sources(record: Mapping[str, Any]) -> list[str]:
    """Models and adapters of a record."""
    return [name for source in record.get("sources") or [] for name in str(source.get("model", "")).split("+")]
