"""Any fsspec URL as output (gs://, abfs://, memory://, ...): files as plain streams, with the same journal as on S3.

fsspec has no parts that several processes could send: a shard is one stream from one actor. A file is committed when
its stream has ended well and discarded when it has not, so that it appears whole or not at all, as far as the file
system behind it keeps that promise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from raymoe.errors import MergeFailed, Problem
from raymoe.objects.options import StorageOptions
from raymoe.objects.problems import StorageError
from raymoe.objects.store import open_store
from raymoe.objects.urls import join
from raymoe.planning.types import Shard
from raymoe.sources.types import SourceFile
from raymoe.storage.object_journal import ObjectJournal, checkpoint_objects, occupied
from raymoe.storage.output import Progress, ShardJob
from raymoe.storage.reader import SourceReader
from raymoe.storage.records import INDEX_NAME, RECORD_NAME, FileRecord
from raymoe.storage.stream import RouterBytes, shard_range

__all__ = ["StreamOutput"]

_READ_BYTES = 16 << 20


class StreamOutput:
    """Implements `Output` on any file system of fsspec."""

    def __init__(self, location: str, storage: StorageOptions, run: str = "") -> None:
        self.location = location
        self._store = open_store(location, storage)
        self._journal = ObjectJournal(self._store, location, run)

    @property
    def run(self) -> str:
        return self._journal.run

    def problems(self, *, digest: str | None, output_bytes: int, overwrite: bool) -> list[Problem]:
        try:
            problem = occupied(self._store, self._journal, self.location, digest)
        except StorageError as error:
            return list(error.problems)
        return [problem] if problem and not overwrite else []

    def digest(self) -> str | None:
        return self._journal.plan().get("digest")

    def changed_sources(self, stamps: Mapping[str, int]) -> list[str]:
        return self._journal.changed_sources(stamps)

    def lock(self) -> None:
        """Nothing to take: see `ObjectJournal`."""

    def begin(self, digest: str, stamps: Mapping[str, int], *, fresh: bool) -> None:
        if fresh:
            for name in checkpoint_objects(self._store, self.location):
                self._store.delete(join(self.location, name))
            self._journal.clear()
        self._journal.begin(digest, stamps)

    def same_store(self, file: SourceFile) -> bool:
        return False

    def is_reachable(self) -> bool:
        return self._journal.is_of_this_run

    def jobs(self, shard: Shard) -> Sequence[ShardJob]:
        return () if self._finished(shard) is not None else (ShardJob(shard=shard),)

    def do(self, job: ShardJob, reader: SourceReader, progress: Progress, router: RouterBytes | None = None) -> Any:
        import fsspec

        shard, hasher = job.shard, xxhash.xxh3_128()
        filesystem, path = fsspec.url_to_fs(join(self.location, shard.file_name))
        filesystem.makedirs(filesystem._parent(path), exist_ok=True)
        stream = filesystem.open(path, "wb", autocommit=False)
        try:
            for chunk in shard_range(shard, 0, shard.nbytes, reader, router):
                hasher.update(chunk)
                stream.write(bytes(chunk))
                progress(len(chunk), 0)
            stream.close()
        except BaseException:
            stream.discard()
            # Not every file system waits for the commit: what it has made visible already is removed.
            self._store.delete(join(self.location, shard.file_name))
            raise
        stream.commit()
        return FileRecord(name=shard.file_name, size=shard.nbytes, checksum=f"xxh3-128:{hasher.hexdigest()}")

    def complete(self, shard: Shard, results: Sequence[Any]) -> FileRecord:
        if not results:
            record = self._finished(shard)
            assert record is not None, "a shard without jobs is finished"
            return record
        written: FileRecord = results[0]
        self._journal.record(written)
        return written

    def write_small(self, name: str, content: bytes) -> FileRecord:
        if not self._journal.is_of_this_run:
            raise MergeFailed(f"{self.location}: another run of this merge has taken over this output")
        self._store.put(join(self.location, name), content)
        checksum = xxhash.xxh3_128(content).hexdigest()
        return FileRecord(name=name, size=len(content), checksum=f"xxh3-128:{checksum}")

    def write_index(self, content: bytes) -> FileRecord:
        url = join(self.location, INDEX_NAME)
        # fsspec knows no condition that all file systems keep: look first.
        if self._store.stat(url) is not None and self._store.read_all(url) != content:
            raise MergeFailed(f"{url}: an index of something else has appeared here since the merge began")
        return self.write_small(INDEX_NAME, content)

    def end(self, record: bytes) -> None:
        self.write_small(RECORD_NAME, record)
        self._journal.clear()

    def release(self) -> None:
        """Nothing is held: a stream that did not end well was discarded by its writer."""

    def _finished(self, shard: Shard) -> FileRecord | None:
        """The record of a shard that an earlier run finished, if what is there still has that size and content."""
        record, url = self._journal.finished(shard.file_name), join(self.location, shard.file_name)
        info = self._store.stat(url)
        if record is None or info is None or not record.size == shard.nbytes == info.size:
            return None
        hasher = xxhash.xxh3_128()
        for start in range(0, info.size, _READ_BYTES):
            hasher.update(self._store.read(url, start, min(start + _READ_BYTES, info.size)))
        return record if record.checksum == f"xxh3-128:{hasher.hexdigest()}" else None
