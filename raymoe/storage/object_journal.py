"""The journal of a merge whose output is in an object store: the same promises as the local one, with objects.

    OUT/.raymoe/plan.json            digest of the plan and the name of the run that writes; written first
    OUT/.raymoe/uploads/FILE.json    written before a shard's upload begins, again with its id when it has begun
    OUT/.raymoe/done/FILE.json       size and checksum of a finished file
    OUT/raymoe.json                  the record of the finished merge; then `.raymoe/` is removed, plan.json last

An object store has no locks. A second run on the same output replaces the run's name in `plan.json`; the first one
notices before it makes anything visible, and stops. Both would write the same bytes: the plan is the same, or refused.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from raymoe.errors import Problem
from raymoe.objects.problems import ObjectMissing
from raymoe.objects.store import ObjectStore
from raymoe.objects.urls import join
from raymoe.sources.folder import is_inside
from raymoe.storage.records import INDEX_NAME, JOURNAL, PROBE, RECORD_NAME, RESULT_NAME, FileRecord, is_part_of_a_model

__all__ = ["ObjectJournal", "checkpoint_objects", "occupied"]


class ObjectJournal:
    """Reads and writes the journal of one output prefix."""

    def __init__(self, store: ObjectStore, root: str, run: str = "") -> None:
        self._store, self._root, self.run = store, root, run
        self._folder = join(root, JOURNAL)
        self._ended: Mapping[str, Any] = {}  # files by name, where an earlier run died while it removed its journal

    def plan(self) -> Mapping[str, Any]:
        """Content of plan.json; empty where there is none."""
        return self._read("plan.json")

    def begin(self, digest: str, stamps: Mapping[str, int]) -> None:
        self.run = uuid.uuid4().hex
        record = self._read_object(join(self._root, RECORD_NAME))
        self._ended = record.get("files", {}) if record.get("plan_digest") == digest else {}
        self._write("plan.json", {"digest": digest, "run": self.run, "sources": dict(stamps)})

    @property
    def is_of_this_run(self) -> bool:
        return bool(self.run) and self.plan().get("run") == self.run

    def changed_sources(self, stamps: Mapping[str, int]) -> list[str]:
        """Local source files that were modified since the unfinished merge began."""
        recorded = self.plan().get("sources", {})
        return sorted(name for name, stamp in stamps.items() if name in recorded and recorded[name] != stamp)

    def finished(self, name: str) -> FileRecord | None:
        content = self._read(f"done/{_flat(name)}.json")
        if not content and name in self._ended:
            content = {"name": name, **self._ended[name]}
        try:
            return FileRecord(**content)
        except TypeError:
            return None

    def record(self, record: FileRecord) -> None:
        self._write(f"done/{_flat(record.name)}.json", asdict(record))

    def intend_upload(self, name: str, known: Sequence[str]) -> None:
        """An upload of `name` is about to begin; `known` are the open ones of that name that are somebody else's."""
        self._write(f"uploads/{_flat(name)}.json", {"id": None, "known": list(known)})

    def begun_upload(self, name: str, upload_id: str) -> None:
        self._write(f"uploads/{_flat(name)}.json", {"id": upload_id, "known": []})

    def upload(self, name: str) -> Mapping[str, Any]:
        """What an earlier run noted of its upload of `name`; empty where it began none."""
        return self._read(f"uploads/{_flat(name)}.json")

    def forget_upload(self, name: str) -> None:
        self._store.delete(join(self._folder, f"uploads/{_flat(name)}.json"))

    def uploads(self) -> list[str]:
        """File names whose uploads this journal knows of, as they stand in it (flat)."""
        entries = self._store.list(join(self._folder, "uploads"))
        return [entry.name.removesuffix(".json") for entry in entries]

    def clear(self) -> None:
        """Forget everything; `plan.json` goes last, so that whoever dies over it can be followed by a run that goes on.

        Without it the rest would stay for good: a folder that holds a finished merge is not touched again.
        """
        for entry in self._store.list(self._folder):
            if entry.name != "plan.json":
                self._store.delete(join(self._folder, entry.name))
        self._store.delete(join(self._folder, "plan.json"))

    def _read(self, name: str) -> dict[str, Any]:
        return self._read_object(join(self._folder, name))

    def _read_object(self, url: str) -> dict[str, Any]:
        try:
            content = json.loads(self._store.read_all(url))
        except (ObjectMissing, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        self._store.put(join(self._folder, name), json.dumps(content).encode())


def occupied(store: ObjectStore, journal: ObjectJournal, location: str, digest: str | None) -> Problem | None:
    """Why an output can't be taken, if it can't: only an unfinished run of this very plan may go on."""
    there = journal.plan().get("digest")
    if there is not None:
        if digest is None or there == digest:
            return None
        what = "an unfinished merge of another plan (other config, sources, seed or shard size) is here"
        return Problem(where=location, what=what, remedy="use --overwrite to discard it, or choose another output")
    # A probe is of a look at this output that is made elsewhere just now.
    names = [entry.name for entry in store.list(location) if not entry.name.startswith(f"{JOURNAL}/{PROBE}")]
    if not names:
        return None
    what = "the output holds a finished merge" if RECORD_NAME in names else "the output is not empty"
    return Problem(where=location, what=what, remedy="use --overwrite to replace it, or choose another output")


def checkpoint_objects(store: ObjectStore, location: str) -> list[str]:
    """What --overwrite removes, in this order: record and index first. All else is somebody's own and stays."""
    there = [entry.name for entry in store.list(location)]
    recorded: list[str] = []
    if RECORD_NAME in there:
        try:
            recorded = list(json.loads(store.read_all(join(location, RECORD_NAME)))["files"])
        except (ObjectMissing, ValueError, KeyError, TypeError):
            recorded = []
    parts = [name for name in there if is_part_of_a_model(name)]
    inside = [name for name in recorded if isinstance(name, str) and is_inside(name) and name in there]
    first = [name for name in (RECORD_NAME, INDEX_NAME, RESULT_NAME) if name in there]
    return list(dict.fromkeys([*first, *inside, *parts]))


def _flat(name: str) -> str:
    return name.replace("/", "__")
