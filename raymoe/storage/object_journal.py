"""The journal of a merge whose output is in an object store: the same promises as the local one, with objects.

    OUT/.raymoe/plan.json                 whose the output is (claim.py); written first
    OUT/.raymoe/uploads/RUN/FILE.json     written before a shard's upload begins, again with its id when it has begun
    OUT/.raymoe/sent/RUN/FILE.N.json      parts of an upload that an actor has sent, from part N on
    OUT/.raymoe/parts/RUN/FILE.X          a file being written, where the store has no uploads in parts (fsspec)
    OUT/.raymoe/done/RUN/FILE.json        size and checksum of a finished file
    OUT/.raymoe/clearing.RUN              there while the run removes what an earlier merge left (--overwrite), and
                                          after its sources changed: the next run removes what is there
    OUT/raymoe.json                       the record of the finished merge; then `.raymoe/` is removed, plan.json last

An object store has no locks. A new run replaces `plan.json` first, and so fences off all older runs: they look at it
immediately before they make anything visible, and stop. Then the new run takes away what an older run could still make
visible: it aborts the uploads and removes the parts that older runs have noted. Only then it removes, with
`--overwrite`, what an earlier merge left.

Between a run's look at the output and its claim another run may have begun, or may even have done its whole merge. So
the claim is put only if none is there, where none was; and without `--overwrite` the run looks again after its claim.
If the output is another, the run gives its claim back and is refused.

A run writes notes under its own name only, so that no run overwrites or removes a note of a newer one; and a note is
accepted only from the merge that `plan.json` is of. An upload is used only if `plan.json` was still the run's own after
the upload's id had been noted: a newer run either finds the note, or the older run aborts the upload itself.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from raymoe.errors import MergeFailed, Problem, ProblemReport
from raymoe.object_store.errors import ObjectExists, ObjectMissing
from raymoe.object_store.protocol import ObjectEntry, ObjectStore, UploadedPart
from raymoe.object_store.urls import join_url
from raymoe.storage.claim import Claim, foreign_file_error, replaced_file_error, taken_over_error
from raymoe.storage.file_names import (
    INDEX_NAME,
    JOURNAL,
    MAX_RESULT_BYTES,
    RECORD_NAME,
    RESULT_NAME,
    FileRecord,
    FinishedMerge,
    is_part_of_a_model,
    is_recorded_file,
    is_result,
    json_object,
)

__all__ = [
    "ObjectJournal",
    "RecordedUpload",
    "WrittenFiles",
    "finished_claim",
    "finished_merge",
    "occupied_problems",
    "other_model_files",
    "read_json",
    "recorded_files",
    "remove_checkpoint",
    "visible_files",
]

_AT_ONCE = 8
_CLEARING = "clearing."
_SWEEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedUpload:
    """An upload of a file that a run has noted: `upload_id` None where only its intention is known, and then `known`
    are the uploads that were open before. `is_own`: of this very merge. `note` is where it is noted."""

    name: str
    upload_id: str | None
    known: tuple[str, ...]
    is_own: bool
    note: str


class ObjectJournal:
    """Reads and writes the journal of one output prefix."""

    def __init__(self, store: ObjectStore, root: str, run: str = "") -> None:
        self._store, self._root, self.run = store, root, run
        self._folder = join_url(root, JOURNAL)
        self._claim: Claim | None = None
        self._earlier: tuple[str, ...] = ()  # notes of earlier runs, when this one began

    @property
    def exists(self) -> bool:
        try:
            self._store.read_all(join_url(self._folder, "plan.json"))
        except ObjectMissing:
            return False
        return True

    def claim(self) -> Claim | None:
        """Whose the output is; None where there is no journal, or none that this version of raymoe can read."""
        return Claim.parse(self._read("plan.json"))

    def digest(self) -> str | None:
        claim = self.claim()
        return claim.digest if claim is not None else None

    @property
    def is_of_this_run(self) -> bool:
        claim = self.claim()
        return claim is not None and bool(self.run) and claim.run == self.run

    def check_run(self) -> Claim:
        """The claim of this run. Raises MergeFailed where another run has taken over the output."""
        claim = self.claim()
        if claim is None or not self.run or claim.run != self.run:
            raise taken_over_error(self._root)
        return claim

    def changed_sources(self, fingerprints: Mapping[str, str]) -> list[str]:
        """Local source files that were modified since the unfinished merge began."""
        claim = self.claim()
        return claim.changed_sources(fingerprints) if claim is not None else []

    @property
    def is_clearing(self) -> bool:
        """Whether what is here has to be removed: a run was interrupted at that, or its sources changed."""
        claim = self.claim()
        return claim is not None and any(
            self._store.stat(each) is not None for each in self._clearing_markers(claim.origin)
        )

    def begin(self, digest: str, fingerprints: Mapping[str, str], *, fresh: bool) -> bool:
        """Fence off all older runs, and go on with their merge unless `fresh`.

        Returns whether what is here has to be removed; `mark_cleared` is called when it is. Raises ProblemReport where
        another run has used the output since it was looked at, unless `fresh`, with which it may be replaced.
        """
        before, self.run = self.claim(), uuid.uuid4().hex
        seen = () if fresh else self._snapshot(before)
        has_to_clear = fresh or self.is_clearing
        if not fresh and ((seen and not has_to_clear) or (before is not None and before.digest != digest)):
            raise self._in_use_report(digest)
        goes_on = before is not None and before.digest == digest and not has_to_clear
        origin = before.origin if before is not None and goes_on else self.run
        before_claim, after_claim = self._clearing_markers(self.run)
        if has_to_clear:
            self._store.put(before_claim, b"{}")
        self._claim = Claim(digest=digest, run=self.run, origin=origin, sources=fingerprints)
        try:
            self._write("plan.json", self._claim.plain(), only_if_absent=before is None and not fresh)
        except ObjectExists:
            raise self._in_use_report(digest) from None
        if not fresh and self._snapshot(before) != seen:
            self._withdraw(self._claim)
            raise self._in_use_report(digest)
        if has_to_clear:  # an older run that was just ending may have removed the first one with its own journal
            self._store.put(after_claim, b"{}")
        self._earlier = tuple(entry.name for entry in self._store.list(self._folder) if "/" in entry.name)
        self.check_run()  # so that none of these notes is a newer run's: it writes them after its claim
        return has_to_clear

    def _snapshot(self, before: Claim | None) -> tuple[object, ...]:
        """What must be the same before and after this run has put its claim, which may take long: the put is repeated,
        or the process is stopped. Another run may have done its whole merge meanwhile, and have removed its claim.

        Where there was no claim, these are all files. Else an older run of this merge may still finish shards: only the
        record tells then that another run has ended.
        """
        if before is None:
            return tuple(visible_files(self._store, self._root))
        info = self._store.stat(join_url(self._root, RECORD_NAME))
        return (info.size, info.etag) if info is not None else ()

    def _withdraw(self, claim: Claim) -> None:
        """Remove the claim of this run and its markers, before it has written anything else. Raises MergeFailed where
        the claim is another run's now."""
        self.check_claim(claim)
        self._delete(["plan.json"])
        delete_all(self._store, self._clearing_markers(claim.run))

    def _in_use_report(self, digest: str) -> ProblemReport:
        """What is raised where another run has used the output since this one has looked at it."""
        what = "another run has begun here, or has ended, since this one has looked"
        remedy = "run the same command again: it goes on, or says what is in the way"
        unknown = Problem(where=self._root, what=what, remedy=remedy)
        return ProblemReport(occupied_problems(self._store, self, self._root, digest) or [unknown])

    def invalidate(self) -> None:
        """Note that what this merge has written is of no use: the next run begins again. Raises MergeFailed."""
        _, marker = self._clearing_markers(self.check_run().origin)
        self._store.put(marker, b"{}")

    def mark_cleared(self) -> None:
        """What an earlier merge left is removed; so are its notes, which are of no use any more."""
        self._delete(self._earlier)
        self._earlier = ()
        there = [e.name for e in self._store.list(self._folder, recursive=False) if e.name.startswith(_CLEARING)]
        self.check_run()  # what was there before is no marker of a newer run that may begin now
        self._delete(there)

    def finished(self, name: str) -> FileRecord | None:
        """The record of a file that an earlier run of this merge finished; the caller compares it with the file."""
        for note in self._notes("done", f"{_flat_name(name)}.json"):
            content = self._read(note)
            try:
                if self._claim is not None and self._claim.owns(content):
                    return FileRecord(**content["file"])
            except (KeyError, TypeError):
                continue
        return None

    def record(self, record: FileRecord) -> None:
        """Note a finished file. Raises MergeFailed where another run has taken over."""
        self._note("done", f"{_flat_name(record.name)}.json", {"file": asdict(record)})

    # --- files being written

    def new_part(self, name: str) -> str:
        """A URL for one attempt at writing a file, never given twice."""
        return join_url(self._folder, f"parts/{self.run}/{_flat_name(name)}.{uuid.uuid4().hex}")

    def remove_earlier_parts(self) -> None:
        """Take the files away that older runs were writing, so that they can't move them to their places any more."""
        self._delete(name for name in self._earlier if name.startswith("parts/"))

    def remove_own_parts(self) -> None:
        folder = f"parts/{self.run}"
        self._delete(f"{folder}/{entry.name}" for entry in self._store.list(join_url(self._folder, folder)))

    # --- uploads in parts

    def announce_upload(self, name: str, known: Sequence[str]) -> None:
        """An upload of `name` is about to begin; `known` are the open ones of that name that are not of this run."""
        self._note("uploads", f"{_flat_name(name)}.json", {"id": None, "known": list(known)})

    def record_upload(self, name: str, upload_id: str) -> None:
        """Raises MergeFailed where another run has taken over, after the note is written: the upload is of no use."""
        claim = self._claim or self.check_run()
        content = {**claim.signature, "id": upload_id, "known": []}
        self._write(f"uploads/{self.run}/{_flat_name(name)}.json", content)
        self.check_run()

    def forget_upload(self, name: str) -> None:
        """Remove this run's own note."""
        self._delete([f"uploads/{self.run}/{_flat_name(name)}.json"])

    def forget(self, upload: RecordedUpload) -> None:
        self._delete([upload.note])
        self._earlier = tuple(name for name in self._earlier if name != upload.note)

    def earlier_uploads(self, name: str) -> list[RecordedUpload]:
        """The uploads of `name` that earlier runs have noted."""
        return list(self._parse_notes(self._notes("uploads", f"{_flat_name(name)}.json")))

    def all_earlier_uploads(self) -> list[RecordedUpload]:
        return list(self._parse_notes(name for name in self._earlier if name.startswith("uploads/")))

    def all_uploads(self) -> list[RecordedUpload]:
        """All uploads that are noted now, by whichever run."""
        entries = self._store.list(join_url(self._folder, "uploads"))
        return list(self._parse_notes(f"uploads/{entry.name}" for entry in entries))

    def record_sent(self, name: str, upload_id: str, parts: Sequence[UploadedPart]) -> None:
        """Note parts that the store has, so that a run that goes on knows them again."""
        content = {"upload": upload_id, "parts": [[part.number, part.etag, part.size] for part in parts]}
        self._note("sent", f"{_flat_name(name)}.{parts[0].number}.json", content)

    def sent_parts(self, name: str, upload_id: str) -> set[UploadedPart]:
        """The parts of an upload that earlier runs of this merge have noted as sent."""
        found: set[UploadedPart] = set()
        for note in self._earlier:
            kind, _, rest = note.partition("/")
            if kind != "sent" or rest.rpartition("/")[2].rsplit(".", 2)[0] != _flat_name(name):
                continue
            content = self._read(note)
            if self._claim is None or not self._claim.owns(content) or content.get("upload") != upload_id:
                continue
            try:
                found |= {UploadedPart(number=n, etag=etag, size=size) for n, etag, size in content["parts"]}
            except (KeyError, TypeError, ValueError):
                continue
        return found

    def clear_unclaimed(self) -> None:
        """Remove the notes of a journal without a claim, as two runs of one merge may leave it that end at once. The
        caller knows that the merge is finished."""
        there = [entry.name for entry in self._store.list(self._folder)]
        if there and not self.exists:  # so that none is a newer run's note: it writes them after its claim
            self._delete(there)

    def clear(self, claim: Claim) -> None:
        """Forget everything, as long as the output is that claim's. Raises MergeFailed where it is not any more.

        `plan.json` goes last, so that a run that dies over it is followed by one that goes on. What is removed was
        there while the claim was: it is no note of a newer run.
        """
        there = [entry.name for entry in self._store.list(self._folder) if entry.name != "plan.json"]
        self.check_claim(claim)
        self._delete(there)
        self.check_claim(claim)
        self._delete(["plan.json"])

    def check_claim(self, claim: Claim) -> None:
        """Raises MergeFailed where another run has taken over the output since that claim was read."""
        if self.claim() != claim:
            raise taken_over_error(self._root)

    def _clearing_markers(self, run: str) -> tuple[str, str]:
        """Two markers: one is put before `plan.json`, one after it."""
        return join_url(self._folder, f"{_CLEARING}{run}"), join_url(self._folder, f"{_CLEARING}{run}.again")

    def _notes(self, kind: str, name: str) -> Iterator[str]:
        """Notes of earlier runs of one kind and name; an older raymoe had no folders of runs."""
        return (note for note in self._earlier if note.startswith(f"{kind}/") and note.rpartition("/")[2] == name)

    def _parse_notes(self, notes: Iterable[str]) -> Iterator[RecordedUpload]:
        for note in notes:
            content = self._read(note)
            if "id" not in content:  # gone meanwhile, or damaged
                continue
            upload_id, known = content["id"], content.get("known")
            yield RecordedUpload(
                name=note.rpartition("/")[2].removesuffix(".json"),
                upload_id=upload_id if isinstance(upload_id, str) and upload_id else None,
                known=tuple(map(str, known)) if isinstance(known, list) else (),
                is_own=self._claim is not None and self._claim.owns(content),
                note=note,
            )

    def _note(self, kind: str, name: str, content: Mapping[str, Any]) -> None:
        """Write a note. A newer run may have cleared the journal meanwhile, and would not look for it any more."""
        note = f"{kind}/{self.run}/{name}"
        self._write(note, {**self.check_run().signature, **content})
        try:
            self.check_run()
        except MergeFailed:
            self._delete([note])
            raise

    def _delete(self, names: Iterable[str]) -> None:
        delete_all(self._store, [join_url(self._folder, name) for name in names])

    def _read(self, name: str) -> dict[str, Any]:
        return read_json(self._store, join_url(self._folder, name))

    def _write(self, name: str, content: Mapping[str, Any], *, only_if_absent: bool = False) -> None:
        self._store.put(join_url(self._folder, name), json.dumps(content).encode(), only_if_absent=only_if_absent)


