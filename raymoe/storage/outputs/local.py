"""A local folder as output: files appear whole or not at all, and a finished file is never written twice.

`check_output` looks before anything is written; `LocalOutput` writes. An actor makes its own `LocalOutput` from the
folder's path; only the coordinator begins and ends the journal.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from raymoe.errors import MergeFailed, Problem, ProblemReport
from raymoe.object_store.urls import is_url
from raymoe.planning.multipart import CopyRange, spans
from raymoe.planning.owner import ROUTER
from raymoe.planning.plan import Shard
from raymoe.sources.facts import SourceFile
from raymoe.storage.claim import foreign_file_error, replaced_file_error, taken_over_error
from raymoe.storage.file_names import (
    CHECKPOINT_FILES,
    INDEX_NAME,
    JOURNAL,
    MAX_RESULT_BYTES,
    RECORD_NAME,
    RESULT_NAME,
    FileRecord,
    FinishedMerge,
    is_part_of_a_model,
    is_recorded_file,
    is_result,
    json_object,
)
from raymoe.storage.file_writer import FileWriter, SharedRange
from raymoe.storage.local_journal import Journal, sync_folder
from raymoe.storage.outputs.protocol import Progress, ShardJob
from raymoe.storage.shard_stream import RouterBytes, shard_chunks
from raymoe.storage.source_reader import LOCAL_CHUNK_BYTES, SourceReader
from raymoe.untrusted_files import MAX_JSON_BYTES

__all__ = ["LocalOutput", "check_output", "file_checksum", "recorded_files", "remove_checkpoint"]


class LocalOutput:
    """Implements `Output` on a folder, for the run of that name (the coordinator's is named by the journal)."""

    def __init__(self, root: Path, run: str = "") -> None:
        self.root = root
        self.location = str(root)
        self.journal = Journal(root, run)
        self._written: dict[str, FileRecord] = {}  # by name: what this run has seen completed

    @property
    def run(self) -> str:
        return self.journal.run

    def problems(self, *, digest: str | None, output_bytes: int, overwrite: bool) -> list[Problem]:
        if self.journal.is_taken:
            return [self.journal.taken_problem]
        return check_output(self.root, overwrite=overwrite, digest=digest, output_bytes=output_bytes)

    def digest(self) -> str | None:
        return self.journal.digest()

    def changed_sources(self, fingerprints: Mapping[str, str]) -> list[str]:
        return self.journal.changed_sources(fingerprints)

    def lock(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.journal.lock()
        except OSError as error:
            raise _unusable_output(self.root, error) from error

    def finished_merge(self) -> FinishedMerge | None:
        return finished_merge(self.root)

    def recorded_files(self) -> Sequence[str]:
        return recorded_files(self.root)

    def clean_up(self) -> None:
        if not self.journal.folder.exists():
            return
        self.lock()
        try:
            if self.finished_merge() is not None:
                self._end_journal()
        finally:
            self.release()

    def begin(self, digest: str, fingerprints: Mapping[str, str], *, fresh: bool) -> None:
        try:
            self.journal.begin(digest, fingerprints, fresh=fresh, remove=lambda: remove_checkpoint(self.root))
        except OSError as error:
            raise _unusable_output(self.root, error) from error

    def invalidate(self) -> None:
        self.journal.invalidate()

    def same_store(self, file: SourceFile) -> bool:
        return False

    def is_reachable(self) -> bool:
        return self.journal.is_of_this_run

    def jobs(self, shard: Shard) -> Sequence[ShardJob]:
        return (ShardJob(shard=shard),)

    def do(
        self, job: ShardJob, reader: SourceReader, progress: Progress, router: RouterBytes | None = None
    ) -> FileRecord | None:
        """Write the shard. None if an earlier run left it whole, which is for an actor to find out: it reads it all.

        A router's is written by every run: other hardware gives rows that differ by rounding.
        """
        shard = job.shard
        if shard.owner != ROUTER and self.finished(shard.file_name, shard.nbytes, progress) is not None:
            return None
        return self.write(
            shard.file_name,
            shard_chunks(shard, reader, router),
            expected=shard.nbytes,
            shared=_local_ranges(shard, reader),
            progress=progress,
            check=reader.check_unchanged,
        )

    def complete(self, shard: Shard, results: Sequence[Any]) -> FileRecord:
        self.journal.check_run()
        record: FileRecord | None = results[0] or self.journal.finished(shard.file_name)
        assert record is not None, f"{shard.file_name}: finished without a record"
        self._written[record.name] = record
        return record

    def write_small(self, name: str, content: bytes) -> FileRecord:
        record = self._written[name] = self.write(name, [content])
        return record

    def write_index(self, content: bytes) -> FileRecord:
        self._check_files()
        return self.write_small(INDEX_NAME, content)

    def end(self, record: bytes) -> None:
        self._check_files()
        self.write(RECORD_NAME, [record])
        self.journal.check_run()
        self._end_journal()

    def _end_journal(self) -> None:
        try:
            self.journal.end()
        except OSError as error:
            raise MergeFailed(
                f"{self.journal.folder}: the merge is whole, but its journal could not be removed: "
                f"{error.strerror or error}. Run the same command again when it can be: that removes what is left."
            ) from error

    def other_model_files(self, own: Container[str], index: Mapping[str, Any]) -> list[str]:
        return [] if self.journal.is_clearing else self._other_files(own)

    def _other_files(self, own: Container[str]) -> list[str]:
        """The index is replaced, whatever it is of: nothing of an older run can take its place."""
        return [name for name in _model_files(self.root) if name not in own and name != INDEX_NAME]

    def _check_files(self) -> None:
        """Raise MergeFailed if a file is not there any more as it was written, or a file of another model is there.
        Nothing of an older run can take its place (local_journal.py), so that its size is enough."""
        if others := self._other_files(self._written):
            self.journal.check_run()  # they may be a newer run's
            raise foreign_file_error(str(self.root / others[0]))
        for name, record in self._written.items():
            if _size(self.root / name) != record.size:
                raise replaced_file_error(str(self.root / name))

    def release(self) -> None:
        self.journal.release()

    def finished(self, name: str, size: int, progress: Progress | None = None) -> FileRecord | None:
        """The record of a file that an earlier run finished, if the file still has that size and content.

        `progress` is told of each chunk that is read, as of no bytes: nothing is written.
        """
        record, path = self.journal.finished(name), self.root / name
        if record is None or record.size != size or _size(path) != size:
            return None
        try:
            return record if file_checksum(path, progress) == record.checksum else None
        except OSError:  # it can't be read, and so is written again
            return None

    def write(
        self,
        name: str,
        chunks: Iterable[memoryview | bytes],
        *,
        expected: int | None = None,
        shared: Iterable[SharedRange] = (),
        progress: Progress | None = None,
        check: Callable[[], None] | None = None,
    ) -> FileRecord:
        """Write a file (of `expected` bytes): into the journal's parts, to the disk, then in one step to its place.

        `check` is called before that step; what it raises leaves no file.
        """
        part, place = self.journal.new_part(name), self.root / name
        try:
            self._make_folder(place.parent)
            with FileWriter(part, expected) as file:
                file.share(shared)
                for chunk in chunks:
                    file.append(chunk)
                    if progress is not None:
                        progress(len(chunk), 0)
                checksum = file.finish(None if progress is None else partial(progress, 0, 0))
            assert expected is None or file.size == expected, f"{name}: {file.size} bytes, planned {expected}"
            if check is not None:
                check()
            self.journal.check_run()
            os.replace(part, place)
            sync_folder(place.parent)
            record = FileRecord(name=name, size=file.size, checksum=checksum)
            self.journal.record(record)
        except OSError as error:
            claim = self.journal.claim()
            if claim is not None and claim.run != self.run:  # and so has taken away what this run writes through
                raise taken_over_error(self.location) from error
            raise _write_error(place, error) from error
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        return record

    def _make_folder(self, folder: Path) -> None:
        """A folder within the output for a file, unless it is the output itself."""
        if folder == self.root:
            return
        folder.mkdir(exist_ok=True)
        if folder.is_symlink():
            raise MergeFailed(f"{folder}: this is a link. Remove it and run the same command again.")


def _unusable_output(root: Path, error: OSError) -> ProblemReport:
    what = f"can't be written to: {error.strerror or error}"
    return ProblemReport([Problem(where=str(root), what=what, remedy="choose another output")])


def _local_ranges(shard: Shard, reader: SourceReader) -> Iterator[SharedRange]:
    """The shard's copies from files of this machine, which may be on the output's own filesystem."""
    for span in spans(shard.parts):
        if isinstance(span.what, CopyRange) and not is_url(span.what.file.location):
            with reader.open_descriptor(span.what.file) as descriptor:
                yield descriptor, span.what.start, span.what.end, span.start


def _write_error(path: Path, error: OSError) -> MergeFailed:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(_existing(path.parent)).free
        return MergeFailed(
            f"{path}: the disk is full ({free:,} bytes free). Finished shards are kept: make room and run the same "
            "command again to go on from there."
        )
    return MergeFailed(f"{path}: could not be written: {error.strerror or error}")


def file_checksum(path: Path, progress: Progress | None = None) -> str:
    """XXH3-128 of a file's content, as `xxh3-128:hex` (`xxhsum -H2 FILE` prints the same digits)."""
    hasher = xxhash.xxh3_128()
    for chunk in _file_chunks(path):
        hasher.update(chunk)
        if progress is not None:
            progress(0, 0)
    return f"xxh3-128:{hasher.hexdigest()}"


def _file_chunks(path: Path) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(LOCAL_CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def check_output(root: Path, *, overwrite: bool, digest: str | None, output_bytes: int) -> list[Problem]:
    """What keeps a merge from writing to `root`. Writes nothing. `digest` None: the plan itself has problems."""
    try:
        return _output_problems(root, overwrite, digest, output_bytes)
    except OSError as error:  # a name that is too long, a folder that may not be listed
        what = f"can't be used: {error.strerror or error}"
        return [Problem(where=str(root), what=what, remedy="choose another output")]


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _size(path: Path) -> int | None:
    """Size of a file; None where there is none."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _output_problems(root: Path, overwrite: bool, digest: str | None, output_bytes: int) -> list[Problem]:
    parent = _existing(root)
    if not parent.is_dir():
        what = "the output is a file" if parent == root else f"{parent} is a file, so that no folder can be in it"
        return [Problem(where=str(root), what=what, remedy="name a folder")]
    if links := Journal(root).links():
        return links
    finished = finished_merge(root)
    if finished is not None and finished.digest == digest and not overwrite:
        return finished.problems(str(root), lambda name: _size(root / name))
    problems = []
    if root.is_dir() and not overwrite and (problem := _occupied(root, digest)):
        problems.append(problem)
    if not os.access(parent, os.W_OK | os.X_OK):
        remedy = "choose another output, or change the folder's permissions"
        problems.append(Problem(where=str(root), what=f"no permission to write in {parent}", remedy=remedy))
    elif (free := shutil.disk_usage(parent).free) < (missing := output_bytes - _reusable_bytes(root)):
        what = f"not enough disk: {missing:,} bytes are to be written, {free:,} are free"
        problems.append(Problem(where=str(root), what=what, remedy="make room, or choose another output"))
    return problems


def _occupied(root: Path, digest: str | None) -> Problem | None:
    """Why a folder that exists can't be taken, if it can't: only an unfinished run of this very plan may go on."""
    journal = Journal(root)
    if journal.exists:
        if digest is None or journal.digest() == digest:
            return None
        what = "an unfinished merge of another plan (other config, sources, seed or shard size) is in this folder"
        if journal.claim() is None:
            what = "an unfinished merge of another version of raymoe is in this folder, or its journal is damaged"
        return Problem(where=str(root), what=what, remedy="use --overwrite to discard it, or choose another output")
    if any(path.name != JOURNAL and not _is_result(path) for path in root.iterdir()):
        what = "the output folder is not empty"
        if (root / RECORD_NAME).is_file():
            what = "the output folder holds a finished merge"
        return Problem(where=str(root), what=what, remedy="use --overwrite to replace it, or choose another output")
    return None


def _is_result(path: Path) -> bool:
    size = _size(path)
    try:
        return size is not None and size <= MAX_RESULT_BYTES and is_result(path.read_bytes())
    except OSError:
        return False


def _reusable_bytes(root: Path) -> int:
    """Bytes that need no new room: files that will be kept or replaced."""
    if not root.is_dir():
        return 0
    return sum(p.stat().st_size for pattern in CHECKPOINT_FILES for p in root.glob(pattern) if p.is_file())


def finished_merge(root: Path) -> FinishedMerge | None:
    """The finished merge in a folder, by its record; None where there is none, or a merge has begun to replace it."""
    journal = Journal(root)
    try:
        found = FinishedMerge.of(_record(root))
    except OSError:
        return None
    if found is not None and journal.exists and (journal.digest() != found.digest or journal.is_clearing):
        return None
    return found


def remove_checkpoint(root: Path) -> None:
    """Remove the checkpoint in a folder, record and index first, so that what is left never looks whole.

    A link is removed as the link that it is; nothing that a link leads to is touched.
    """
    recorded = [name for name in recorded_files(root) if name != RESULT_NAME]
    result = [RESULT_NAME] if _is_result(root / RESULT_NAME) else []  # another file of that name is the user's
    for path in map(root.joinpath, (RECORD_NAME, INDEX_NAME, *result, *recorded)):
        if not _is_behind_a_link(root, path) and (path.is_symlink() or not path.is_dir()):
            path.unlink(missing_ok=True)
    templates = root / "chat_templates"
    if templates.is_symlink():
        templates.unlink()
    for name in _model_files(root):
        (root / name).unlink(missing_ok=True)


def _model_files(root: Path) -> list[str]:
    """Names of the files in a folder that a reader takes for a part of a model."""
    there = (*root.glob("*"), *(root / "chat_templates").glob("*"))
    names = (path.relative_to(root).as_posix() for path in there if path.is_file() or path.is_symlink())
    return sorted(filter(is_part_of_a_model, names))


def _is_behind_a_link(root: Path, path: Path) -> bool:
    """Whether a link is on the way from the folder to a path in it; also where there is no such way."""
    between = [parent for parent in path.parents if parent.is_relative_to(root) and parent != root]
    return any(parent.is_symlink() or not parent.is_dir() for parent in between)


def _record(root: Path) -> dict[str, Any]:
    """The record in a folder; empty where it is none. Raises OSError where it can't be read."""
    path = root / RECORD_NAME
    return json_object(path.read_bytes()) if path.stat().st_size <= MAX_JSON_BYTES else {}


def recorded_files(root: Path) -> list[str]:
    """Names of the files that an earlier merge wrote, as far as its record can be read."""
    try:
        files = _record(root).get("files")
    except OSError:
        return []
    names = files if isinstance(files, (dict, list)) else ()
    return [name for name in names if is_recorded_file(name)]
