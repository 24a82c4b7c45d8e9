"""Writes to a local folder: files appear complete or not at all, and a finished file is never written again.

An actor creates its own `LocalOutput` from the folder's path; only the coordinator begins and ends the journal.
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

from raymoe.errors import MergeFailed, Problem, ProblemReport
from raymoe.planning.multipart import CopyRange, spans
from raymoe.planning.plan import Shard
from raymoe.storage.atomic_file import sync_folder
from raymoe.storage.checksums import xxh3_checksum
from raymoe.storage.claim import taken_over_error
from raymoe.storage.file_names import CHECKPOINT_FILES, INDEX_NAME, RECORD_NAME, FileRecord
from raymoe.storage.file_writer import FileWriter, SharedRange
from raymoe.storage.local_journal import Journal
from raymoe.storage.output_files import FolderFiles, file_size
from raymoe.storage.outputs.base import BaseOutput, goes_on
from raymoe.storage.outputs.protocol import Progress, ShardJob
from raymoe.storage.shard_stream import RouterBytes, shard_chunks
from raymoe.storage.source_reader import LOCAL_CHUNK_BYTES, SourceReader


class LocalOutput(BaseOutput):
    """Implements `Output` on a folder, for the run of this name (the coordinator's is named by the journal)."""

    journal: Journal

    def __init__(self, root: Path, run: str = "") -> None:
        super().__init__(FolderFiles(root), Journal(root, run))
        self.root = root
        self._written: dict[str, FileRecord] = {}  # by name: the files that this run has seen completed

    def problems(self, *, digest: str | None, output_bytes: int, overwrite: bool) -> list[Problem]:
        if self.journal.is_taken:
            return [self.journal.taken_problem]
        try:
            return self._unusable_problems() or super().problems(
                digest=digest, output_bytes=output_bytes, overwrite=overwrite
            )
        except OSError as error:  # the name is too long, or the folder may not be listed
            what = f"can't be used: {error.strerror or error}"
            return [Problem(where=self.location.text, what=what, remedy="choose another output")]

    def _unusable_problems(self) -> list[Problem]:
        parent = _existing(self.root)
        if parent.is_dir():
            return self.journal.links()
        what = f"{parent} is a file, so that no folder can be in it"
        if parent == self.root:
            what = "the output is a file"
        return [Problem(where=self.location.text, what=what, remedy="name a folder")]

    def _room_problems(self, output_bytes: int) -> list[Problem]:
        parent = _existing(self.root)
        if not os.access(parent, os.W_OK | os.X_OK):
            what = f"no permission to write in {parent}"
            remedy = "choose another output, or change the folder's permissions"
            return [Problem(where=self.location.text, what=what, remedy=remedy)]
        free, missing = shutil.disk_usage(parent).free, output_bytes - _reusable_bytes(self.root)
        if free >= missing:
            return []
        what = f"not enough disk: {missing:,} bytes are to be written, {free:,} are free"
        return [Problem(where=self.location.text, what=what, remedy="make room, or choose another output")]

    def lock(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.journal.lock()
        except OSError as error:
            raise _unusable_output(self.root, error) from error

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
            self.journal.begin(digest, fingerprints, fresh=fresh, remove=self.files.remove_checkpoint)
        except OSError as error:
            raise _unusable_output(self.root, error) from error

    def one_look(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def kept_reads(self) -> bytes:
        return b""

    def keep_reads(self, content: bytes) -> None:
        """Keeps nothing: what planning reads is mostly local too, where the output is a folder."""

    def jobs(self, shard: Shard) -> Sequence[ShardJob]:
        return (ShardJob(shard=shard),)

    def do(
        self, job: ShardJob, reader: SourceReader, progress: Progress, router: RouterBytes | None = None
    ) -> FileRecord | None:
        """Write the shard. None if an earlier run completed it; an actor checks that, since the check reads the whole
        file."""
        shard = job.shard
        if goes_on(shard) and self.finished(shard.file_name, shard.nbytes, progress) is not None:
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

    def _write_index(self, content: bytes) -> FileRecord:
        """Replace any index here, whatever merge it belongs to: an older run can't replace this run's files."""
        return self.write_small(INDEX_NAME, content)

    def _write_record(self, record: bytes) -> None:
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

    def _written_names(self) -> Container[str]:
        return self._written

    def _replaced_files(self) -> Iterable[str]:
        """As in the base class, by size: an older run can't replace this run's files (local_journal.py)."""
        size_of = self.files.size_of()
        return (name for name, record in self._written.items() if size_of(name) != record.size)

    def release(self, *, keep_uploads: bool = False) -> None:
        self.journal.release()

    def finished(self, name: str, size: int, progress: Progress | None = None) -> FileRecord | None:
        """The record of a file that an earlier run finished, if the file still has that size and content.

        `progress` is called for each chunk that is read, with zero bytes: nothing is written.
        """
        record, path = self.journal.finished(name), self.root / name
        if record is None or record.size != size or file_size(path) != size:
            return None
        try:
            return record if file_checksum(path, progress) == record.checksum else None
        except OSError:  # it can't be read, so it is written again
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
        """Write a file (of `expected` bytes) into the journal's parts, sync it to the disk, then rename it in one step.

        `check` is called before the rename; if it raises, no file is left.
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
            if claim is not None and claim.run != self.run:  # so it has removed the folder that this run writes through
                raise taken_over_error(self.location.text) from error
            raise _write_error(place, error) from error
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        return record

    def _make_folder(self, folder: Path) -> None:
        """Create a folder within the output for a file, unless it is the output itself."""
        if folder == self.root:
            return
        folder.mkdir(exist_ok=True)
        if folder.is_symlink():
            raise MergeFailed(f"{folder}: this is a link. Remove it and run the same command again.")


def _unusable_output(root: Path, error: OSError) -> ProblemReport:
    what = f"can't be written to: {error.strerror or error}"
    return ProblemReport([Problem(where=str(root), what=what, remedy="choose another output")])


def _local_ranges(shard: Shard, reader: SourceReader) -> Iterator[SharedRange]:
    """The shard's copies from files of this machine, which may share the output's filesystem."""
    for span in spans(shard.parts):
        if isinstance(span.what, CopyRange) and not span.what.file.kind.is_object:
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

    def chunks() -> Iterator[memoryview]:
        buffer = memoryview(bytearray(LOCAL_CHUNK_BYTES))
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]
                if progress is not None:
                    progress(0, 0)

    return xxh3_checksum(chunks())


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _reusable_bytes(root: Path) -> int:
    """Bytes that need no additional space: files that will be kept or replaced."""
    if not root.is_dir():
        return 0
    return sum(p.stat().st_size for pattern in CHECKPOINT_FILES for p in root.glob(pattern) if p.is_file())