class WrittenFiles:
    """What this run has made visible, as the store showed it then: nothing else may be there when the merge is done.

    Stores have no lock: a request of an older run that was under way for a long time may still replace a file after the
    newer run has written it. That is seen here, before the index and the record are written.
    """

    def __init__(self, store: ObjectStore, location: str) -> None:
        self._store, self._location = store, location
        self._seen: dict[str, tuple[int, str | None]] = {}

    def add(self, name: str, size: int, etag: str | None) -> None:
        self._seen[name] = (size, etag)

    def check(self) -> None:
        """Raise MergeFailed if one is not there any more as it was written, or a file of another model is there."""
        if others := other_model_files(self._store, self._location, self._seen):
            raise foreign_file_error(join_url(self._location, others[0]))
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="check") as pool:
            wrong = [name for name, is_same in zip(self._seen, pool.map(self._is_same, self._seen)) if not is_same]
        if wrong:
            raise replaced_file_error(join_url(self._location, wrong[0]))

    def _is_same(self, name: str) -> bool:
        info, (size, etag) = self._store.stat(join_url(self._location, name)), self._seen[name]
        return info is not None and info.size == size and (etag is None or info.etag == etag)


def finished_merge(store: ObjectStore, journal: ObjectJournal, location: str) -> FinishedMerge | None:
    """The finished merge that is here, by its record; None where there is none, or a merge has begun to replace it."""
    is_journal_there = journal.exists
    found = FinishedMerge.of(read_json(store, join_url(location, RECORD_NAME)))
    if found is not None and is_journal_there and (journal.digest() != found.digest or journal.is_clearing):
        return None
    return found


