"""The claim on an output: the content of a journal's `plan.json`, and its signature, which every note carries.

A run writes its claim first. From then on all older runs are fenced off: they check the claim before they make a file
visible, and files that they have not yet renamed by then are removed. Notes in a journal are accepted only if they
belong to the claim's merge: the same plan, and a chain of runs with the same first run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raymoe.errors import MergeFailed
from raymoe.sources.local_folder import fingerprints_differ
from raymoe.storage.file_names import FileRecord

# Increase this if an older raymoe's journal would be misread. A journal of another format is never resumed.
JOURNAL_FORMAT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """`run` may write the plan with this `digest`. `origin` is the run that started the merge from nothing; later runs
    resumed it. `earlier` are the runs of this merge before `run`; an older raymoe lists none. `sources` are the stamps
    of the local source files."""

    digest: str
    run: str
    origin: str
    sources: Mapping[str, Any]
    earlier: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        return {
            "format": JOURNAL_FORMAT,
            "digest": self.digest,
            "run": self.run,
            "origin": self.origin,
            "earlier": list(self.earlier),
            "sources": dict(self.sources),
        }

    @property
    def signature(self) -> dict[str, str]:
        """The fields that a note of this run carries."""
        return {"digest": self.digest, "origin": self.origin, "run": self.run}

    def owns(self, note: Mapping[str, Any]) -> bool:
        """Whether a note belongs to this very merge. A new start of the same plan is another merge: its sources may
        have differed."""
        return note.get("digest") == self.digest and note.get("origin") == self.origin

    def accepted_record(self, note: Mapping[str, Any]) -> FileRecord | None:
        """The record of a finished file in a note. None if the note is damaged, or belongs to another merge."""
        try:
            return FileRecord(**note["file"]) if self.owns(note) else None
        except (KeyError, TypeError):
            return None

    def changed_sources(self, fingerprints: Mapping[str, str]) -> list[str]:
        """Local source files that have changed since the claim was written."""
        known = ((name, self.sources[name], stamp) for name, stamp in fingerprints.items() if name in self.sources)
        return sorted(name for name, before, now in known if fingerprints_differ(str(before), now))

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Claim | None:
        """The claim in the content of a `plan.json`. None if it is damaged, or of another version of raymoe."""
        texts = [content.get(key) for key in ("digest", "run", "origin")]
        sources, earlier = content.get("sources"), content.get("earlier", [])
        if content.get("format") != JOURNAL_FORMAT or not isinstance(sources, Mapping):
            return None
        if not isinstance(earlier, list) or not all(isinstance(word, str) and word for word in (*texts, *earlier)):
            return None
        return cls(
            digest=str(texts[0]), run=str(texts[1]), origin=str(texts[2]), sources=sources, earlier=tuple(earlier)
        )


class TakenOver(MergeFailed):
    """The output is no longer this run's."""


def taken_over_error(location: str) -> TakenOver:
    """The error for a run that finds that another run has taken over its output."""
    return TakenOver(f"{location}: another run has taken over this output, and goes on with it")


def foreign_file_error(place: str) -> MergeFailed:
    """The error for a file that readers would take for a part of the model, and that is not a file of this merge."""
    return MergeFailed(
        f"{place}: this file belongs to another model, and has appeared here since the merge began. The merge is not "
        "finished: remove the file and run the same command again, or use --overwrite to remove it and begin again."
    )


def replaced_file_error(place: str) -> MergeFailed:
    """The error for a file that is no longer the one that this run wrote."""
    return MergeFailed(
        f"{place}: this file was replaced or removed after it had been written, by another run or another program. The "
        "merge is not finished: run the same command again, and nothing else that writes to this output."
    )
