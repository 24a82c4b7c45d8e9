"""The journal of a merge, in `.raymoe/` beside the output: what makes an interrupted merge resumable and safe.

    OUT/.raymoe/plan.json           digest of the plan and the sources' modification times; written first
    OUT/.raymoe/lock                held (flock) while a merge runs, so that two never write one output
    OUT/.raymoe/parts/FILE          a file being written; moved to OUT/FILE when it is whole and on disk
    OUT/.raymoe/done/FILE.json      size and checksum of a finished file; written after the move
    OUT/raymoe.json                 the record of the finished merge; written last, then `.raymoe/` is removed

A directory with `.raymoe/` is unfinished, whatever else is in it. Everything here can be repeated at any point.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from raymoe.errors import Problem, ProblemReport
from raymoe.sources.types import SourceFile

__all__ = ["INDEX_NAME", "JOURNAL", "RECORD_NAME", "FileRecord", "Journal", "source_stamps"]

JOURNAL = ".raymoe"
RECORD_NAME = "raymoe.json"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A finished file: name, size in bytes, checksum as `algorithm:hex`."""

    name: str
    size: int
    checksum: str


class Journal:
    """Reads and writes the journal of one output folder. Holds no state but the lock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / JOURNAL
        self._lock: int | None = None

    @property
    def exists(self) -> bool:
        return (self.folder / "plan.json").is_file()

    def digest(self) -> str | None:
        """Digest of the plan that this journal belongs to; None where there is no readable journal."""
        return self._plan().get("digest") if self.exists else None

    def changed_sources(self, stamps: Mapping[str, int]) -> list[str]:
        """Source files that were modified after the interrupted merge had read them."""
        recorded = self._plan().get("sources", {})
        return sorted(name for name, stamp in stamps.items() if name in recorded and recorded[name] != stamp)

    def begin(self, digest: str, stamps: Mapping[str, int]) -> None:
        """Take the lock, remove half-written files, and write the plan's digest down."""
        for folder in ("parts", "done"):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self.clear_parts()
        write_durably(self.folder / "plan.json", json.dumps({"digest": digest, "sources": dict(stamps)}).encode())

    def clear_parts(self) -> None:
        """Remove files that were being written."""
        parts = self.folder / "parts"
        for path in parts.iterdir() if parts.is_dir() else ():
            path.unlink(missing_ok=True)

    def part_path(self, name: str) -> Path:
        return self.folder / "parts" / _flat(name)

    def finished(self, name: str) -> FileRecord | None:
        """The record of a finished file; the caller compares it with the file itself."""
        try:
            return FileRecord(**json.loads(self._done_path(name).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def record(self, record: FileRecord) -> None:
        write_durably(self._done_path(record.name), json.dumps(asdict(record)).encode())

    def end(self) -> None:
        """The merge is complete: the journal goes, the record stays."""
        shutil.rmtree(self.folder)
        self.release()

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _done_path(self, name: str) -> Path:
        return self.folder / "done" / f"{_flat(name)}.json"

    def _plan(self) -> dict:  # type: ignore[type-arg]
        try:
            content = json.loads((self.folder / "plan.json").read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            what, remedy = (
                "another merge is writing to this folder",
                "wait for it to end, or choose another output",
            )
            raise ProblemReport([Problem(where=str(self.root), what=what, remedy=remedy)]) from None


def _flat(name: str) -> str:
    """A file's name without folders: the journal's own folders are flat."""
    return name.replace("/", "__")


def source_stamps(files: Iterable[SourceFile]) -> dict[str, int]:
    """Modification times (ns) of the source files that this machine can see; a Hub revision never changes."""
    stamps = {}
    for file in files:
        if "://" not in file.location and os.path.exists(file.location):
            stamps[file.location] = os.stat(file.location).st_mtime_ns
    return stamps


def write_durably(path: Path, content: bytes) -> None:
    """Replace a small file in one step; after return it survives a crash of the machine."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
