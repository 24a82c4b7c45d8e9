"""Whose an output is: the content of a journal's `plan.json`, and what every note of a journal carries of it.

A run writes its claim first. From then on all older runs are fenced off: they look at the claim before they make
anything visible, and what they have not moved to its place by then is taken away from them. The notes of a journal are
only accepted from the merge that the claim is of: the same plan, and a chain of runs that began with the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raymoe.errors import MergeFailed
from raymoe.sources.local_folder import fingerprints_differ
from raymoe.storage.file_names import FileRecord

# Raise this when an older raymoe's journal would be misread. A journal of another format is never continued.
JOURNAL_FORMAT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """`run` may write the plan of that `digest`. `origin` is the run that began the merge from nothing; the runs after
    it went on from what it had finished. `sources` are the stamps of the local source files."""

    digest: str
    run: str
    origin: str
    sources: Mapping[str, Any]

    def plain(self) -> dict[str, Any]:
        return {
            "format": JOURNAL_FORMAT,
            "digest": self.digest,
            "run": self.run,
            "origin": self.origin,
            "sources": dict(self.sources),
        }

    @property
    def signature(self) -> dict[str, str]:
        """What a note of this run carries."""
        return {"digest": self.digest, "origin": self.origin, "run": self.run}

    def owns(self, note: Mapping[str, Any]) -> bool:
        """Whether a note is of this very merge. A new start of the same plan is another merge: it may have had other
        sources."""
        return note.get("digest") == self.digest and note.get("origin") == self.origin

    def accepted_record(self, note: Mapping[str, Any]) -> FileRecord | None:
        """The record of a finished file in a note; None where the note is damaged, or not of this very merge."""
        try:
            return FileRecord(**note["file"]) if self.owns(note) else None
        except (KeyError, TypeError):
            return None

    def changed_sources(self, fingerprints: Mapping[str, str]) -> list[str]:
        """Local source files that are others now than when the claim was written."""
        known = ((name, self.sources[name], stamp) for name, stamp in fingerprints.items() if name in self.sources)
        return sorted(name for name, before, now in known if fingerprints_differ(str(before), now))

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Claim | None:
        """The claim in the content of a `plan.json`; None where it is damaged, or of another version of raymoe."""
        texts = [content.get(key) for key in ("digest", "run", "origin")]
        sources = content.get("sources")
        if content.get("format") != JOURNAL_FORMAT or not isinstance(sources, Mapping):
            return None
        if not all(isinstance(word, str) and word for word in texts):
            return None
        return cls(digest=str(texts[0]), run=str(texts[1]), origin=str(texts[2]), sources=sources)


class TakenOver(MergeFailed):
    """The output is no longer this run's."""


def taken_over_error(location: str) -> TakenOver:
    """What is raised where a run finds that the output is no longer its own."""
    return TakenOver(f"{location}: another run of this merge has taken over this output")


def foreign_file_error(place: str) -> MergeFailed:
    """What is raised for a file that readers take for a part of the model, and that this merge does not have."""
    return MergeFailed(
        f"{place}: this file belongs to another model, and has appeared here since the merge began. The merge is not "
        "finished: remove the file and run the same command again, or use --overwrite to remove it and begin again."
    )


def replaced_file_error(place: str) -> MergeFailed:
    """What is raised where a file is no longer the one that this run has written."""
    return MergeFailed(
        f"{place}: this file was replaced or removed after it had been written, by another run or another program. The "
        "merge is not finished: run the same command again, and nothing else that writes to this output."
    )