def finished_claim(store: ObjectStore, journal: ObjectJournal, location: str) -> Claim | None:
    """The claim of the finished merge that is here, where its journal has not gone yet; None where it has, or where the
    journal is of another merge: a newer run may be at work."""
    claim, finished = journal.claim(), finished_merge(store, journal, location)
    return claim if claim is not None and finished is not None and finished.digest == claim.digest else None


def occupied_problems(store: ObjectStore, journal: ObjectJournal, location: str, digest: str | None) -> list[Problem]:
    """Why an output can't be taken, if it can't: only an unfinished run of this very plan may go on, and what this very
    plan gave is complete, unless something has become of its files."""
    finished = finished_merge(store, journal, location)
    if finished is not None and finished.digest == digest:
        sizes = {entry.name: entry.size for entry in store.list(location)}
        return finished.problems(location, sizes.get)
    remedy = "use --overwrite to discard it, or choose another output"
    if journal.exists:
        there = journal.digest()
        if digest is not None and there == digest:
            return _foreign_record_problems(store, journal, location)
        if digest is None:
            return []
        what = "an unfinished merge of another plan (other config, sources, seed or shard size) is here"
        if there is None:
            what = "an unfinished merge of another version of raymoe is here, or its journal is damaged"
        return [Problem(where=location, what=what, remedy=remedy)]
    names = visible_files(store, location)
    if not names:
        return []
    what = "the output holds a finished merge" if RECORD_NAME in names else "the output is not empty"
    return [Problem(where=location, what=what, remedy="use --overwrite to replace it, or choose another output")]


