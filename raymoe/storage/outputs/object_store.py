"""What outputs in object stores have in common, whatever the way in which a shard gets there.

The journal, the look at what this run has written, small files and the record are the same on S3 and on the file
systems of fsspec. How a shard is written, and the index, is in `s3_output` and `stream_output`.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, Generic, TypeVar

from raymoe.errors import MergeFailed, Problem
from raymoe.object_store.errors import ObjectExists, ObjectMissing, StorageError
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.protocol import ObjectInfo, ObjectStore
from raymoe.object_store.urls import join_url
from raymoe.storage.claim import Claim, TakenOver, foreign_file_error, replaced_file_error
from raymoe.storage.file_names import INDEX_NAME, RECORD_NAME, FileRecord, FinishedMerge, json_object
from raymoe.storage.object_journal import (
    ObjectJournal,
    WrittenFiles,
    finished_claim,
    finished_merge,
    occupied_problems,
    other_model_files,
    read_json,
    recorded_files,
)

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
            problems = occupied_problems(self._store, self._journal, self.location, digest)
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
        elif self.finished_merge() is not None:
            self._journal.clear_unclaimed()

    def other_model_files(self, own: Container[str], index: Mapping[str, Any]) -> list[str]:
        if self._journal.is_clearing:
            return []
        others = other_model_files(self._store, self.location, own)
        there = self._index()
        return others if there is None or json_object(there) == index else [INDEX_NAME, *others]

    def changed_sources(self, fingerprints: Mapping[str, str]) -> list[str]:
        return self._journal.changed_sources(fingerprints)

    def lock(self) -> None:
        """Nothing to take: see `ObjectJournal`."""

    def invalidate(self) -> None:
        self._journal.invalidate()

    def is_reachable(self) -> bool:
        return self._journal.is_of_this_run

    def end(self, record: bytes) -> None:
        self._check_files()
        url = join_url(self.location, RECORD_NAME)
        try:
            self._store.put(url, record, only_if_absent=True)
        except ObjectExists as error:  # there was none when this run began
            raise self._foreign_record_error(url, record) from error
        try:
            self._clear(self._journal.check_run())
        except TakenOver:
            # Another run of this merge has just begun. It sees the record, and leaves the merge as it is.
            if self.finished_merge() != FinishedMerge.of(json_object(record)):
                raise

    def _check_files(self) -> None:
        """Raise MergeFailed if the output is not this run's, or does not hold what it has written and nothing else."""
        try:
            self._written.check()
        except MergeFailed:
            self._journal.check_run()  # the reason for what is wrong, where a newer run is at work
            raise
        self._journal.check_run()

    def _index(self) -> bytes | None:
        """The index that is here; None where there is none."""
        try:
            return self._store.read_all(join_url(self.location, INDEX_NAME))
        except ObjectMissing:
            return None

    def _check_index(self, content: bytes) -> bool:
        """Whether an earlier run of this merge has written the index. Raises MergeFailed for another one.

        Not every store honours a conditional put: this look leaves a race of moments to it.
        """
        there = self._index()
        if there is not None and json_object(there) != json_object(content):
            raise foreign_file_error(join_url(self.location, INDEX_NAME))
        return there is not None

    def _foreign_record_error(self, url: str, own: bytes) -> MergeFailed:
        """What is raised for a record that has appeared here while this run was at work."""
        there = read_json(self._store, url).get("plan_digest")
        if there == json_object(own).get("plan_digest"):
            return replaced_file_error(url)
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
        url = join_url(self.location, name)
        try:
            return self._store.put(url, content, only_if_absent=True)
        except ObjectExists:  # an earlier run wrote it, or a newer one just now
            self._journal.check_run()
            return self._store.put(url, content)
