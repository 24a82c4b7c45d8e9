"""The common part of journals in a folder and in an object store: which run owns the output, and which notes count.

A journal is a `plan.json` with the claim of the current run (`claim.py`) and notes about files, in JSON. Each back end
implements how these are read and written, and how older runs are kept from writing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from raymoe.storage.claim import Claim, taken_over_error
from raymoe.storage.file_names import FileRecord

CLEARING = "clearing."  # followed by the name of a run: a marker that the files here have to be removed


class BaseJournal(ABC):
    """The journal of the output at `location`. `run` is the run that it writes for; the coordinator's journal gets it
    when the run begins."""

    def __init__(self, location: str, run: str = "") -> None:
        self._location = location
        self.run = run

    @property
    @abstractmethod
    def exists(self) -> bool:
        """Whether there is an unfinished merge in the output."""

    @abstractmethod
    def finished(self, name: str) -> FileRecord | None:
        """The record of a file that this merge finished; the caller compares it with the file itself."""

    @abstractmethod
    def invalidate(self) -> None:
        """Note that this merge's files are of no use: the next run starts again. Raises MergeFailed if another run has
        taken over."""

    @abstractmethod
    def _read(self, name: str) -> dict[str, Any]:
        """A JSON file of the journal; empty if there is none."""

    @abstractmethod
    def _note(self, kind: str, name: str, content: Mapping[str, Any]) -> None:
        """Write a note about a file, with the signature of this run. Raises MergeFailed if another run has taken
        over."""

    @abstractmethod
    def _is_marked(self, run: str) -> bool:
        """Whether that run has left a marker that the files here have to be removed."""

    @property
    def is_of_this_run(self) -> bool:
        """Whether the output still belongs to this run. False also if this process can't see it."""
        return self._owns(self.claim())

    def check_run(self) -> Claim:
        """The claim of this run. Raises MergeFailed if another run has taken over the output."""
        claim = self.claim()
        if claim is None or not self._owns(claim):
            raise taken_over_error(self._location)
        return claim

    def _owns(self, claim: Claim | None) -> bool:
        return claim is not None and bool(self.run) and claim.run == self.run

    def claim(self) -> Claim | None:
        """The claim on the output. None if there is no journal, or none that this version of raymoe can read."""
        return Claim.parse(self._read("plan.json"))

    def digest(self) -> str | None:
        """Digest of the plan that this journal belongs to; None if there is no readable journal."""
        claim = self.claim()
        return claim.digest if claim is not None else None

    def changed_sources(self, fingerprints: Mapping[str, str]) -> list[str]:
        """Local source files that were modified since the unfinished merge began."""
        claim = self.claim()
        return claim.changed_sources(fingerprints) if claim is not None else []

    @property
    def is_clearing(self) -> bool:
        """Whether the files here have to be removed: a run was interrupted while it did so, or its sources changed."""
        claim = self.claim()
        return claim is not None and self._is_marked(claim.origin)

    def record(self, record: FileRecord) -> None:
        """Note a finished file. Raises MergeFailed if another run has taken over."""
        self._note("done", f"{flat_name(record.name)}.json", {"file": asdict(record)})

    def _next_claim(self, before: Claim | None, digest: str, sources: Mapping[str, str], *, fresh: bool) -> Claim:
        """The claim of the run that begins. It keeps the origin of the claim `before` only if it resumes that merge:
        the plan is the same, and `fresh` is false."""
        goes_on = before is not None and before.digest == digest and not fresh
        if before is None or not goes_on:
            return Claim(digest=digest, run=self.run, origin=self.run, sources=sources)
        earlier = (*before.earlier, before.run)
        return Claim(digest=digest, run=self.run, origin=before.origin, sources=sources, earlier=earlier)


def flat_name(name: str) -> str:
    """A file's name without folders: the journal's own folders are flat."""
    return name.replace("/", "__")
