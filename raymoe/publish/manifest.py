"""The files of a finished merge that are published: those that its record names, and the record. Other files are not
published. An evaluation of this merge (eval.json in the same folder) adds a table and a picture to the card.

    raymoe.json --> ManifestFile by name: a file of the output, or for the card and the record the bytes to publish

The published card has the model's name on the Hub, and so differs from the output's card. The published record has the
new card's checksum, and no endpoint or profile of object stores. The card may have been edited; any other file that is
missing or has another size than recorded is refused. A link that leads out of the folder is refused too: the sender of
the folder must not choose which of the receiver's files are published.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from raymoe.checkpoints.merge_record import MergeRecord, read_record
from raymoe.checkpoints.open_checkpoint import open_checkpoint
from raymoe.config.model_refs import paths_in_label
from raymoe.errors import Problem, ProblemReport
from raymoe.object_store.options import StorageOptions
from raymoe.report.eval_card import PICTURE_NAME, routing_picture, with_evaluation
from raymoe.report.model_card import PATH_PLACEHOLDER
from raymoe.sources.facts import SourceFile
from raymoe.sources.folder_protocol import Folder
from raymoe.sources.hub import is_hub_id
from raymoe.sources.local_folder import LocalFolder
from raymoe.storage.file_names import CARD_NAME, INDEX_NAME, RECORD_NAME, FileRecord
from raymoe.untrusted_files import check_size, read_json

EVALUATION_NAME = "eval.json"
"""The file in a merge's folder (`raymoe eval --json`) with numbers that are published with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestFile:
    """One file to publish, of `size` bytes: `content` if it is set, else `file`. `sha256` (hex) is set if the record
    has it, so that comparisons need not read the file."""

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
    """A finished merge as it is published; `folder` reads its files. `title` describes it in a few words. Sources are
    local paths, and models of the Hub with their commits. `notes` say what is left out, and why."""

    folder: Folder
    files: tuple[ManifestFile, ...]
    title: str
    card: str | None
    local_sources: tuple[str, ...]
    notes: tuple[str, ...] = ()
    hub_sources: tuple[str, ...] = ()
    plan_digest: str = ""

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


def open_manifest(place: str | Path, repo: str, storage: StorageOptions) -> Manifest:
    """The merge at a folder or URL as it would be published to `repo`. Raises ProblemReport with all problems."""
    folder = open_checkpoint(place, storage)
    record = read_record(folder)
    problems: list[Problem] = []
    files = [_manifest_file(folder, recorded, problems) for recorded in record.files.values()]
    if (of_record := folder.find(RECORD_NAME)) is not None and _is_outside(folder, of_record):
        problems.append(_broken_problem(folder, f"{RECORD_NAME} is a link to a file outside of the folder"))
    if INDEX_NAME not in record.files:
        problems.append(_broken_problem(folder, f"no {INDEX_NAME} is among its files"))
    if not problems and isinstance(folder, LocalFolder) and read_record(folder) != record:
        what, remedy = "another merge was written here just now", "push again when no merge writes here"
        problems.append(Problem(where=folder.label, what=what, remedy=remedy))
    if problems:
        raise ProblemReport(problems)
    found = [file for file in files if file is not None and file.name != CARD_NAME]
    card = _card(folder, record, repo)
    notes: list[str] = []
    if card is not None:
        card, picture = _with_evaluation(card, folder, record, notes)
        found += [picture] if picture is not None else []
        content = card.encode()
        found.append(ManifestFile(name=CARD_NAME, size=len(content), content=content))
    plain = record.to_publish(repo, card)
    found.append(ManifestFile(name=RECORD_NAME, size=len(plain), content=plain))
    return Manifest(
        folder=folder,
        files=tuple(sorted(found, key=lambda file: file.name)),
        title=_title(record),
        card=card,
        notes=tuple(notes),
        local_sources=_local_sources(record),
        plan_digest=record.plan_digest,
        hub_sources=tuple(name for name in _sources(record) if "@" in name and not name.startswith("/")),
    )


def _manifest_file(folder: Folder, recorded: FileRecord, problems: list[Problem]) -> ManifestFile | None:
    name, size = recorded.name, recorded.size
    file = folder.find(name)
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
    kind, _, digits = recorded.checksum.partition(":")
    return ManifestFile(name=name, size=file.size, file=file, sha256=digits if kind == "sha256" else None)


def _is_outside(folder: Folder, file: SourceFile) -> bool:
    if not file.kind.is_local:
        return False
    root = os.path.realpath(folder.label)
    return os.path.commonpath([root, os.path.realpath(file.location)]) != root


def _broken_problem(folder: Folder, what: str) -> Problem:
    remedy = "merge again (with --overwrite), or put the file back; `raymoe verify` compares every byte"
    return Problem(where=folder.label, what=what, remedy=remedy)


def _card(folder: Folder, record: MergeRecord, repo: str) -> str | None:
    """The card with the repository's name in place of the folder's, or of an earlier repository's; None for a merge
    without a card."""
    file = folder.find(CARD_NAME) if CARD_NAME in record.files else None
    if file is None:
        return None
    try:
        card = folder.read(file).decode().replace(PATH_PLACEHOLDER, repo)
    except UnicodeDecodeError as error:
        what, remedy = f"{CARD_NAME} is not UTF-8 text: {error.reason}", "save it as UTF-8"
        raise ProblemReport([Problem(where=folder.label, what=what, remedy=remedy)]) from None
    before = record.content.get("published_as")
    return card.replace(f'"{before}"', f'"{repo}"') if isinstance(before, str) and is_hub_id(before) else card


def _with_evaluation(
    card: str, folder: Folder, record: MergeRecord, notes: list[str]
) -> tuple[str, ManifestFile | None]:
    """The card with the numbers of eval.json, if that belongs to this merge, and the picture that the card shows."""
    evaluated, picture = folder.find(EVALUATION_NAME), folder.find(PICTURE_NAME)
    if evaluated is None or _is_outside(folder, evaluated):
        # A copy of a published merge has the picture of its card.
        is_shown = picture is not None and f"({PICTURE_NAME})" in card and not _is_outside(folder, picture)
        return card, ManifestFile(name=PICTURE_NAME, size=picture.size, file=picture) if picture and is_shown else None
    try:
        check_size(evaluated.size)
        result = read_json(folder.read(evaluated))
        if not isinstance(result, Mapping) or result.get("plan_digest") != record.plan_digest:
            raise ValueError("it belongs to another merge")
        drawn = routing_picture(result).encode()
        return with_evaluation(card, result), ManifestFile(name=PICTURE_NAME, size=len(drawn), content=drawn)
    except ValueError as error:
        notes.append(f"{EVALUATION_NAME} is not in the card: {error}")
        return card, None


def _title(record: MergeRecord) -> str:
    if record.extracted is not None:
        return "expert of a mixture"
    experts = sum(source.is_expert for source in record.sources)
    return f"{record.content.get('architecture', 'MoE')} merge of {experts} experts"


def _local_sources(record: MergeRecord) -> tuple[str, ...]:
    """Models and prompt files that the record names by a local path."""
    names = [*_sources(record), *(file["file"] for file in record.prompt_files)]
    return tuple(dict.fromkeys(name for name in names if name.startswith("/")))


def _sources(record: MergeRecord) -> list[str]:
    """Models and adapters of a record."""
    return [name for source in record.sources for name in paths_in_label(source.model)]
