"""Any fsspec URL as output (gs://, abfs://, memory://, ...): files as plain streams, with the same journal as on S3.

fsspec has no parts that several processes could send: a shard is one stream from one actor.

    actor         sources --stream--> OUT/.raymoe/parts/RUN/FILE.X
    coordinator   looks at the run, moves it to OUT/FILE, notes it

Only the coordinator makes a file visible, in one step as far as the store has one: it renames, or has the store copy. A
newer run removes what older runs have in `parts/`, so that a late move finds nothing to move.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import xxhash

from raymoe.object_store.errors import StorageError
from raymoe.object_store.fsspec_store import FsspecStore
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.registry import open_store
from raymoe.object_store.urls import join_url
from raymoe.planning.owner import ROUTER
from raymoe.planning.plan import Shard
from raymoe.sources.facts import SourceFile
from raymoe.storage.file_names import INDEX_NAME, FileRecord
from raymoe.storage.object_journal import ObjectJournal, remove_checkpoint
from raymoe.storage.outputs.object_store import StoreOutput
from raymoe.storage.outputs.protocol import Progress, ShardJob
from raymoe.storage.shard_stream import RouterBytes, shard_range
from raymoe.storage.source_reader import SourceReader

__all__ = ["StreamOutput"]

_READ_BYTES = 16 << 20
_RELEASE_S = 60


class StreamOutput(StoreOutput[FsspecStore]):
    """Implements `Output` on any file system of fsspec."""

    def __init__(self, location: str, storage: StorageOptions, run: str = "") -> None:
        super().__init__(location, cast(FsspecStore, open_store(location, storage)), storage, run)

    def begin(self, digest: str, fingerprints: Mapping[str, str], *, fresh: bool) -> None:
        has_to_clear = self._journal.begin(digest, fingerprints, fresh=fresh)
        self._journal.remove_earlier_parts()
        if has_to_clear:
            remove_checkpoint(self._store, self.location, self._journal.check_run)
            self._journal.mark_cleared()

    def same_store(self, file: SourceFile) -> bool:
        return False

    def jobs(self, shard: Shard) -> Sequence[ShardJob]:
        # A router's shard is written by every run: other hardware gives rows that differ by rounding.
        if shard.owner != ROUTER and (record := self._finished(shard)) is not None:
            self._kept[shard.file_name] = record
            return ()
        return (ShardJob(shard=shard),)

    def do(self, job: ShardJob, reader: SourceReader, progress: Progress, router: RouterBytes | None = None) -> Any:
        """The URL of the file that is to be moved to its place, and the shard's record."""
        import fsspec

        shard, hasher = job.shard, xxhash.xxh3_128()
        part = self._journal.new_part(shard.file_name)
        filesystem, path = fsspec.url_to_fs(part)
        filesystem.makedirs(filesystem._parent(path), exist_ok=True)
        stream = filesystem.open(path, "wb", autocommit=False)
        try:
            try:
                for chunk in shard_range(shard, 0, shard.nbytes, reader, router):
                    hasher.update(chunk)
                    stream.write(bytes(chunk))
                    progress(len(chunk), 0)
                reader.check_unchanged()
                stream.close()
            except BaseException:
                stream.discard()
                raise
            stream.commit()
            self._journal.check_run()  # a newer run has removed what was here before, and does not know of this file
        except BaseException:
            with contextlib.suppress(StorageError):
                self._store.delete(part)
            raise
        return part, FileRecord(name=shard.file_name, size=shard.nbytes, checksum=f"xxh3-128:{hasher.hexdigest()}")

    def complete(self, shard: Shard, results: Sequence[Any]) -> FileRecord:
        if shard.file_name in self._kept:
            return self._kept[shard.file_name]
        part, written = results[0]
        self._journal.check_run()
        try:
            info = self._store.move(part, join_url(self.location, written.name), written.size)
        except StorageError:
            self._journal.check_run()  # a newer run removes what is to be moved
            raise
        self._written.add(written.name, info.size, info.etag)
        self._journal.record(written)  # looks at the run again
        return cast(FileRecord, written)

    def write_small(self, name: str, content: bytes) -> FileRecord:
        info = self._put_small(name, content)
        self._written.add(name, len(content), info.etag)
        checksum = xxhash.xxh3_128(content).hexdigest()
        return FileRecord(name=name, size=len(content), checksum=f"xxh3-128:{checksum}")

    def write_index(self, content: bytes) -> FileRecord:
        self._check_files()
        self._check_index(content)
        return self.write_small(INDEX_NAME, content)

    def release(self) -> None:
        """Remove what this run was writing. A store that does not answer is not waited for long."""
        if not self.run:
            return
        options = replace(self._storage, deadline_s=min(_RELEASE_S, self._storage.deadline_s))
        with contextlib.suppress(StorageError):
            ObjectJournal(open_store(self.location, options), self.location, self.run).remove_own_parts()

    def _finished(self, shard: Shard) -> FileRecord | None:
        """The record of a shard that an earlier run finished, if what is there still has that size and content."""
        record, url = self._journal.finished(shard.file_name), join_url(self.location, shard.file_name)
        info = self._store.stat(url)
        if record is None or info is None or not record.size == shard.nbytes == info.size:
            return None
        hasher = xxhash.xxh3_128()
        for start in range(0, info.size, _READ_BYTES):
            hasher.update(self._store.read(url, start, min(start + _READ_BYTES, info.size)))
        if record.checksum != f"xxh3-128:{hasher.hexdigest()}":
            return None
        self._written.add(shard.file_name, info.size, info.etag)
        return record