def _foreign_record_problems(store: ObjectStore, journal: ObjectJournal, location: str) -> list[Problem]:
    """The problem of a record of another plan beside an unfinished merge, which no run leaves that ends in order."""
    if store.stat(join_url(location, RECORD_NAME)) is None or journal.is_clearing:
        return []
    what = "a merge of another plan has ended here over the unfinished one of this plan; files of both may be here"
    return [Problem(where=location, what=what, remedy="use --overwrite to discard both, or choose another output")]


def visible_files(store: ObjectStore, location: str) -> list[str]:
    """Names of all objects of an output but those of its journal; none where they only tell how earlier runs went."""
    others = [entry for entry in store.list(location) if not entry.name.startswith(f"{JOURNAL}/")]
    return [] if all(_is_result(store, location, each) for each in others) else [each.name for each in others]


def _is_result(store: ObjectStore, location: str, entry: ObjectEntry) -> bool:
    if entry.size > MAX_RESULT_BYTES or "/" in entry.name or is_part_of_a_model(entry.name):
        return False
    try:
        return is_result(store.read_all(join_url(location, entry.name)))
    except ObjectMissing:
        return False


def other_model_files(store: ObjectStore, location: str, own: Container[str]) -> list[str]:
    """Files that readers take for a part of the model here and that are not among `own`. The index is looked at by
    itself: an earlier run of the same merge may have written it."""
    names = (entry.name for entry in store.list(location))
    return sorted(name for name in names if is_part_of_a_model(name) and name not in own and name != INDEX_NAME)


