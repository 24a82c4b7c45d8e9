"""An S3 prefix as output: shards become objects by multipart uploads, whose parts the store copies itself where it can.

The coordinator opens a shard's upload, actors send its parts or have them copied, the coordinator completes it: that is
the moment in which the whole object becomes visible. Several actors may feed one upload. An upload that a dead run left
is taken up again where its id is known, with those of its parts that were noted as sent; it is aborted where it is of
another merge. Where only the intention is known, all uploads of that key are aborted that were opened after it: a store
does not tell which program has opened one. All other uploads are of other programs, and are left alone.

Memory: the parts that a process sends at one time share `_SENDING_BYTES`, whatever the number of its jobs. A part
counts with its own bytes (reading and the connection's buffer take about as many again), a computed one with more.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from raymoe.object_store.errors import UploadNotFound, object_replaced_error
from raymoe.object_store.location import LocationKind
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.protocol import MultipartStore, ObjectInfo, UploadedPart
from raymoe.object_store.s3_responses import is_md5
from raymoe.planning.multipart import UploadPart, upload_parts
from raymoe.planning.plan import Columns, Shard, Transform
from raymoe.sources.facts import SourceFile
from raymoe.storage.checksums import hex_digest
from raymoe.storage.claim import Claim
from raymoe.storage.file_names import FileRecord
from raymoe.storage.object_journal import ObjectJournal, RecordedUpload
from raymoe.storage.outputs.base import goes_on
from raymoe.storage.outputs.object_store import StoreOutput
from raymoe.storage.outputs.protocol import Progress, ShardJob
from raymoe.storage.shard_stream import RouterBytes, read_stream, shard_range
from raymoe.storage.source_reader import SourceReader

_PARTS_AT_ONCE = 4
_SENDING_BYTES = 96 << 20
_COMPUTING_BYTES = 32 << 20
# A job is small enough that a death costs little, and that two actors share a large shard.
_JOB_SENT_BYTES = 256 << 20
_JOB_COPIED_BYTES = 8 << 30
_META_PLAN, _META_ORIGIN = "raymoe-plan", "raymoe-origin"
_READ_BYTES = 16 << 20


class S3Output(StoreOutput[MultipartStore]):
    """Implements `Output` on S3."""

    def __init__(self, location: str, storage: StorageOptions, run: str = "") -> None:
        super().__init__(location, storage, run)
        self._uploads: dict[str, str] = {}  # shard -> id of its open upload
        self._known_parts: dict[str, list[UploadedPart]] = {}  # parts that an earlier run sent
        self._metadata: dict[str, str] = {}  # of all shards
        self._memory = _Budget(_SENDING_BYTES)

    def _fence_off(self, has_to_clear: bool) -> None:
        claim = self.journal.check_run()
        # Of the merge, not of the run: uploads of earlier runs of it are completed by later ones.
        self._metadata = {_META_PLAN: claim.digest, _META_ORIGIN: claim.origin}
        earlier = (each for each in self.journal.all_earlier_uploads() if has_to_clear or not each.is_own)
        self._abort(earlier, self.journal.check_run)

    def same_store(self, file: SourceFile) -> bool:
        return file.kind is LocationKind.S3

    def jobs(self, shard: Shard) -> Sequence[ShardJob]:
        name = shard.file_name
        if self._keep_finished(shard):
            self._abort(self.journal.earlier_uploads(name), self.journal.check_run)
            return ()
        parts = upload_parts(shard, self.same_store)
        if name not in self._uploads:
            self._uploads[name], there = self._open_upload(name, goes_on=goes_on(shard))
            known = {part.number: part for part in there}
            done = [known[p.number] for p in parts if p.number in known and known[p.number].size == p.nbytes]
            self._known_parts[name] = done
        numbers = {part.number for part in self._known_parts[name]}
        missing = [part for part in parts if part.number not in numbers]
        return [ShardJob(shard=shard, upload_id=self._uploads[name], parts=group) for group in _groups(missing)]

    def do(self, job: ShardJob, reader: SourceReader, progress: Progress, router: RouterBytes | None = None) -> Any:
        """The parts that the store has now. `router` gives computed rows."""
        assert job.upload_id is not None
        upload_id, url = job.upload_id, self.files.place(job.shard.file_name)

        def send(part: UploadPart) -> UploadedPart:
            if part.copy is not None:
                source = part.copy
                there = self._store.copy_part(
                    url, upload_id, part.number, source.file.location, source.start, source.end, source.file.etag
                )
                progress(0, part.nbytes)
                return there
            with self._memory.reserve(_bytes_to_send(job.shard, part)):
                chunks = shard_range(job.shard, part.start, part.end, reader, router)
                there = self._store.upload_part(url, upload_id, part.number, read_stream(chunks, part.nbytes))
            progress(part.nbytes, 0)
            return there

        with ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="upload") as pool:
            sent = list(pool.map(send, job.parts))
        reader.check_unchanged()  # before the parts are noted, and taken for good by a later run
        self.journal.record_sent(job.shard.file_name, upload_id, sent)
        return sent

    def _complete(self, shard: Shard, results: Sequence[Any]) -> FileRecord:
        name = shard.file_name
        parts = [*self._known_parts[name], *(part for result in results for part in result)]
        parts.sort(key=lambda part: part.number)
        url, upload_id = self.files.place(name), self._uploads[name]
        self.journal.check_run()
        info = self._store.complete_upload(url, upload_id, parts, metadata=self._metadata)
        assert info.size == shard.nbytes, f"{url}: {info.size} bytes, planned {shard.nbytes}"
        self._remember(name, info)
        record = FileRecord(name=name, size=info.size, checksum=self._checksum(name, info))
        self.journal.record(record)  # looks at the run again
        self.journal.forget_upload(name)
        del self._uploads[name], self._known_parts[name]
        return record

    def _record_written(self, name: str, content: bytes, info: ObjectInfo) -> FileRecord:
        url = self.files.place(name)
        there = self._store.stat(url)
        if there is None or there.size != len(content):
            raise object_replaced_error(url)
        # An MD5 was compared with what was sent. Another one now is of other bytes; a store may also tell none.
        etags = [etag for etag in (info.etag, there.etag) if etag is not None and is_md5(etag)]
        if len(set(etags)) > 1:
            raise object_replaced_error(url)
        self._remember(name, there)
        return FileRecord(name=name, size=len(content), checksum=self._checksum(name, info))

    def _clear(self, claim: Claim) -> None:
        uploads = self.journal.all_uploads()
        self.journal.check_claim(claim)  # and so none of them is a newer run's
        self._abort(uploads, lambda: self.journal.check_claim(claim))
        super()._clear(claim)

    def _has_open_work(self) -> bool:
        return bool(self._uploads)

    def _release(self, store: MultipartStore, journal: ObjectJournal) -> None:
        """Abort what this process has opened; a run that was replaced leaves the uploads to the newer one, which has
        found them in the journal."""
        uploads, self._uploads = self._uploads, {}
        if journal.is_of_this_run:
            for name, upload_id in uploads.items():
                store.abort_upload(self.files.place(name), upload_id)
                journal.forget_upload(name)

    def _checksum(self, name: str, info: ObjectInfo) -> str:
        """The store's own digest of the object, or with `storage.checksum: sha256` one of its bytes, read back."""
        if self._storage.checksum is None:
            return f"etag:{info.etag}"
        url = self.files.place(name)
        there = self._store.stat(url)
        assert there is not None
        starts = range(0, there.size, _READ_BYTES)
        read = (self._store.read(url, start, min(start + _READ_BYTES, there.size), there.etag) for start in starts)
        return f"sha256:{hex_digest(hashlib.sha256(), read)}"

    def _open_upload(self, name: str, *, goes_on: bool) -> tuple[str, Sequence[UploadedPart]]:
        """An upload of `name`: where `goes_on`, the one that an earlier run of this merge left, with the parts that it
        noted; else a new one."""
        url = self.files.place(name)
        earlier, taken = self.journal.earlier_uploads(name), None
        if goes_on:
            taken = next((upload for upload in earlier if upload.is_own and self._is_open(upload)), None)
        same = [upload for upload in earlier if taken is not None and upload.upload_id == taken.upload_id]
        self._abort((upload for upload in earlier if upload not in same), self.journal.check_run)
        if taken is not None and taken.upload_id is not None:
            self.journal.record_upload(name, taken.upload_id)
            for upload in same:  # two, where a run was killed between its own note and the removal of the older one
                self.journal.forget(upload)
            there, sent = self._store.list_parts(url, taken.upload_id), self.journal.sent_parts(name, taken.upload_id)
            return taken.upload_id, [part for part in there if part in sent]
        known = [upload.upload_id for upload in self._store.list_uploads(url) if upload.url == url]
        self.journal.announce_upload(name, known=known)
        upload_id = self._create_upload(url, known=known)
        try:
            self.journal.record_upload(name, upload_id)
        except BaseException:
            # A newer run may have read the journal before the note was there: it does not know this upload.
            self._store.abort_upload(url, upload_id)
            self.journal.forget_upload(name)
            raise
        return upload_id, ()

    def _is_open(self, upload: RecordedUpload) -> bool:
        if upload.upload_id is None:
            return False
        try:
            self._store.list_parts(self.files.place(upload.name), upload.upload_id)
        except UploadNotFound:
            return False
        return True

    def _abort(self, uploads: Iterable[RecordedUpload], check: Callable[[], object]) -> None:
        """Abort what was noted of uploads, and remove the notes.

        Where a run died between its intention and the id, what was opened since then is taken for its own: a store does
        not tell which program has opened an upload. `check` raises where a newer run, with uploads of its own, has the
        output.
        """
        for upload in uploads:
            url = self.files.place(upload.name)
            ids = [upload.upload_id]
            if upload.upload_id is None:
                ids = [*self._opened_since(url, upload.known)]
                check()
            for upload_id in filter(None, ids):
                self._store.abort_upload(url, upload_id)
            self.journal.forget(upload)

    def _opened_since(self, url: str, known: Sequence[str]) -> list[str]:
        found = [upload.upload_id for upload in self._store.list_uploads(url) if upload.url == url]
        mine = self._uploads.values()
        return [upload_id for upload_id in found if upload_id not in known and upload_id not in mine]

    def _create_upload(self, url: str, known: Sequence[str]) -> str:
        """Begin an upload. Where a reply was lost and the store asked again, there are two: the first is aborted."""
        retries = self._store.counters.retries
        upload_id = self._store.create_upload(url, metadata=self._metadata)
        if self._store.counters.retries > retries:
            for other in self._opened_since(url, known=(upload_id, *known)):
                self.journal.check_run()
                self._store.abort_upload(url, other)
        return upload_id


class _Budget:
    """Lets threads go on as long as what they take together stays within a limit; one alone may exceed it."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + count <= self._limit)
            self._used += count
        try:
            yield
        finally:
            with self._changed:
                self._used -= count
                self._changed.notify_all()


def _bytes_to_send(shard: Shard, part: UploadPart) -> int:
    computed = any(
        isinstance(p.what, (Columns, Transform)) and p.start < part.end and part.start < p.end for p in shard.parts
    )
    return part.nbytes + (_COMPUTING_BYTES if computed else 0)


def _groups(parts: Sequence[UploadPart]) -> Iterator[tuple[UploadPart, ...]]:
    """Parts in jobs of bounded size, in order."""
    group: list[UploadPart] = []
    sent = copied = 0
    for part in parts:
        group.append(part)
        sent += 0 if part.copy else part.nbytes
        copied += part.nbytes if part.copy else 0
        if sent >= _JOB_SENT_BYTES or copied >= _JOB_COPIED_BYTES:
            yield tuple(group)
            group, sent, copied = [], 0, 0
    if group:
        yield tuple(group)
