"""Writes to an S3 prefix: shards become objects by multipart uploads. The store copies parts server-side if it can.

The coordinator starts a shard's upload, actors send its parts or have them copied, and the coordinator completes it:
then the whole object becomes visible. Several actors may send parts of one upload.

    fresh     create, note the id, look at plan.json --> parts, by actors --> look at plan.json, complete, note
    resumed   list the parts that are there --> the others, by actors --> look at plan.json, complete, note

An upload of a dead run is resumed if its id is known, and aborted if it belongs to another merge. If a run dies before
it has noted an id, only a listing shows the upload. The next run aborts all uploads of shards that were opened since
that run began, if that run has noted no id for the shard: a store does not say which program opened an upload. All
other uploads belong to other programs, and are never changed.

A part of a resumed upload is kept if it has the planned size, and its source files are ones whose content the plan's
digest fixes: objects by their ETag, Hub files by their commit. Parts of local files count if they have been noted; an
actor does so after a check of its sources.

Memory: the parts that a process sends at one time share `_SENDING_BYTES`, however many jobs it has. A part counts with
its own bytes (reading and the connection's buffer take about as many again), a computed one with more.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property
from typing import Any

from raymoe.object_store.errors import UploadNotFound, object_replaced_error
from raymoe.object_store.location import LocationKind
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.parallel import CALLS_AT_ONCE
from raymoe.object_store.protocol import MultipartStore, ObjectInfo, OpenUpload, UploadedPart
from raymoe.object_store.s3_responses import is_md5
from raymoe.object_store.urls import join_url
from raymoe.planning.multipart import UploadPart, upload_parts
from raymoe.planning.plan import Copy, Shard
from raymoe.sources.facts import SourceFile
from raymoe.storage.checksums import hex_digest
from raymoe.storage.claim import Claim
from raymoe.storage.file_names import FileRecord
from raymoe.storage.object_journal import DoneNote, ObjectJournal, RecordedUpload
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
# the most that a job of copies sends: headers, norms and other ranges too short to be copied
_SENT_BESIDE_COPIES = 32 << 20
_META_PLAN, _META_ORIGIN = "raymoe-plan", "raymoe-origin"
_READ_BYTES = 16 << 20


class S3Output(StoreOutput[MultipartStore]):
    """Implements `Output` on S3."""

    def __init__(self, location: str, storage: StorageOptions, run: str = "") -> None:
        super().__init__(location, storage, run)
        self._uploads: dict[str, str] = {}  # shard -> id of its open upload
        self._copied_from: dict[str, SourceFile] = {}  # source objects of server-side copies, by URL
        self._known_parts: dict[str, list[UploadedPart]] = {}  # parts that an earlier run sent
        self._completed: dict[str, tuple[str, ObjectInfo]] = {}  # shard -> id of its upload, and the completed object
        self._reading_back: set[str] = set()  # complete shards with missing checksums
        self._beginning: set[str] = set()  # shards with uploads without a noted id
        self._open_before: Sequence[OpenUpload] = ()  # below the output, when this run began
        # whether the store lists all uploads below a folder; None: not known yet
        self._lists_uploads: bool | None = None
        self._lock = threading.Lock()  # held until that is known
        self._metadata: dict[str, str] = {}  # the same for all shards
        self._memory = _Budget(_SENDING_BYTES)

    def _fence_off(self, has_to_clear: bool) -> None:
        self._open_before = self._store.list_uploads(self.location.text)
        claim = self.journal.check_run()  # ensures that no newer run has opened any of them
        # Per merge, not per run: later runs complete uploads of earlier runs.
        self._metadata = {_META_PLAN: claim.digest, _META_ORIGIN: claim.origin}
        self.journal.read_uploads(self._open_before)
        lost = self.journal.lost_uploads(self._open_before)
        with ThreadPoolExecutor(CALLS_AT_ONCE, thread_name_prefix="abort") as pool:
            list(pool.map(lambda upload: self._store.abort_upload(upload.url, upload.upload_id), lost))
        self.journal.forget_known()
        earlier = (each for each in self.journal.all_earlier_uploads() if has_to_clear or not each.is_own)
        self._abort(earlier, self.journal.check_run)

    def same_store(self, file: SourceFile) -> bool:
        return file.kind is LocationKind.S3

    def copied_parts(self, shard: Shard) -> int:
        jobs = list(_upload_jobs(shard, "", upload_parts(shard, self.same_store)))
        return sum(job.copies for job in jobs) if all(job.asks_store for job in jobs) else 0

    def _jobs(self, shard: Shard) -> Sequence[ShardJob]:
        name, parts = shard.file_name, upload_parts(shard, self.same_store)
        self._copied_from |= {part.copy.file.location: part.copy.file for part in parts if part.copy is not None}
        if self._keep_finished(shard):
            self._abort(self.journal.earlier_uploads(name), self.journal.check_run)
            return ()
        if name not in self._uploads:
            upload_id, there = self._open_upload(name, goes_on=goes_on(shard))
            done = _finished_parts(shard, parts, there, lambda: self.journal.sent_parts(name, upload_id))
            self._known_parts[name], self._uploads[name] = done, upload_id
        numbers = {part.number for part in self._known_parts[name]}
        missing = [part for part in parts if part.number not in numbers]
        return list(_upload_jobs(shard, self._uploads[name], missing))

    def _do(self, job: ShardJob, reader: SourceReader, progress: Progress, router: RouterBytes | None) -> Any:
        """The parts that the store has now, or the checksum of the object that is read back. `router` gives computed
        rows."""
        name = job.shard.file_name
        if job.read_back is not None:
            return self._read_back(name, job.read_back, progress)
        assert job.upload_id is not None
        upload_id, url = job.upload_id, self.files.place(name)

        def send(part: UploadPart) -> UploadedPart:
            if part.copy is not None:
                source = part.copy
                there = self._store.copy_part(
                    url,
                    upload_id,
                    part.number,
                    source.file.location,
                    source.start,
                    source.end,
                    source.file.etag,
                    before_retry=self._takeover_check,
                )
                progress(0, part.nbytes)
                return there
            with self._memory.reserve(_bytes_to_send(job.shard, part)):
                chunks = shard_range(job.shard, part.start, part.end, reader, router)
                content = read_stream(chunks, part.nbytes)
                there = self._store.upload_part(url, upload_id, part.number, content, before_retry=self._takeover_check)
            progress(part.nbytes, 0)
            return there

        there: list[UploadedPart] = []
        if job.resumes:
            listed = self._store.list_parts(url, upload_id)
            there = _finished_parts(job.shard, job.parts, listed, lambda: self.journal.read_sent_parts(name, upload_id))
        numbers = {part.number for part in there}
        missing = [part for part in job.parts if part.number not in numbers]
        with ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="upload") as senders:
            sent = _results([(senders if p.copy is None else self._copiers).submit(send, p) for p in missing])
        reader.check_unchanged()  # before the parts are noted, since a later run then relies on them
        if unpinned := [done for part, done in zip(missing, sent, strict=True) if not _is_pinned(job.shard, part)]:
            self.journal.record_sent(name, upload_id, unpinned)
        return [*there, *sent]

    @cached_property
    def _copiers(self) -> ThreadPoolExecutor:
        """Threads that wait for copies, for all jobs of this process; the store's pacer limits how many run at once."""
        return ThreadPoolExecutor(self._storage.copy_slots[1], thread_name_prefix="copy")

    def _write_index(self, content: bytes) -> FileRecord:
        self._check_sources()
        return super()._write_index(content)

    def _check_sources(self) -> None:
        """Check each object that parts were copied from, also by an earlier run or an actor that was lost: some servers
        ignore the ETag condition of a copy. A listing shows many objects at once."""
        folders: dict[str, list[SourceFile]] = {}
        for file in self._copied_from.values():
            folders.setdefault(file.location.rpartition("/")[0], []).append(file)

        def check(folder: str) -> None:
            there = {join_url(folder, entry.name): entry for entry in self._store.list_folder(folder).objects}
            for file in folders[folder]:
                entry = there.get(file.location)
                if entry is None or (entry.size, entry.etag) != (file.size, file.etag):
                    self._store.check_copied(self.location.text, file.location, file.size, file.etag)

        with ThreadPoolExecutor(CALLS_AT_ONCE, thread_name_prefix="check") as pool:
            list(pool.map(check, folders))

    def _complete(self, shard: Shard, results: Sequence[Any]) -> FileRecord | ShardJob:
        name = shard.file_name
        if name in self._reading_back:
            (checksum,) = results
            self._reading_back.discard(name)
        elif self._storage.checksum is not None:
            info = self._complete_upload(shard, results)
            self._reading_back.add(name)
            return ShardJob(shard=shard, read_back=info)
        else:
            checksum = self._checksum(name, self._complete_upload(shard, results))
        upload_id, info = self._completed[name]
        record = FileRecord(name=name, size=info.size, checksum=checksum)
        self.journal.record(record, etag=info.etag, upload_id=upload_id)
        return record

    def _complete_upload(self, shard: Shard, results: Sequence[Any]) -> ObjectInfo:
        name = shard.file_name
        parts = [*self._known_parts[name], *(part for result in results for part in result)]
        parts.sort(key=lambda part: part.number)
        url, upload_id = self.files.place(name), self._uploads[name]
        self.journal.check_run()
        info = self._store.complete_upload(
            url, upload_id, parts, metadata=self._metadata, before_retry=self._takeover_check
        )
        assert info.size == shard.nbytes, f"{url}: {info.size} bytes, planned {shard.nbytes}"
        self._remember(name, info)
        self._completed[name] = upload_id, info
        del self._uploads[name], self._known_parts[name]
        return info

    def _record_written(self, name: str, content: bytes, info: ObjectInfo) -> FileRecord:
        url = self.files.place(name)
        there = self._store.stat(url)
        if there is None or there.size != len(content):
            raise object_replaced_error(url)
        # The MD5 matched what was sent. A different one now means different bytes; a store may also give none.
        etags = [etag for etag in (info.etag, there.etag) if etag is not None and is_md5(etag)]
        if len(set(etags)) > 1:
            raise object_replaced_error(url)
        self._remember(name, there)
        return FileRecord(name=name, size=len(content), checksum=self._checksum(name, info))

    def _clear(self, claim: Claim) -> None:
        completed = {upload_id for upload_id, _ in self._completed.values()}
        uploads = [upload for upload in self.journal.other_uploads() if upload.upload_id not in completed]
        self.journal.check_claim(claim)  # so none of them is a newer run's
        self._abort(uploads, lambda: self.journal.check_claim(claim))
        super()._clear(claim)

    def _has_open_work(self) -> bool:
        return bool(self._uploads)

    def _release(self, store: MultipartStore, journal: ObjectJournal, *, keep_uploads: bool) -> None:
        """Abort the uploads that this process has opened. A run that was replaced leaves them to the newer run, which
        has found them in the journal. The journal also lists the uploads that are kept."""
        uploads, self._uploads = self._uploads, {}
        if not keep_uploads and journal.is_of_this_run:
            for name, upload_id in uploads.items():
                store.abort_upload(self.files.place(name), upload_id)
                journal.forget_upload(name, upload_id)
            if not self._beginning:
                journal.forget_own_known()

    def _checksum(self, name: str, info: ObjectInfo) -> str:
        """The store's own digest of the object, or with `storage.checksum: sha256` one of its bytes, read back."""
        if self._storage.checksum is None:
            return f"etag:{info.etag}"
        url = self.files.place(name)
        there = self._store.stat(url)
        assert there is not None
        return self._read_back(name, there, lambda sent, copied: None)

    def _read_back(self, name: str, info: ObjectInfo, progress: Progress) -> str:
        """The SHA-256 of an object's bytes. `progress` is called for each read, with zero bytes: nothing is written."""
        url = self.files.place(name)

        def read() -> Iterator[bytes]:
            for start in range(0, info.size, _READ_BYTES):
                yield self._store.read(url, start, min(start + _READ_BYTES, info.size), info.etag)
                progress(0, 0)

        return f"sha256:{hex_digest(hashlib.sha256(), read())}"

    def _tells_content(self, done: DoneNote, info: ObjectInfo) -> bool:
        """As in the base class: the ETag was noted with the checksum, so an equal ETag means equal bytes."""
        kind = "etag:" if self._storage.checksum is None else f"{self._storage.checksum}:"
        if info.etag is None or info.size != done.record.size or not done.record.checksum.startswith(kind):
            return False
        return info.etag == done.etag or done.record.checksum == f"etag:{info.etag}"

    def _open_upload(self, name: str, *, goes_on: bool) -> tuple[str, Sequence[UploadedPart]]:
        """An upload of `name`: with `goes_on`, the one that an earlier run of this merge left, with its parts; else a
        new one."""
        earlier = self.journal.earlier_uploads(name)
        own = dict.fromkeys(upload.upload_id for upload in earlier if goes_on and upload.is_own)
        found = ((upload_id, self._listed_parts(name, upload_id)) for upload_id in own if upload_id is not None)
        taken = next(((upload_id, parts) for upload_id, parts in found if parts is not None), None)
        # The note of a resumed upload stays where it is: any later run finds it there.
        others = [upload for upload in earlier if taken is None or upload.upload_id != taken[0]]
        self._abort(others, self.journal.check_run)
        return taken or (self._new_upload(name), ())

    def _listed_parts(self, name: str, upload_id: str) -> Sequence[UploadedPart] | None:
        """The parts of an upload; None if it is not open (completed, or aborted)."""
        try:
            return self._store.list_parts(self.files.place(name), upload_id)
        except UploadNotFound:
            return None

    def _new_upload(self, name: str) -> str:
        """Start an upload. If this run dies before it has noted the id, a later run finds it by `known/RUN.json`.

        Some servers list only the uploads of one exact key. The first upload shows whether this server does. It is
        announced in any case, and all later ones are announced if the server does.
        """
        with self._lock:
            if self._lists_uploads is None:
                upload_id = self._begin_upload(name, announces=True)
                listed = self._store.list_uploads(self.location.text)
                self._lists_uploads = any(upload.upload_id == upload_id for upload in listed)
                if self._lists_uploads:
                    self.journal.record_known([upload.upload_id for upload in self._open_before])
                return upload_id
        return self._begin_upload(name, announces=not self._lists_uploads)

    def _begin_upload(self, name: str, *, announces: bool) -> str:
        url = self.files.place(name)
        before = self._store.list_uploads(url) if announces else self._open_before
        known = [upload.upload_id for upload in before if upload.url == url]
        if announces:
            self.journal.announce_upload(name, known=known)
        self._beginning.add(name)
        upload_id = self._create_upload(url, known=known)
        try:
            self.journal.record_upload(name, upload_id)
        except BaseException:
            # A newer run may have read the journal before the note was there, so it does not know this upload.
            self._store.abort_upload(url, upload_id)
            self.journal.forget_upload(name, upload_id)
            self._beginning.discard(name)
            raise
        self._beginning.discard(name)
        return upload_id

    def _abort(self, uploads: Iterable[RecordedUpload], check: Callable[[], object]) -> None:
        """Abort noted uploads, and remove the notes.

        If a run died between its intention and the id, uploads opened since then count as its own: a store does not say
        which program opened an upload. `check` raises if a newer run, with uploads of its own, has taken over.
        """

        def abort(upload: RecordedUpload) -> None:
            url = self.files.place(upload.name)
            ids = [upload.upload_id]
            if upload.upload_id is None:
                ids = [*self._opened_since(url, upload.known)]
                check()
            for upload_id in filter(None, ids):
                self._store.abort_upload(url, upload_id)

        if uploads := list(uploads):
            with ThreadPoolExecutor(CALLS_AT_ONCE, thread_name_prefix="abort") as pool:
                list(pool.map(abort, uploads))
            self.journal.forget(uploads)

    def _opened_since(self, url: str, known: Sequence[str]) -> list[str]:
        found = [upload.upload_id for upload in self._store.list_uploads(url) if upload.url == url]
        mine = self._uploads.values()
        return [upload_id for upload_id in found if upload_id not in known and upload_id not in mine]

    def _create_upload(self, url: str, known: Sequence[str]) -> str:
        """Start an upload. If a reply was lost and the request repeated, there are two uploads: the first is
        aborted."""
        retries = self._store.counters.retries
        # Not ended by a takeover: the upload of a lost reply would stay, and no run would know of it.
        upload_id = self._store.create_upload(url, metadata=self._metadata)
        if self._store.counters.retries > retries:
            for other in self._opened_since(url, known=(upload_id, *known)):
                self.journal.check_run()
                self._store.abort_upload(url, other)
        return upload_id