def remove_checkpoint(store: ObjectStore, location: str, check: Callable[[], object]) -> None:
    """Remove what --overwrite replaces, record and index first. All else is of other programs, and stays.

    `check` is called before each removal, and raises where the output has been taken over. What an older run was just
    making visible may appear meanwhile, so that it is looked for again.
    """
    for _ in range(_SWEEPS):
        names = _checkpoint_objects(store, location)
        for name in names:
            check()
            store.delete(join_url(location, name))
        if not names:
            return


def _checkpoint_objects(store: ObjectStore, location: str) -> list[str]:
    entries = {entry.name: entry for entry in store.list(location)}
    if RESULT_NAME in entries and not _is_result(store, location, entries[RESULT_NAME]):
        del entries[RESULT_NAME]  # another file of that name is the user's
    recorded = recorded_files(store, location) if RECORD_NAME in entries else []
    names = (RECORD_NAME, INDEX_NAME, RESULT_NAME, *recorded, *filter(is_part_of_a_model, entries))
    return [name for name in dict.fromkeys(names) if name in entries]


def recorded_files(store: ObjectStore, location: str) -> list[str]:
    """Names of the files that an earlier merge wrote, as far as its record can be read."""
    files = read_json(store, join_url(location, RECORD_NAME)).get("files")
    names = files if isinstance(files, (dict, list)) else ()
    return [name for name in names if is_recorded_file(name)]


def delete_all(store: ObjectStore, urls: Sequence[str]) -> None:
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="delete") as pool:
        list(pool.map(store.delete, urls))


def read_json(store: ObjectStore, url: str) -> dict[str, Any]:
    """A JSON object of the store; empty where there is none."""
    try:
        return json_object(store.read_all(url))
    except ObjectMissing:
        return {}


def _flat_name(name: str) -> str:
    return name.replace("/", "__")
