"""The common part of outputs in object stores, independent of how a shard is written.

The start, small files, index and record are the same on S3 and on the file systems of fsspec. `s3.py` and `fsspec.py`
implement how a shard is written, and what its checksum is.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Generic, TypeVar, cast

from raymoe.errors import MergeFailed, Problem
from raymoe.object_store.errors import ObjectExists, StorageError
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.parallel import CALLS_AT_ONCE
from raymoe.object_store.protocol import ObjectEntry, ObjectInfo, ObjectStore
from raymoe.object_store.registry import open_store
from raymoe.planning.plan import Shard
from raymoe.storage.claim import Claim, TakenOver, foreign_file_error, replaced_file_error
from raymoe.storage.file_names import INDEX_NAME, RECORD_NAME, FileRecord, FinishedMerge, json_object
from raymoe.storage.object_journal import DoneNote, ObjectJournal
from raymoe.storage.output_files import StoreFiles
from raymoe.storage.outputs.base import BaseOutput, goes_on
from raymoe.storage.outputs.protocol import Progress, ShardJob
from raymoe.storage.shard_stream import RouterBytes
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.takeover_check import TakeoverCheck

_Store = TypeVar("_Store", bound=ObjectStore)
_RELEASE_S = 60
_LOOK_S = 5  # for the question whether the output is still this run's, between two tries of a write


class StoreOutput(BaseOutput, Generic[_Store]):
    """The part of `Output` that does not depend on how the store takes a shard.

    Stores have no lock: a delayed request of an older run may still replace a file after the newer run has written it.
    So the state of each file that this run has made visible is kept (`_written`), and compared before the index and the
    record are written.
    """

    journal: ObjectJournal
    files: StoreFiles

    def __init__(self, location: str, storage: StorageOptions, run: str = "") -> None:
        files = StoreFiles(open_store(location, storage), location)
        super().__init__(files, ObjectJournal(files, run))
        self._storage = storage
        self._takeover_check = TakeoverCheck(location, self._is_still_of_this_run)
        self.journal.before_retry = self._takeover_check
        self._written: dict[str, tuple[int, str | None]] = {}  # name -> size and ETag
        self._kept: dict[str, FileRecord] = {}  # shards that an earlier run finished
        # what was here when the run began, if it may include finished shards
        self._listed: Mapping[str, ObjectEntry] = {}

    @property
    def _store(self) -> _Store:
        return cast(_Store, self.files.store)

    def problems(self, *, digest: str | None, output_bytes: int, overwrite: bool) -> list[Problem]:
        try:
            return super().problems(digest=digest, output_bytes=output_bytes, overwrite=overwrite)
        except StorageError as error:
            return list(error.problems)

    def recorded_files(self) -> Sequence[str]:
        try:
            return super().recorded_files()
        except StorageError:  # `problems` reports it
            return ()

    def _files_within(self, seconds: float) -> StoreFiles:
        """The same files, through a store that gives up after so many seconds."""
        options = replace(self._storage, deadline_s=min(seconds, self._storage.deadline_s))
        return StoreFiles(open_store(self.location.text, options), self.location.text)

    def _is_still_of_this_run(self) -> bool:
        try:
            return self.journal.through(self._files_within(_LOOK_S)).is_of_this_run
        except StorageError:  # a store that does not answer is a matter of the write's own deadline
            return True

    @contextlib.contextmanager
    def _takeover_as_cause(self) -> Iterator[None]:
        """If a request fails since a newer run has taken over, raise TakenOver: that is what the user has to know."""
        try:
            yield
        except StorageError:
            self._takeover_check.look()
            raise

    def lock(self) -> None:
        """Does nothing, since stores have no lock: see `ObjectJournal`."""

    def begin(self, digest: str, fingerprints: Mapping[str, str], *, fresh: bool) -> None:
        has_to_clear = self.journal.begin(digest, fingerprints, fresh=fresh)
        self._fence_off(has_to_clear)
        if has_to_clear:
            self.files.remove_checkpoint(self.journal.check_run)
            self.journal.mark_cleared()
        elif self.journal.has_done:
            self._listed = self._list()

    def one_look(self) -> contextlib.AbstractContextManager[None]:
        return self.files.one_look()

    def kept_reads(self) -> bytes:
        return self.journal.kept_reads()

    def keep_reads(self, content: bytes) -> None:
        if content:
            self.journal.keep_reads(content)

    @abstractmethod
    def _fence_off(self, has_to_clear: bool) -> None:
        """Remove what older runs could still make visible. With `has_to_clear` none of it can be used."""

    def clean_up(self) -> None:
        """As in `Output`. The journal of another merge stays: a newer run may be active."""
        claim, finished = self.journal.claim(), self.finished_merge()
        if claim is not None and finished is not None and finished.digest == claim.digest:
            self._clear(claim)
        elif self.finished_merge() is not None:
            self.journal.clear_unclaimed()

    def _clear(self, claim: Claim) -> None:
        """Remove the journal of that claim."""
        self.journal.clear(claim)

    def other_model_files(self, own: Container[str], index: Mapping[str, Any]) -> list[str]:
        if self.journal.is_clearing:
            return []
        others, there = self.files.other_model_files(own), self.files.read(INDEX_NAME)
        return others if there is None or json_object(there) == index else [INDEX_NAME, *others]

    # --- shards

    def _keep_finished(self, shard: Shard) -> bool:
        """Whether an earlier run finished a shard, and its object still has that size and content."""
        name = shard.file_name
        done = self.journal.done(name) if goes_on(shard) else None
        if done is None or done.record.size != shard.nbytes:
            return False
        entry = self._listed.get(name)
        info = ObjectInfo(size=entry.size, etag=entry.etag) if entry is not None else None
        if info is None or not self._tells_content(done, info):
            info = self._store.stat(self.files.place(name))
            if info is None or info.size != shard.nbytes:
                return False
            if not self._tells_content(done, info) and self._checksum(name, info) != done.record.checksum:
                return False
        self._remember(name, info)
        self._kept[name] = done.record
        return True

    def _tells_content(self, done: DoneNote, info: ObjectInfo) -> bool:
        """Whether an object's size and ETag show that it is the noted one, without reading its bytes."""
        return False

    def jobs(self, shard: Shard) -> Sequence[ShardJob]:
        with self._takeover_as_cause():
            return self._jobs(shard)

    @abstractmethod
    def _jobs(self, shard: Shard) -> Sequence[ShardJob]:
        """As `jobs`."""

    def do(self, job: ShardJob, reader: SourceReader, progress: Progress, router: RouterBytes | None = None) -> Any:
        with self._takeover_as_cause():
            return self._do(job, reader, progress, router)

    @abstractmethod
    def _do(self, job: ShardJob, reader: SourceReader, progress: Progress, router: RouterBytes | None) -> Any:
        """As `do`."""

    def complete(self, shard: Shard, results: Sequence[Any]) -> FileRecord | ShardJob:
        if shard.file_name in self._kept:
            return self._kept[shard.file_name]
        with self._takeover_as_cause():
            return self._complete(shard, results)

    @abstractmethod
    def _complete(self, shard: Shard, results: Sequence[Any]) -> FileRecord | ShardJob:
        """Make a shard that this run has written visible, and note it."""

    @abstractmethod
    def _checksum(self, name: str, info: ObjectInfo) -> str:
        """The checksum of an object for its record. Its bytes may be read for this."""

    def _remember(self, name: str, info: ObjectInfo) -> None:
        self._written[name] = (info.size, info.etag)

    def _written_names(self) -> Container[str]:
        return self._written

    def _list(self) -> Mapping[str, ObjectEntry]:
        return {entry.name: entry for entry in self._store.list(self.location.text)}

    def _replaced_files(self) -> Iterable[str]:
        """As in the base class. One listing shows most; entries that differ or lack an ETag are checked one by one."""
        listed = self._list()

        def is_listed(name: str) -> bool:
            entry = listed.get(name)
            return entry is not None and entry.etag is not None and (entry.size, entry.etag) == self._written[name]

        def is_same(name: str) -> bool:
            info, (size, etag) = self._store.stat(self.files.place(name)), self._written[name]
            return info is not None and info.size == size and (etag is None or info.etag == etag)

        others = [name for name in self._written if not is_listed(name)]
        with ThreadPoolExecutor(CALLS_AT_ONCE, thread_name_prefix="check") as pool:
            same = list(pool.map(is_same, others))
        return [name for name, is_there in zip(others, same, strict=True) if not is_there]

    # --- small files, index and record

    def write_small(self, name: str, content: bytes) -> FileRecord:
        with self._takeover_as_cause():
            return self._record_written(name, content, self._put_small(name, content))

    @abstractmethod
    def _record_written(self, name: str, content: bytes, info: ObjectInfo) -> FileRecord:
        """The record of a small file that was put; `info` is the store's reply."""

    def _put_small(self, name: str, content: bytes) -> ObjectInfo:
        """Put a small file. A file of an earlier run is replaced only while the output is this run's."""
        self.journal.check_run()
        url = self.files.place(name)
        try:
            return self._store.put(url, content, only_if_absent=True, before_retry=self._takeover_check)
        except ObjectExists:  # an earlier run wrote it, or a newer one has just done so
            self.journal.check_run()
            return self._store.put(url, content, before_retry=self._takeover_check)

    def _write_index(self, content: bytes) -> FileRecord:
        """As in the base class. An earlier run of this merge may have written the same index.

        Not every store honors a conditional put: with the check before it, only a very short race remains.
        """
        url, there = self.files.place(INDEX_NAME), self.files.read(INDEX_NAME)
        if there is not None and json_object(there) != json_object(content):
            raise foreign_file_error(url)
        try:
            info = self._store.put(url, content, only_if_absent=there is None, before_retry=self._takeover_check)
        except ObjectExists as error:
            raise foreign_file_error(url) from error
        return self._record_written(INDEX_NAME, content, info)

    def _write_record(self, record: bytes) -> None:
        url = self.files.place(RECORD_NAME)
        try:
            self._store.put(url, record, only_if_absent=True, before_retry=self._takeover_check)
            self._clear(self.journal.check_run())
        except ObjectExists as error:  # there was none when this run began
            raise self._foreign_record_error(url, record) from error
        except TakenOver:
            # Another run of this merge has just begun. It sees the record, and leaves the merge as it is.
            if self.finished_merge() != FinishedMerge.of(json_object(record)):
                raise

    def _foreign_record_error(self, url: str, own: bytes) -> MergeFailed:
        """The error for a record that has appeared here while this run was active."""
        if self.files.record().get("plan_digest") == json_object(own).get("plan_digest"):
            return replaced_file_error(url)
        return MergeFailed(
            f"{url}: a merge of another plan has ended here while this one was at work. Its files and those of this "
            "merge may be mixed now: run the command of the merge that you want again, with --overwrite."
        )

    # --- the end

    def release(self, *, keep_uploads: bool = False) -> None:
        """As in `Output`. A store that does not answer (possibly the reason for the merge's end) is not waited for
        long: the journal lists what is left, and the next run removes or uses it."""
        if self._has_open_work() or self.journal.has_unconfirmed:
            files = self._files_within(_RELEASE_S)
            journal = self.journal.through(files)
            with contextlib.suppress(StorageError):
                if self._has_open_work():
                    self._release(cast(_Store, files.store), journal, keep_uploads=keep_uploads)
                journal.withdraw_notes()

    @abstractmethod
    def _has_open_work(self) -> bool:
        """Whether this process may have started files or uploads that it has not finished."""

    @abstractmethod
    def _release(self, store: _Store, journal: ObjectJournal, *, keep_uploads: bool) -> None:
        """Remove the files and uploads that this run was writing."""
