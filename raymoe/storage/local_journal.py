"""The journal of a merge in `.raymoe/` inside the output folder. It makes an interrupted merge resumable and safe.

    OUT/.raymoe/lock                held (flock) while a merge runs, so that two never write one output
    OUT/.raymoe/plan.json           whose the output is (claim.py): plan, run, stamps of the sources; written first
    OUT/.raymoe/parts/RUN/FILE.X    a file being written; moved to OUT/FILE when it is whole and on disk
    OUT/.raymoe/done/FILE.json      size and checksum of a finished file, plan and run; written after the move
    OUT/.raymoe/clearing.RUN        there while the run removes what an earlier merge left (--overwrite), and after
                                    its sources changed: the next run removes what is there
    OUT/raymoe.json                 the record of the finished merge; written last, then `.raymoe/` is removed

A folder with `.raymoe/plan.json` is unfinished, whatever else is in it. Every step here can be repeated at any point.

Writers may outlive their run: the actors of a killed driver, or an actor on a node that was lost and replaced. So every
attempt at a file has its own name (X), and every run its own folder (RUN). All files of the run are renamed from there
to their final names, the journal's own files too. A new run writes `plan.json` first; then it removes the folders of
all other runs. After that, a late writer can't rename an open file into the output or the journal any more. Only then
does the new run remove the files of an earlier merge.

Links are never followed: a journal, or a folder of it, that is a link is rejected.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from raymoe.errors import Problem, ProblemReport
from raymoe.sources.facts import SourceFile
from raymoe.sources.local_folder import file_fingerprint, is_in_view, small_sample
from raymoe.storage.atomic_file import has_name, replace_file, sync_folder, try_lock
from raymoe.storage.base_journal import CLEARING, BaseJournal, flat_name
from raymoe.storage.file_names import JOURNAL, FileRecord, json_object

# how long to retry a lock that is held by processes that only check it, each for a moment
_LOCK_PROBE_TIMEOUT_S = 10.0
_REMOVE_TRIES = 4
_OPEN_ON_NFS = ".nfs"  # the name of a removed file there until the last process has closed it


class Journal(BaseJournal):
    """Reads and writes the journal of one output folder. Its only state is the lock and the name of its run."""

    def __init__(self, root: Path, run: str = "") -> None:
        super().__init__(str(root), run)
        self.root = root
        self.folder = root / JOURNAL
        self._lock: int | None = None

    @property
    def exists(self) -> bool:
        return os.path.isfile(self.folder / "plan.json")

    def links(self) -> list[Problem]:
        """Problems for journal files and folders that are links: changes to them would happen elsewhere."""
        places = (self.folder, *(self.folder / name for name in ("lock", "plan.json", "parts", "done")))
        remedy = "remove the link, or choose another output"
        return [Problem(where=str(p), what="this is a link", remedy=remedy) for p in places if p.is_symlink()]

    @property
    def taken_problem(self) -> Problem:
        """The problem of an output that `is_taken`."""
        what, remedy = "another merge is writing to this folder", "wait for it to end, or choose another output"
        return Problem(where=str(self.root), what=what, remedy=remedy)

    @property
    def is_taken(self) -> bool:
        """Whether another merge is writing to the output now."""
        if self._lock is not None:
            return False
        try:
            descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            return _is_held(descriptor)
        except OSError:  # a filesystem without locks, which `lock` reports
            return False
        finally:
            os.close(descriptor)

    def lock(self) -> None:
        """Lock the output for this process. Raises ProblemReport if another merge holds the lock."""
        path, deadline = self.folder / "lock", time.monotonic() + _LOCK_PROBE_TIMEOUT_S
        while self._lock is None:
            if links := self.links():
                raise ProblemReport(links)
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:
                continue  # a merge just ended, and removed its folder
            try:
                is_locked = self._try_lock(descriptor, is_late=time.monotonic() > deadline)
            except BaseException:
                os.close(descriptor)
                raise
            if is_locked and has_name(descriptor, path):
                self._lock = descriptor
            else:
                os.close(descriptor)  # a process checked it, or it is the lock of a merge that has just ended

    def _try_lock(self, descriptor: int, *, is_late: bool) -> bool:
        """Whether the lock was acquired. False if only checking processes hold it; raises ProblemReport if a merge
        does."""
        try:
            if try_lock(descriptor):
                return True
        except OSError as error:
            what = f"its filesystem does not lock files ({error.strerror})"
            remedy = "choose a folder on another one, or mount it with locks"
            raise ProblemReport([Problem(where=str(self.root), what=what, remedy=remedy)]) from None
        if _is_held(descriptor) or is_late:
            raise ProblemReport([self.taken_problem])
        return False

    def begin(
        self,
        digest: str,
        fingerprints: Mapping[str, str],
        *,
        fresh: bool = False,
        remove: Callable[[], None] | None = None,
    ) -> None:
        """Begin a run, or resume an interrupted one; the lock is held.

        First all other runs are fenced off, and half-written files removed. With `fresh`, or if a run was interrupted
        during this removal, `remove` is then called to remove the files of an earlier merge.
        """
        assert self._lock is not None, "a journal is begun under its lock"
        before, self.run = self.claim(), uuid.uuid4().hex
        fresh = fresh or self.is_clearing
        claim = self._next_claim(before, digest, fingerprints, fresh=fresh)
        (self.folder / "parts" / self.run).mkdir(parents=True)
        if fresh:
            self._clearing_path(self.run).touch()
        self._write("plan.json", claim.plain())
        self._remove_other_runs()
        if claim.origin == self.run:  # nothing is resumed
            _remove(self.folder / "done")
        if fresh and remove is not None:
            remove()
        (self.folder / "done").mkdir(exist_ok=True)
        self._forget_clearing()

    def invalidate(self) -> None:
        """As `BaseJournal.invalidate`; raises OSError too."""
        self._clearing_path(self.check_run().origin).touch()

    def _remove_other_runs(self) -> None:
        """Remove the folders of all other runs, so that they can't rename a file to its final name any more."""
        for folder in (self.folder / "parts").iterdir():
            if folder.name != self.run:
                _remove(folder)
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Remove the rest of folders whose removal was killed, and of an older raymoe's interrupted write of
        `plan.json`."""
        for pattern in ("*.gone", "plan.json.*.tmp"):
            for left in self.folder.glob(pattern):
                _remove(left)

    def clear_parts(self) -> None:
        """Remove the files that this run was writing; a process that still writes to one can't finish it."""
        if self.run:
            _remove(self.folder / "parts" / self.run)
        with contextlib.suppress(OSError):
            (self.folder / "parts").rmdir()  # fails if another run has taken over

    def new_part(self, name: str) -> Path:
        """A unique path for one attempt at writing a file."""
        return self.folder / "parts" / self.run / f"{flat_name(name)}.{uuid.uuid4().hex}"

    def finished(self, name: str) -> FileRecord | None:
        note, claim = self._read(f"done/{flat_name(name)}.json"), self.claim()
        if claim is None or self.run not in ("", claim.run):
            return None
        return claim.accepted_record(note)

    def clear(self) -> None:
        """Remove everything but the lock. `plan.json` goes first, since it is what marks a journal. Raises OSError."""
        (self.folder / "plan.json").unlink(missing_ok=True)
        for name in ("parts", "done"):
            _remove(self.folder / name)
        self._forget_clearing()
        self._remove_leftovers()

    def end(self) -> None:
        """The merge is complete: remove the journal and keep the record. Raises OSError if it can't be removed."""
        self.clear()
        self.release()

    def release(self) -> None:
        """Release the lock, if it is held. Removes half-written files, and the folder too if it holds nothing else.

        Files that can't be removed stay for the next run: the merge's own outcome matters more.
        """
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            self.clear_parts()
        is_over = not self.exists
        if is_over:
            with contextlib.suppress(OSError):
                (self.folder / "lock").unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None
        if is_over:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _is_marked(self, run: str) -> bool:
        return self._clearing_path(run).exists()

    def _clearing_path(self, run: str) -> Path:
        return self.folder / f"{CLEARING}{run}"

    def _forget_clearing(self) -> None:
        for marker in self.folder.glob(f"{CLEARING}*"):
            marker.unlink(missing_ok=True)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return json_object((self.folder / name).read_bytes())
        except OSError:
            return {}

    def _note(self, kind: str, name: str, content: Mapping[str, Any]) -> None:
        self._write(f"{kind}/{name}", {**self.check_run().signature, **content})

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace a small file of the journal in one step; afterwards it survives a crash of the machine."""
        path = self.folder / name
        replace_file(path, self.new_part(name), json.dumps(content).encode())
        sync_folder(path.parent)


def _is_held(descriptor: int) -> bool:
    """Whether a merge holds the lock. Processes that check it, as this does, hold it too, but shared. Raises
    OSError."""
    if not try_lock(descriptor, fcntl.LOCK_SH):
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def _remove(path: Path) -> None:
    """Remove a folder with its content; of a link, only the link. Raises OSError if it can't be renamed.

    It is renamed first: then a process that writes into it can't reach it by the old name. On NFS another machine may
    still know it for a while and add a file, which fails once the folder is gone.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    gone = path.with_name(f"{uuid.uuid4().hex}.gone")
    os.rename(path, gone)
    for _ in range(_REMOVE_TRIES):
        shutil.rmtree(gone, ignore_errors=True)
        if not gone.exists():
            return
    if any(not left.name.startswith(_OPEN_ON_NFS) for left in gone.rglob("*") if left.is_file()):
        shutil.rmtree(gone)


def source_fingerprints(files: Iterable[SourceFile]) -> dict[str, str]:
    """Fingerprints that tell versions of a local source file apart between two runs, by location: its modification time
    when the header was read, and a sample.

    Files of another machine are left out, unless they are here too. A Hub revision never changes.
    """
    fingerprints = {}
    for file in files:
        if not file.kind.is_local:
            continue
        planned = file.stamp if is_in_view(file) else None
        with contextlib.suppress(OSError):
            mtime_ns = planned.mtime_ns if planned is not None else os.stat(file.location).st_mtime_ns
            fingerprints[file.location] = file_fingerprint([(socket.gethostname(), mtime_ns)], small_sample(file))
    return fingerprints
