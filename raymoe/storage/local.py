"""A local folder as output: files appear whole or not at all, and a finished file is never written twice.

`check_output` looks before anything is written; `LocalOutput` writes. An actor makes its own `LocalOutput` from the
folder's path; only the coordinator begins and ends the journal.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from raymoe.errors import MergeFailed, Problem, ProblemReport
from raymoe.objects.urls import is_url
from raymoe.planning.types import Shard
from raymoe.planning.upload import CopyRange, spans
from raymoe.sources.folder import is_inside
from raymoe.sources.types import SourceFile
from raymoe.storage.journal import Journal, sync_folder
from raymoe.storage.new_file import NewFile, SharedRange
from raymoe.storage.output import Progress, ShardJob
from raymoe.storage.reader import LOCAL_CHUNK_BYTES, SourceReader
from raymoe.storage.records import (
    CHECKPOINT_FILES,
    INDEX_NAME,
    JOURNAL,
    RECORD_NAME,
    RESULT_NAME,
    FileRecord,
    is_part_of_a_model,
)
from raymoe.storage.stream import RouterBytes, shard_chunks

__all__ = ["LocalOutput", "check_output", "file_checksum", "remove_checkpoint"]


class LocalOutput:
    """Implements `Output` on a folder, for the run of that name (the coordinator's is named by the journal)."""

    def __init__(self, root: Path, run: str = "") -> None:
        self.root = root
        self.location = str(root)
        self.journal = Journal(root, run)

    @property
    def run(self) -> str:
        return self.journal.run

    def problems(self, *, digest: str | None, output_bytes: int, overwrite: bool) -> list[Problem]:
        if self.journal.is_taken:
            return [self.journal.taken]
        return check_output(self.root, overwrite=overwrite, digest=digest, output_bytes=output_bytes)

    def digest(self) -> str | None:
        return self.journal.digest()

    def changed_sources(self, stamps: Mapping[str, int]) -> list[str]:
        return self.journal.changed_sources(stamps)

    def lock(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.journal.lock()
        except OSError as error:
            raise _unusable(self.root, error) from error

    def begin(self, digest: str, stamps: Mapping[str, int], *, fresh: bool) -> None:
        try:
            if fresh:
                remove_checkpoint(self.root)
            self.journal.begin(digest, stamps)
        except OSError as error:
            raise _unusable(self.root, error) from error

    def same_store(self, file: SourceFile) -> bool:
        return False

    def is_reachable(self) -> bool:
        return self.journal.is_of_this_run

    def jobs(self, shard: Shard) -> Sequence[ShardJob]:
        return (ShardJob(shard=shard),)

    def do(
        self, job: ShardJob, reader: SourceReader, progress: Progress, router: RouterBytes | None = None
    ) -> FileRecord | None:
        """Write the shard. None if an earlier run left it whole, which is for an actor to find out: it reads it all."""
        shard = job.shard
        if self.finished(shard.file_name, shard.nbytes) is not None:
            return None
        return self.write(
            shard.file_name,
            shard_chunks(shard, reader, router),
            expected=shard.nbytes,
            shared=_local_ranges(shard, reader),
            progress=progress,
        )

    def complete(self, shard: Shard, results: Sequence[Any]) -> FileRecord:
        record: FileRecord | None = results[0] or self.journal.finished(shard.file_name)
        assert record is not None, f"{shard.file_name}: finished without a record"
        return record

    def write_small(self, name: str, content: bytes) -> FileRecord:
        return self.write(name, [content])

    def write_index(self, content: bytes) -> FileRecord:
        return self.write(INDEX_NAME, [content])

    def end(self, record: bytes) -> None:
        self.write(RECORD_NAME, [record])
        self.journal.end()

    def release(self) -> None:
        self.journal.release()

    def finished(self, name: str, size: int) -> FileRecord | None:
        """The record of a file that an earlier run finished, if the file still has that size and content."""
        record, path = self.journal.finished(name), self.root / name
        if record is None or record.size != size or not path.is_file() or path.stat().st_size != size:
            return None
        return record if file_checksum(path) == record.checksum else None

    def write(
        self,
        name: str,
        chunks: Iterable[memoryview | bytes],
        *,
        expected: int | None = None,
        shared: Iterable[SharedRange] = (),
        progress: Progress | None = None,
    ) -> FileRecord:
        """Write a file (of `expected` bytes): into the journal's parts, to the disk, then in one step to its place."""
        part = self.journal.new_part(name)
        try:
            (self.root / name).parent.mkdir(exist_ok=True)
            with NewFile(part, expected) as file:
                file.share(shared)
                for chunk in chunks:
                    file.append(chunk)
                    if progress is not None:
                        progress(len(chunk), 0)
                checksum = file.finish()
            assert expected is None or file.size == expected, f"{name}: {file.size} bytes, planned {expected}"
            os.replace(part, self.root / name)
            sync_folder((self.root / name).parent)
            record = FileRecord(name=name, size=file.size, checksum=checksum)
            self.journal.record(record)
        except OSError as error:
            raise _write_error(self.root / name, error) from error
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        return record


def _unusable(root: Path, error: OSError) -> ProblemReport:
    what = f"can't be written to: {error.strerror or error}"
    return ProblemReport([Problem(where=str(root), what=what, remedy="choose another output")])


def _local_ranges(shard: Shard, reader: SourceReader) -> Iterator[SharedRange]:
    """The shard's copies from files of this machine, which may be on the output's own filesystem."""
    for span in spans(shard.parts):
        if isinstance(span.what, CopyRange) and not is_url(span.what.file.location):
            with reader.opened(span.what.file) as descriptor:
                yield descriptor, span.what.start, span.what.end, span.start


def _write_error(path: Path, error: OSError) -> MergeFailed:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        return MergeFailed(
            f"{path}: the disk is full ({free:,} bytes free). Finished shards are kept: make room and run the same "
            "command again to go on from there."
        )
    return MergeFailed(f"{path}: could not be written: {error.strerror or error}")


def file_checksum(path: Path) -> str:
    """XXH3-128 of a file's content, as `xxh3-128:hex` (`xxhsum -H2 FILE` prints the same digits)."""
    hasher = xxhash.xxh3_128()
    for chunk in _file_chunks(path):
        hasher.update(chunk)
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


def _output_problems(root: Path, overwrite: bool, digest: str | None, output_bytes: int) -> list[Problem]:
    parent = next(p for p in (root, *root.absolute().parents) if p.exists())
    if not parent.is_dir():
        what = "the output is a file" if parent == root else f"{parent} is a file, so that no folder can be in it"
        return [Problem(where=str(root), what=what, remedy="name a folder")]
    problems = []
    if root.is_dir() and not overwrite and (problem := _occupied(root, digest)):
        problems.append(problem)
    if not os.access(parent, os.W_OK | os.X_OK):
        remedy = "choose another output, or change the folder's permissions"
        problems.append(Problem(where=str(root), what=f"no permission to write in {parent}", remedy=remedy))
    elif (free := shutil.disk_usage(parent).free) < (missing := output_bytes - _already_there(root)):
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
        return Problem(where=str(root), what=what, remedy="use --overwrite to discard it, or choose another output")
    if any(path.name != JOURNAL for path in root.iterdir()):
        what = "the output folder is not empty"
        if (root / RECORD_NAME).is_file():
            what = "the output folder holds a finished merge"
        return Problem(where=str(root), what=what, remedy="use --overwrite to replace it, or choose another output")
    return None


def _already_there(root: Path) -> int:
    """Bytes that need no new room: files that will be kept or replaced."""
    if not root.is_dir():
        return 0
    return sum(p.stat().st_size for pattern in CHECKPOINT_FILES for p in root.glob(pattern) if p.is_file())


def remove_checkpoint(root: Path) -> None:
    """Remove the checkpoint in a folder, record and index first, so that what is left never looks whole.

    The journal goes too, but for its lock, which the caller holds.
    """
    recorded = _recorded_files(root)
    for path in (*(root / name for name in (RECORD_NAME, INDEX_NAME, RESULT_NAME)), *map(root.joinpath, recorded)):
        path.unlink(missing_ok=True)
    for path in (*root.glob("*"), *root.glob("chat_templates/*")):
        if path.is_file() and is_part_of_a_model(path.relative_to(root).as_posix()):
            path.unlink(missing_ok=True)
    Journal(root).clear()


def _recorded_files(root: Path) -> list[str]:
    """Names of the files that an earlier merge wrote, as far as its record can be read."""
    try:
        names = list(json.loads((root / RECORD_NAME).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in names if isinstance(name, str) and is_inside(name)]
