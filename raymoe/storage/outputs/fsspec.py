"""Writes to any fsspec URL (gs://, abfs://, memory://, ...): files as plain streams, with the same journal as on S3.

fsspec has no parts that several processes could send, so one actor sends a shard as one stream.

    actor         sources --stream--> OUT/.raymoe/parts/RUN/FILE.X
    coordinator   looks at the run, moves it to OUT/FILE, notes it

Only the coordinator makes a file visible, in one step as far as the store has one: it renames, or has the store copy. A
newer run removes what older runs have in `parts/`, so that a late move finds nothing to move.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, cast

import xxhash

from raymoe.object_store.errors import StorageError
from raymoe.object_store.fsspec_store import FsspecStore
from raymoe.object_store.protocol import ObjectInfo
from raymoe.planning.plan import Shard
from raymoe.storage.checksums import xxh3_checksum
from raymoe.storage.file_names import FileRecord
from raymoe.storage.object_journal import ObjectJournal
from raymoe.storage.outputs.object_store import StoreOutput
from raymoe.storage.outputs.protocol import Progress, ShardJob
from raymoe.storage.shard_stream import RouterBytes, shard_range
from raymoe.storage.source_reader import SourceReader

_READ_BYTES = 16 << 20


class StreamOutput(StoreOutput[FsspecStore]):
    """Implements `Output` on any file system of fsspec."""

    def _fence_off(self, has_to_clear: bool) -> None:
        self.journal.remove_earlier_parts()

    def _jobs(self, shard: Shard) -> Sequence[ShardJob]:
        return () if self._keep_finished(shard) else (ShardJob(shard=shard),)

    def _do(self, job: ShardJob, reader: SourceReader, progress: Progress, router: RouterBytes | None) -> Any:
        """The URL of the file that is to be moved to its place, and the shard's record."""
        import fsspec

        shard, hasher = job.shard, xxhash.xxh3_128()
        part = self.journal.new_part(shard.file_name)
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
            self.journal.check_run()  # a newer run has removed what was here before, and does not know of this file
        except BaseException:
            with contextlib.suppress(StorageError):
                self._store.delete(part)
            raise
        return part, FileRecord(name=shard.file_name, size=shard.nbytes, checksum=f"xxh3-128:{hasher.hexdigest()}")

    def _complete(self, shard: Shard, results: Sequence[Any]) -> FileRecord:
        part, written = results[0]
        self.journal.check_run()
        place = self.files.place(written.name)
        info = self._store.move(part, place, written.size, before_retry=self._takeover_check)
        self._remember(written.name, info)
        self.journal.record(written)
        return cast(FileRecord, written)

    def _record_written(self, name: str, content: bytes, info: ObjectInfo) -> FileRecord:
        self._written[name] = (len(content), info.etag)
        return FileRecord(name=name, size=len(content), checksum=xxh3_checksum([content]))

    def _checksum(self, name: str, info: ObjectInfo) -> str:
        url, starts = self.files.place(name), range(0, info.size, _READ_BYTES)
        return xxh3_checksum(self._store.read(url, start, min(start + _READ_BYTES, info.size)) for start in starts)

    def _has_open_work(self) -> bool:
        return bool(self.run)

    def _release(self, store: FsspecStore, journal: ObjectJournal, *, keep_uploads: bool) -> None:
        journal.remove_own_parts()
