"""What outputs in object stores have in common, whatever the way in which a shard gets there.

The journal, the look at what this run has written, small files and the record are the same on S3 and on the file
systems of fsspec. How a shard is written, and the index, is in `s3_output` and `stream_output`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

from raymoe.errors import MergeFailed, Problem
from raymoe.objects.options import StorageOptions
from raymoe.objects.problems import ObjectExists, StorageError
from raymoe.objects.store import ObjectInfo, ObjectStore
from raymoe.objects.urls import join
from raymoe.storage.claim import Claim, replaced
from raymoe.storage.object_journal import (
    ObjectJournal,
    WrittenFiles,
    finished_claim,
    finished_merge,
    occupied,
    read_json,
    recorded_files,
)
from raymoe.storage.records import RECORD_NAME, FileRecord, FinishedMerge, json_object

__all__ = ["StoreOutput"]

_Store = TypeVar("_Store", bound=ObjectStore)


class StoreOutput(Generic[_Store]):
    """The part of `Output` that does not depend on how the store takes a shard."""

    def __init__(self, location: str, store: _Store, storage: StorageOptions, run: str) -> None:
        self.location = location
        self._store = store
        self._storage = storage
        self._journal = ObjectJournal(store, location, run)
        self._written = WrittenFiles(store, location)
        self._kept: dict[str, FileRecord] = {}  # shards that an earlier run finished

    @property
    def run(self) -> str:
        return self._journal.run

    def problems(self, *, digest: str | None, output_bytes: int, overwrite: bool) -> list[Problem]:
        try:
            problems = occupied(self._store, self._journal, self.location, digest)
        except StorageError as error:
            return list(error.problems)
        return [] if overwrite else problems

    def digest(self) -> str | None:
        return self._journal.digest()

    def finished_merge(self) -> FinishedMerge | None:
        return finished_merge(self._store, self._journal, self.location)

    def recorded_files(self) -> Sequence[str]:
        try:
            return recorded_files(self._store, self.location)
        except StorageError:  # `problems` says so
            return ()

    def clean_up(self) -> None:
        if (claim := finished_claim(self._store, self._journal, self.location)) is not None:
            self._clear(claim)

    def changed_sources(self, stamps: Mapping[str, str]) -> list[str]:
        return self._journal.changed_sources(stamps)

    def lock(self) -> None:
        """Nothing to take: see `ObjectJournal`."""

    def spoil(self) -> None:
        self._journal.spoil()

    def is_reachable(self) -> bool:
        return self._journal.is_of_this_run

    def end(self, record: bytes) -> None:
        self._written.check()
        self._journal.check_run()
        url = join(self.location, RECORD_NAME)
        try:
            self._store.put(url, record, only_if_absent=True)
        except ObjectExists as error:  # there was none when this run began
            raise self._recorded_meanwhile(url, record) from error
        self._clear(self._journal.check_run())

    def _recorded_meanwhile(self, url: str, own: bytes) -> MergeFailed:
        """What is raised for a record that has appeared here while this run was at work."""
        there = read_json(self._store, url).get("plan_digest")
        if there == json_object(own).get("plan_digest"):
            return replaced(url)
        return MergeFailed(
            f"{url}: a merge of another plan has ended here while this one was at work. Its files and those of this "
            "merge may be mixed now: run the command of the merge that is wanted again, with --overwrite."
        )

    def _clear(self, claim: Claim) -> None:
        """Remove the journal of that claim."""
        self._journal.clear(claim)

    def _put_small(self, name: str, content: bytes) -> ObjectInfo:
        """Put a small file at its place, over one of an earlier run only while the output is this run's."""
        self._journal.check_run()
        url = join(self.location, name)
        try:
            return self._store.put(url, content, only_if_absent=True)
        except ObjectExists:  # an earlier run wrote it, or a newer one just now
            self._journal.check_run()
            return self._store.put(url, content)
