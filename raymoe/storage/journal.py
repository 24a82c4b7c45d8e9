"""The journal of a merge, in `.raymoe/` beside the output: what makes an interrupted merge resumable and safe.

    OUT/.raymoe/lock                held (flock) while a merge runs, so that two never write one output
    OUT/.raymoe/plan.json           digest of the plan, the run's name, the sources' modification times; written first
    OUT/.raymoe/parts/RUN/FILE.X    a file being written; moved to OUT/FILE when it is whole and on disk
    OUT/.raymoe/done/FILE.json      size and checksum of a finished file; written after the move
    OUT/raymoe.json                 the record of the finished merge; written last, then `.raymoe/` is removed

A folder with `.raymoe/plan.json` is unfinished, whatever else is in it. Everything here can be repeated at any point.

Writers may outlive their run: the actors of a killed driver, or an actor on a node that was lost and replaced. So every
attempt at a file has a name of its own (X), and every run a folder of its own (RUN) that the next one removes: what a
late writer still has open can never be moved into an output that is no longer its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from raymoe.errors import Problem, ProblemReport
from raymoe.sources.local import is_in_view
from raymoe.sources.types import SourceFile
from raymoe.storage.records import JOURNAL, FileRecord

__all__ = ["Journal", "source_stamps", "sync_folder"]


class Journal:
    """Reads and writes the journal of one output folder. Holds no state but the lock and the name of its run.

    `run` is the run that it writes for; the coordinator's journal gets it from `begin`.
    """

    def __init__(self, root: Path, run: str = "") -> None:
        self.root = root
        self.folder = root / JOURNAL
        self.run = run
        self._lock: int | None = None

    @property
    def exists(self) -> bool:
        """Whether there is an unfinished merge in the folder."""
        return os.path.isfile(self.folder / "plan.json")

    @property
    def is_of_this_run(self) -> bool:
        """Whether the output is still (and, seen from here, at all) the one that this run writes to."""
        return bool(self.run) and self._plan().get("run") == self.run

    def digest(self) -> str | None:
        """Digest of the plan that this journal belongs to; None where there is no readable journal."""
        return self._plan().get("digest") if self.exists else None

    def changed_sources(self, stamps: Mapping[str, int]) -> list[str]:
        """Source files that were modified after the interrupted merge had read them."""
        recorded = self._plan().get("sources", {})
        return sorted(name for name, stamp in stamps.items() if name in recorded and recorded[name] != stamp)

    @property
    def taken(self) -> Problem:
        """What is wrong with an output that `is_taken`."""
        what, remedy = "another merge is writing to this folder", "wait for it to end, or choose another output"
        return Problem(where=str(self.root), what=what, remedy=remedy)

    @property
    def is_taken(self) -> bool:
        """Whether another merge is writing to the output just now."""
        if self._lock is not None:
            return False
        try:
            descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno == errno.EWOULDBLOCK
        finally:
            os.close(descriptor)
        return False

    def lock(self) -> None:
        """Take the output for this process. Raises ProblemReport if another merge holds it."""
        path = self.folder / "lock"
        while self._lock is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # a merge ended just now, and its folder is gone
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno == errno.EWOULDBLOCK:
                    raise ProblemReport([self.taken]) from None
                what = f"its filesystem does not lock files ({error.strerror})"
                remedy = "choose a folder on another one, or mount it with locks"
                raise ProblemReport([Problem(where=str(self.root), what=what, remedy=remedy)]) from None
            if _is_file_at(descriptor, path):
                self._lock = descriptor
            else:
                os.close(descriptor)  # the lock of a merge that ended just now: its file is gone

    def begin(self, digest: str, stamps: Mapping[str, int]) -> None:
        """Begin a run, or go on with an interrupted one; the lock is held. Half-written files are removed."""
        assert self._lock is not None, "a journal is begun under its lock"
        self.clear_parts()
        self.run = uuid.uuid4().hex
        (self.folder / "parts" / self.run).mkdir(parents=True)
        (self.folder / "done").mkdir(exist_ok=True)
        plan = {"digest": digest, "run": self.run, "sources": dict(stamps)}
        write_durably(self.folder / "plan.json", json.dumps(plan).encode())

    def clear_parts(self) -> None:
        """Remove files that were being written; who still writes to one can't finish it."""
        shutil.rmtree(self.folder / "parts", ignore_errors=True)

    def new_part(self, name: str) -> Path:
        """A path for one attempt at writing a file, never given twice."""
        return self.folder / "parts" / self.run / f"{_flat(name)}.{uuid.uuid4().hex}"

    def finished(self, name: str) -> FileRecord | None:
        """The record of a finished file; the caller compares it with the file itself."""
        try:
            return FileRecord(**json.loads(self._done_path(name).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def record(self, record: FileRecord) -> None:
        write_durably(self._done_path(record.name), json.dumps(asdict(record)).encode())

    def clear(self) -> None:
        """Forget everything but the lock; `plan.json` goes first, since it is what makes a journal."""
        (self.folder / "plan.json").unlink(missing_ok=True)
        for folder in ("parts", "done"):
            shutil.rmtree(self.folder / folder, ignore_errors=True)

    def end(self) -> None:
        """The merge is complete: the journal goes, the record stays."""
        self.clear()
        self.release()

    def release(self) -> None:
        """Give the lock back, if it is held. Half-written files go, and the folder too where it holds nothing else."""
        if self._lock is None:
            return
        self.clear_parts()
        is_over = not self.exists
        if is_over:
            (self.folder / "lock").unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None
        if is_over:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _done_path(self, name: str) -> Path:
        return self.folder / "done" / f"{_flat(name)}.json"

    def _plan(self) -> dict:  # type: ignore[type-arg]
        try:
            content = json.loads((self.folder / "plan.json").read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def _is_file_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _flat(name: str) -> str:
    """A file's name without folders: the journal's own folders are flat."""
    return name.replace("/", "__")


def source_stamps(files: Iterable[SourceFile]) -> dict[str, int]:
    """Modification times (ns) of local source files, as they were when the headers were read.

    Files of another machine are left out, unless they are here too. A Hub revision never changes.
    """
    stamps = {}
    for file in files:
        if file.stamp is not None and is_in_view(file):
            stamps[file.location] = file.stamp.mtime_ns
        elif "://" not in file.location and os.path.exists(file.location):
            stamps[file.location] = os.stat(file.location).st_mtime_ns
    return stamps


def write_durably(path: Path, content: bytes) -> None:
    """Replace a small file in one step; after return it survives a crash of the machine."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
