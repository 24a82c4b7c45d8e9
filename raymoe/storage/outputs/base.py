"""The common part of all outputs: a local folder, S3, or another store of fsspec.

This module has the order of writing, the checks of what this run has written, and the answers about existing files. A
back end implements how bytes are written, and how older runs are kept from writing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

from raymoe.errors import MergeFailed, Problem
from raymoe.object_store.location import Location
from raymoe.planning.owner import ROUTER
from raymoe.planning.plan import Shard
from raymoe.sources.facts import SourceFile
from raymoe.storage.base_journal import BaseJournal
from raymoe.storage.claim import foreign_file_error, replaced_file_error
from raymoe.storage.file_names import FileRecord, FinishedMerge
from raymoe.storage.output_files import OutputFiles
from raymoe.storage.outputs.protocol import Output, ShardJob


def goes_on(shard: Shard) -> bool:
    """Whether a shard of an earlier run may be kept. Every run writes the router's shards again: on other hardware,
    rows differ by rounding."""
    return shard.owner != ROUTER


def write_shard(output: Output, shard: Shard, do: Callable[[ShardJob], Any]) -> FileRecord:
    """Write a shard in this process: `do` does each of its jobs, and any job that `complete` returns."""
    done = output.complete(shard, [do(job) for job in output.jobs(shard)])
    while isinstance(done, ShardJob):
        done = output.complete(shard, [do(done)])
    return done


class BaseOutput(ABC):
    """The part of `Output` that does not depend on the back end."""

    def __init__(self, files: OutputFiles, journal: BaseJournal) -> None:
        self.location = Location.of(files.location)
        self.files = files
        self.journal = journal

    @property
    def run(self) -> str:
        return self.journal.run

    def problems(self, *, digest: str | None, output_bytes: int, overwrite: bool) -> list[Problem]:
        finished = self.finished_merge()
        problems = self.files.problems(self.journal, finished, digest)
        if overwrite:
            return self._room_problems(output_bytes)
        is_complete = finished is not None and finished.digest == digest
        return problems if is_complete else [*problems, *self._room_problems(output_bytes)]

    def _room_problems(self, output_bytes: int) -> list[Problem]:
        """Problems if so many bytes do not fit here. Object stores have no such limit."""
        return []

    def digest(self) -> str | None:
        return self.journal.digest()

    def changed_sources(self, fingerprints: Mapping[str, str]) -> list[str]:
        return self.journal.changed_sources(fingerprints)

    def finished_merge(self) -> FinishedMerge | None:
        return self.files.finished_merge(self.journal)

    def recorded_files(self) -> Sequence[str]:
        return self.files.recorded_files()

    def other_model_files(self, own: Container[str], index: Mapping[str, Any]) -> list[str]:
        return [] if self.journal.is_clearing else self.files.other_model_files(own)

    def invalidate(self) -> None:
        self.journal.invalidate()

    def same_store(self, file: SourceFile) -> bool:
        return False

    def copied_parts(self, shard: Shard) -> int:
        return 0

    def is_reachable(self) -> bool:
        return self.journal.is_of_this_run

    def write_index(self, content: bytes) -> FileRecord:
        self._check_files()
        return self._write_index(content)

    def end(self, record: bytes) -> None:
        self._check_files()
        self._write_record(record)

    def _check_files(self) -> None:
        """Raise MergeFailed if the output is not this run's, or holds other files than this run has written."""
        try:
            if others := self.files.other_model_files(self._written_names()):
                raise foreign_file_error(self.files.place(others[0]))
            if (name := next(iter(self._replaced_files()), None)) is not None:
                raise replaced_file_error(self.files.place(name))
        except MergeFailed:
            self.journal.check_run()  # if a newer run is active, that is the cause
            raise
        self.journal.check_run()

    @abstractmethod
    def _written_names(self) -> Container[str]:
        """Names of the files that this run has made visible, or found finished."""

    @abstractmethod
    def _replaced_files(self) -> Iterable[str]:
        """The written files that have been replaced or removed since."""

    @abstractmethod
    def _write_index(self, content: bytes) -> FileRecord:
        """Write the index; never replace another one."""

    @abstractmethod
    def _write_record(self, record: bytes) -> None:
        """Write the record; then remove the journal."""