class _Budget:
    """Limits the total size in use by threads; a single larger one may exceed the limit."""

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


def _finished_parts(
    shard: Shard, parts: Iterable[UploadPart], listed: Iterable[UploadedPart], sent: Callable[[], set[UploadedPart]]
) -> list[UploadedPart]:
    """The planned parts that an upload already has. `sent` reads which parts have been noted as sent; it is called if a
    part is made of local files."""
    by_number, noted = {part.number: part for part in listed}, None
    found = []
    for part in parts:
        there = by_number.get(part.number)
        if there is None or there.size != part.nbytes:
            continue
        if not _is_pinned(shard, part):
            noted = sent() if noted is None else noted
            if there not in noted:
                continue
        found.append(there)
    return found


def _is_pinned(shard: Shard, part: UploadPart) -> bool:
    """Whether the plan's digest fixes the bytes of a part of the upload."""
    if part.copy is not None:
        return part.copy.file.is_pinned
    overlapping = [each for each in shard.parts if part.overlaps(each)]
    return all(file.is_pinned for each in overlapping for file in each.files_read)


def _bytes_to_send(shard: Shard, part: UploadPart) -> int:
    return part.nbytes + (_COMPUTING_BYTES if _is_computed(shard, part) else 0)


def _is_computed(shard: Shard, part: UploadPart) -> bool:
    """Whether some of the bytes are not unchanged bytes of a source."""
    return any(not isinstance(each.what, Copy) and part.overlaps(each) for each in shard.parts)


def _upload_jobs(shard: Shard, upload_id: str, missing: Sequence[UploadPart]) -> Iterator[ShardJob]:
    """The jobs of an upload: copied parts separate from sent ones, unless the sent ones are small."""
    copied, sent = [p for p in missing if p.copy is not None], [p for p in missing if p.copy is None]
    are_small = sum(part.nbytes for part in sent) <= _SENT_BESIDE_COPIES
    if copied and are_small and all(_is_pinned(shard, p) and not _is_computed(shard, p) for p in sent):
        copied, sent = list(missing), []
    for group in _groups(copied):
        yield ShardJob(shard=shard, upload_id=upload_id, parts=group, asks_store=True)
    for group in _groups(sent):
        yield ShardJob(shard=shard, upload_id=upload_id, parts=group)


def _results(futures: Sequence[Future[UploadedPart]]) -> list[UploadedPart]:
    """The results, in order. If one fails, calls that have not started are dropped, and running ones are waited for."""
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


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
