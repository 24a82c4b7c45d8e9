"""The journal of a merge in an object store. It gives the same guarantees as the local one, with objects.

    OUT/.raymoe/plan.json                 whose the output is (claim.py); written first
    OUT/.raymoe/uploads/RUN/FILE.ID.json  the id of a shard's upload, written as soon as it has begun; ID is its hash
    OUT/.raymoe/uploads/RUN/FILE.json     the same, where the upload was announced before
    OUT/.raymoe/known/RUN.json            the uploads below OUT that were open before the run opened its own
    OUT/.raymoe/sent/RUN/FILE.N.json      parts of an upload that an actor has sent from local files, from part N on
    OUT/.raymoe/parts/RUN/FILE.X          a file being written, where the store has no uploads in parts (fsspec)
    OUT/.raymoe/done/RUN/FILE.json        size, checksum and ETag of a finished file, and the id of its upload
    OUT/.raymoe/done/RUN/FILE.SIZE.ETAG.json    the same, if its checksum is the ETag
    OUT/.raymoe/reads/RUN                 what planning has read (sources/kept_reads.py); RUN is the merge's first run
    OUT/.raymoe/clearing.RUN              there while the run removes what an earlier merge left (--overwrite), and
                                          after its sources changed: the next run removes what is there
    OUT/raymoe.json                       the record of the finished merge; then `.raymoe/` is removed, plan.json last

An object store has no locks. A new run replaces `plan.json` first, and so fences off all older runs: they check it
immediately before they make an object visible, and stop. Then the new run removes what an older run could still make
visible: it aborts the uploads and deletes the parts that older runs have noted. Only then, with `--overwrite`, does it
remove the files of an earlier merge.

Between a run's check of the output and its claim, another run may have begun, or may even have completed its merge. So
if there was no claim, the claim is put only if there still is none; and without `--overwrite` the run checks again
after its claim. If the output has changed, the run withdraws its claim and is refused.

A run writes notes under its own name only, so that it can't overwrite or remove a newer run's note. A note is accepted
only if it belongs to the merge of `plan.json`: its content says so, or it lies in the folder of one of that merge's
runs, which `plan.json` lists. So a run that resumes need not read the notes of finished shards, whose names say
everything, nor those of open uploads, which the store lists too. Only `reads/` is shared by the runs of a merge: each
would write the same there. An upload is used only if `plan.json` was still the run's own after the
upload's id had been noted: a newer run either finds the note, or the older run aborts the upload itself.

A run may die between the start of an upload and the note of its id. `known/RUN.json` identifies such an upload: it is
open, is not among the known ones, and is of a shard for which the run has noted no id. Some stores list only the
uploads of one exact key. There the note in `uploads/` is written before the upload begins too, with the known uploads
of that key instead of its id.

After the last note of a shard there is no check of `plan.json`. The next check confirms it; if that check finds another
merge in the output, or none, the note is removed again (`check_run`). A run that ends checks once more for notes that
arrived while it removed the journal.

Thread-safe once the run has begun.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from raymoe.errors import MergeFailed, Problem, ProblemReport
from raymoe.object_store.errors import ObjectExists
from raymoe.object_store.parallel import CALLS_AT_ONCE
from raymoe.object_store.protocol import BeforeRetry, ObjectStore, OpenUpload, UploadedPart
from raymoe.object_store.urls import join_url
from raymoe.sources.folder_protocol import matches
from raymoe.storage.base_journal import CLEARING, BaseJournal, flat_name
from raymoe.storage.claim import Claim, TakenOver, taken_over_error
from raymoe.storage.file_names import CHECKPOINT_FILES, JOURNAL, RECORD_NAME, FileRecord, json_object
from raymoe.storage.output_files import StoreFiles

# The name of a finished file's note that says everything: the file, its size, and the ETag of an upload in parts.
_DONE_NAME = re.compile(r"(?P<file>.+)\.(?P<size>\d+)\.(?P<etag>[0-9a-f]{32}-\d+)\.json")
_UPLOAD_NAME = re.compile(r"(?P<file>.+)\.(?P<hash>[0-9a-f]{32})\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedUpload:
    """An upload of a file, as a run has noted it. `upload_id` is None if only its intention was noted; then `known` are
    the uploads that were open before. `is_own`: of this very merge. `note` is the note's name. `name` is flat."""

    name: str
    upload_id: str | None
    known: tuple[str, ...]
    is_own: bool
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DoneNote:
    """The note of a finished file: its record, the store's ETag, and whether it came from an upload. Notes of an older
    raymoe have the record only."""

    record: FileRecord
    etag: str | None = None
    is_uploaded: bool = False


class ObjectJournal(BaseJournal):
    """Reads and writes the journal of one output prefix."""

    def __init__(self, files: StoreFiles, run: str = "") -> None:
        super().__init__(files.location, run)
        self._files = files
        self._folder = join_url(files.location, JOURNAL)
        self._claim: Claim | None = None
        self._earlier: tuple[str, ...] = ()  # notes of earlier runs, when this one began
        self._by_file: dict[tuple[str, str], list[str]] = {}  # the same, by kind and (flat) name of the file
        self._contents: dict[str, dict[str, Any]] = {}  # their content, as far as it has been read
        self._unconfirmed: set[str] = set()  # own notes that no check of `plan.json` has confirmed yet
        self._announced: set[str] = set()  # files whose upload this run has announced
        self._lock = threading.Lock()  # guards the four fields above
        self.before_retry: BeforeRetry | None = None  # for the notes of a run that has begun; set by the output

    @property
    def _store(self) -> ObjectStore:
        return self._files.store

    @property
    def exists(self) -> bool:
        return self._files.read(f"{JOURNAL}/plan.json") is not None

    def begin(self, digest: str, fingerprints: Mapping[str, str], *, fresh: bool) -> bool:
        """Fence off all older runs, and resume their merge unless `fresh`.

        Returns whether the files here have to be removed; call `mark_cleared` afterwards. Raises ProblemReport if
        another run has used the output since the first check, unless `fresh` allows its replacement.
        """
        before, self.run = self.claim(), uuid.uuid4().hex
        seen = () if fresh else self._snapshot(before)
        has_to_clear = fresh or self.is_clearing
        if not fresh and ((seen and not has_to_clear) or (before is not None and before.digest != digest)):
            raise self._in_use_report(digest)
        before_claim, after_claim = self._clearing_markers(self.run)
        if has_to_clear:
            self._store.put(before_claim, b"{}")
        self._claim = self._next_claim(before, digest, fingerprints, fresh=has_to_clear)
        try:
            self._write_claim(self._claim, only_if_absent=before is None and not fresh)
        except ObjectExists:
            raise self._in_use_report(digest) from None
        if not fresh and self._snapshot(before) != seen:
            self._withdraw(self._claim)
            raise self._in_use_report(digest)
        if has_to_clear:  # an older run that was just ending may have removed the first marker with its own journal
            self._store.put(after_claim, b"{}")
        self._set_earlier(entry.name for entry in self._store.list(self._folder) if "/" in entry.name)
        self.check_run()  # so that none of these notes is a newer run's, which writes them after its claim
        if not has_to_clear:
            self._read_all(n for n in self._earlier if n.startswith(("done/", "sent/")) and not self._named(n))
        return has_to_clear

    def read_uploads(self, opened: Iterable[OpenUpload]) -> None:
        """Read the notes of uploads that have not become a shard of this merge. `opened` are the open uploads: the note
        of one of them is not read if a run of this merge has written it, since its name has the hash of the id."""
        claim, done = self._claim or self.check_run(), set(self._uploads_done())
        ids = {_id_hash(upload.upload_id): upload.upload_id for upload in opened}
        needed = [n for n in self._earlier if n.startswith("uploads/") and (_run_of(n), _file_of(n)) not in done]
        found = {}
        for note in needed:
            match = _UPLOAD_NAME.fullmatch(note.rpartition("/")[2])
            if match is not None and match["hash"] in ids and _run_of(note) in claim.earlier:
                found[note] = {**claim.signature, "id": ids[match["hash"]], "known": []}
        with self._lock:
            self._contents |= found
        self._read_all([*(n for n in needed if n not in found), *(n for n in self._earlier if n.startswith("known/"))])

    def _uploads_done(self) -> Iterator[tuple[str, str]]:
        """The run and the file of each upload that has become a shard of this merge, as the same run has noted."""
        for name in self._earlier:
            note = self._done_note(name) if name.startswith("done/") else None
            if note is not None and note.is_uploaded:
                yield _run_of(name), _file_of(name)

    def _read_all(self, names: Iterable[str]) -> None:
        names = list(names)
        with ThreadPoolExecutor(CALLS_AT_ONCE, thread_name_prefix="journal") as pool:
            contents = dict(zip(names, pool.map(self._read, names), strict=True))
        with self._lock:
            self._contents |= contents

    def _snapshot(self, before: Claim | None) -> tuple[object, ...]:
        """State that must not change while this run puts its claim, which may take long: the put may be retried, or the
        process stopped. Another run may complete its whole merge meanwhile, and remove its claim.

        Without an earlier claim, the state is the list of all files. Otherwise an older run of this merge may still
        finish shards, so only the record shows that another run has ended.
        """
        if before is None:
            return tuple(self._files.visible_files())
        info = self._store.stat(self._files.place(RECORD_NAME))
        return (info.size, info.etag) if info is not None else ()

    def _withdraw(self, claim: Claim) -> None:
        """Remove the claim of this run and its markers, before it has written anything else. Raises MergeFailed if the
        claim is another run's now."""
        self.check_claim(claim)
        self._delete(["plan.json"])
        self._store.delete_all(self._clearing_markers(claim.run))

    def _in_use_report(self, digest: str) -> ProblemReport:
        """The error for an output that another run has used since this run checked it."""
        what = "another run has begun here, or has ended, since this one checked the output"
        remedy = "run the same command again: it goes on, or says what is in the way"
        unknown = Problem(where=self._location, what=what, remedy=remedy)
        finished = self._files.finished_merge(self)
        return ProblemReport(self._files.problems(self, finished, digest) or [unknown])

    def invalidate(self) -> None:
        _, marker = self._clearing_markers(self.check_run().origin)
        self._store.put(marker, b"{}", before_retry=self.before_retry)

    def mark_cleared(self) -> None:
        """Called when the files of an earlier merge are removed: removes their notes too."""
        self._delete(self._earlier)
        self._set_earlier(())
        there = [e.name for e in self._store.list_folder(self._folder).objects if e.name.startswith(CLEARING)]
        self.check_run()  # so that the markers found before are not those of a newer run
        self._delete(there)

    def finished(self, name: str) -> FileRecord | None:
        note = self.done(name)
        return note.record if note is not None else None

    def done(self, name: str) -> DoneNote | None:
        """The note of a file that an earlier run of this merge finished."""
        notes = map(self._done_note, self._notes("done", name))
        return next((note for note in notes if note is not None), None)

    @property
    def has_done(self) -> bool:
        """Whether an earlier run of this merge has finished a file."""
        return any(name.startswith("done/") for name in self._earlier)

    def _named(self, note: str) -> DoneNote | None:
        """The note of a finished file that its name says completely, if a run of this merge has written it."""
        match = _DONE_NAME.fullmatch(note.rpartition("/")[2])
        if match is None or self._claim is None or _run_of(note) not in self._claim.earlier:
            return None
        etag = match["etag"]
        record = FileRecord(name=match["file"], size=int(match["size"]), checksum=f"etag:{etag}")
        return DoneNote(record=record, etag=etag, is_uploaded=True)

    def _done_note(self, note: str) -> DoneNote | None:
        if (named := self._named(note)) is not None:
            return named
        content = self._contents.get(note, {})
        record = self._claim.accepted_record(content) if self._claim is not None else None
        if record is None:
            return None
        etag, upload_id = content.get("etag"), content.get("upload")
        return DoneNote(
            record=record, etag=etag if isinstance(etag, str) else None, is_uploaded=isinstance(upload_id, str)
        )

    def record(self, record: FileRecord, *, etag: str | None = None, upload_id: str | None = None) -> None:
        """Note a finished file. The next check of `plan.json` confirms the note."""
        content = {"file": asdict(record), "etag": etag, "upload": upload_id}
        name = f"{flat_name(record.name)}.json"
        if upload_id is not None and record.checksum == f"etag:{etag}":
            short = f"{flat_name(record.name)}.{record.size}.{etag}.json"
            name = short if _DONE_NAME.fullmatch(short) else name
        self._note_unconfirmed(f"done/{self.run}/{name}", content)

    # --- what planning has read

    def kept_reads(self) -> bytes:
        """What a run of the unfinished merge has kept of its planning; empty if there is nothing."""
        claim = self.claim()
        return b"" if claim is None else self._files.read(f"{JOURNAL}/{_reads_of(claim)}") or b""

    def keep_reads(self, content: bytes) -> None:
        """Keep what planning has read for the runs that resume this merge. The next check of `plan.json` confirms
        it."""
        note = _reads_of(self._claim or self.check_run())
        with self._lock:
            self._unconfirmed.add(note)
        self._store.put(join_url(self._folder, note), content, before_retry=self.before_retry)

    # --- files being written

    def new_part(self, name: str) -> str:
        """A unique URL for one attempt at writing a file."""
        return join_url(self._folder, f"parts/{self.run}/{flat_name(name)}.{uuid.uuid4().hex}")

    def remove_earlier_parts(self) -> None:
        """Remove the files that older runs were writing, so that they can't be renamed to their final names any
        more."""
        self._delete(name for name in self._earlier if name.startswith("parts/"))

    def remove_own_parts(self) -> None:
        folder = f"parts/{self.run}"
        self._delete(f"{folder}/{entry.name}" for entry in self._store.list(join_url(self._folder, folder)))

    # --- uploads in parts

    def record_known(self, known: Sequence[str]) -> None:
        """Note the ids of all uploads below the output that were open before this run opened one. The store must be
        able to list them all."""
        self._note_unconfirmed(f"known/{self.run}.json", {"uploads": list(known)})

    def lost_uploads(self, opened: Iterable[OpenUpload]) -> list[OpenUpload]:
        """The uploads among `opened` below the output that an earlier run opened but died before it noted their ids."""
        notes = [name for name in self._earlier if name.startswith("uploads/")]
        noted = {self._contents[name].get("id") for name in notes if name in self._contents}
        has_begun = {(_run_of(name), _file_of(name)) for name in notes}
        found = []
        for upload in opened:
            name = flat_name(upload.url.removeprefix(f"{self._location}/"))
            if not matches(name, CHECKPOINT_FILES) or upload.upload_id in noted:
                continue
            for run, known in self._earlier_known():
                if upload.upload_id not in known and (run, name) not in has_begun:
                    found.append(upload)
                    break
        return found

    def _earlier_known(self) -> Iterator[tuple[str, list[Any]]]:
        """The uploads known to earlier runs, by run."""
        for name in self._earlier:
            known = self._contents.get(name, {}).get("uploads") if name.startswith("known/") else None
            if isinstance(known, list):
                yield name.removeprefix("known/").removesuffix(".json"), known

    def forget_known(self) -> None:
        """Remove the notes of uploads known to earlier runs, after the uploads without a noted id were aborted."""
        self._forget([name for name in self._earlier if name.startswith("known/")])

    def forget_own_known(self) -> None:
        """Remove this run's own note of earlier open uploads: it has noted the ids of all uploads that it opened."""
        note = f"known/{self.run}.json"
        with self._lock:
            self._unconfirmed.discard(note)
        self._delete([note])

    def announce_upload(self, name: str, known: Sequence[str]) -> None:
        """Note that an upload of `name` is about to begin; `known` are its open uploads that are not this run's. The
        note of its id replaces this one."""
        self._announced.add(name)
        self._note("uploads", f"{flat_name(name)}.json", {"id": None, "known": list(known)})

    def record_upload(self, name: str, upload_id: str) -> None:
        """Note the id. If another run has taken over, raises MergeFailed after writing the note: the upload is of no
        use."""
        claim = self._claim or self.check_run()
        content = {**claim.signature, "id": upload_id, "known": []}
        self._write_note(self._own_upload(name, upload_id), content)
        self.check_run()

    def forget_upload(self, name: str, upload_id: str) -> None:
        """Remove this run's own note."""
        self._delete([self._own_upload(name, upload_id)])

    def _own_upload(self, name: str, upload_id: str) -> str:
        """The name of this run's note of an upload."""
        by_id = "" if name in self._announced else f".{_id_hash(upload_id)}"
        return f"uploads/{self.run}/{flat_name(name)}{by_id}.json"

    def forget(self, uploads: Iterable[RecordedUpload]) -> None:
        self._forget([upload.note for upload in uploads])

    def _forget(self, notes: Sequence[str]) -> None:
        if notes:
            self._delete(notes)
            with self._lock:
                forgotten = set(notes)
                self._earlier = tuple(name for name in self._earlier if name not in forgotten)
                for key in {_key_of(note) for note in notes}:
                    self._by_file[key] = [name for name in self._by_file.get(key, ()) if name not in forgotten]

    def earlier_uploads(self, name: str) -> list[RecordedUpload]:
        """The uploads of `name` that earlier runs noted, without uploads that have become a shard of this merge."""
        return list(self._parse_notes(self._notes("uploads", name)))

    def all_earlier_uploads(self) -> list[RecordedUpload]:
        return list(self._parse_notes(name for name in self._earlier if name.startswith("uploads/")))

    def other_uploads(self) -> list[RecordedUpload]:
        """All uploads that other runs have noted so far, without those that have become shards of this merge."""
        entries = self._store.list(join_url(self._folder, "uploads"))
        names = [f"uploads/{entry.name}" for entry in entries]
        done = set(self._uploads_done())
        others = [
            n for n in names if (_run_of(n), _file_of(n)) not in done and not (self.run and _run_of(n) == self.run)
        ]
        self._read_all(name for name in others if name not in self._contents)
        return list(self._parse_notes(others))

    def record_sent(self, name: str, upload_id: str, parts: Sequence[UploadedPart]) -> None:
        """Note parts that the store has, so that a run that resumes can use them."""
        content = {"upload": upload_id, "parts": [[part.number, part.etag, part.size] for part in parts]}
        self._note("sent", f"{flat_name(name)}.{parts[0].number}.json", content)

    def sent_parts(self, name: str, upload_id: str) -> set[UploadedPart]:
        """The parts of an upload that earlier runs of this merge have noted as sent."""
        return self._parts_in(self._notes("sent", name), upload_id)

    def read_sent_parts(self, name: str, upload_id: str) -> set[UploadedPart]:
        """The same, with this run's own notes so far: for an actor, since only the coordinator's journal begins the
        run."""
        self._claim = self.check_run()
        there = [f"sent/{entry.name}" for entry in self._store.list(join_url(self._folder, "sent"))]
        notes = [note for note in there if _file_of(note) == flat_name(name)]
        self._read_all(notes)
        return self._parts_in(notes, upload_id)

    def _parts_in(self, notes: Iterable[str], upload_id: str) -> set[UploadedPart]:
        found: set[UploadedPart] = set()
        for content in (self._contents.get(note, {}) for note in notes):
            if self._claim is None or not self._claim.owns(content) or content.get("upload") != upload_id:
                continue
            try:
                found |= {UploadedPart(number=n, etag=etag, size=size) for n, etag, size in content["parts"]}
            except (KeyError, TypeError, ValueError):
                continue
        return found

    def clear_unclaimed(self) -> None:
        """Remove the notes of a journal without a claim. Two runs of one merge that end at once may leave them. The
        caller knows that the merge is finished."""
        there = [entry.name for entry in self._store.list(self._folder)]
        if there and not self.exists:  # so that none is a newer run's note, which is written after its claim
            self._delete(there)

    def clear(self, claim: Claim) -> None:
        """Remove the journal while the output still belongs to this claim. Raises MergeFailed if it does not any more.

        `plan.json` goes last: if this run dies during the removal, the next run continues it. The removed notes existed
        while the claim was valid, so none is a newer run's.
        """
        there = [entry.name for entry in self._store.list(self._folder) if entry.name != "plan.json"]
        self.check_claim(claim)
        self._delete(there)
        self.check_claim(claim)
        self._delete(["plan.json"])
        self.clear_unclaimed()

    def check_claim(self, claim: Claim) -> None:
        """Raises MergeFailed if another run has taken over the output since this claim was read."""
        if self.claim() != claim:
            raise taken_over_error(self._location)

    def _is_marked(self, run: str) -> bool:
        names = (url.removeprefix(f"{self._location}/") for url in self._clearing_markers(run))
        return any(self._files.stat(name) is not None for name in names)

    def _clearing_markers(self, run: str) -> tuple[str, str]:
        """Two markers: one is put before `plan.json`, one after it."""
        return join_url(self._folder, f"{CLEARING}{run}"), join_url(self._folder, f"{CLEARING}{run}.again")

    def _set_earlier(self, notes: Iterable[str]) -> None:
        self._earlier, self._by_file = tuple(notes), {}
        for note in self._earlier:
            self._by_file.setdefault(_key_of(note), []).append(note)

    def _notes(self, kind: str, name: str) -> Sequence[str]:
        """Notes of earlier runs of one kind about a file."""
        return self._by_file.get((kind, flat_name(name)), ())

    def _parse_notes(self, notes: Iterable[str]) -> Iterator[RecordedUpload]:
        for note in notes:
            content = self._contents.get(note, {})
            if "id" not in content:  # removed meanwhile, or damaged
                continue
            upload_id, known = content["id"], content.get("known")
            yield RecordedUpload(
                name=_file_of(note),
                upload_id=upload_id if isinstance(upload_id, str) and upload_id else None,
                known=tuple(map(str, known)) if isinstance(known, list) else (),
                is_own=self._claim is not None and self._claim.owns(content),
                note=note,
            )

    def _note(self, kind: str, name: str, content: Mapping[str, Any]) -> None:
        """Write a note and check `plan.json`: if a newer run cleared the journal meanwhile, it would not find this
        note."""
        note = f"{kind}/{self.run}/{name}"
        content = {**self.check_run().signature, **content}
        try:
            self._write_note(note, content)
            self.check_run()
        except MergeFailed:
            self._delete([note])
            raise

    def _note_unconfirmed(self, note: str, content: Mapping[str, Any]) -> None:
        """Write a note. The next check of `plan.json` confirms it."""
        with self._lock:
            self._unconfirmed.add(note)
        self._write_note(note, {**(self._claim or self.check_run()).signature, **content})

    def check_run(self) -> Claim:
        with self._lock:
            notes = tuple(self._unconfirmed)
        try:
            claim = super().check_run()
        except TakenOver:
            self.withdraw_notes()
            raise
        with self._lock:
            self._unconfirmed.difference_update(notes)
        return claim

    @property
    def has_unconfirmed(self) -> bool:
        return bool(self._unconfirmed)

    def withdraw_notes(self) -> None:
        """Remove this run's notes that no check of `plan.json` has confirmed, if another merge is in the output by now,
        or none: that run has removed its journal, and would not find them. A newer run of this merge may rely on them,
        and removes them when it ends."""
        claim = self.claim()
        if claim is None or self._claim is None or not claim.owns(self._claim.signature):
            with self._lock:
                notes = sorted(self._unconfirmed)
                self._unconfirmed.clear()
            self._delete(notes)

    def through(self, files: StoreFiles) -> ObjectJournal:
        """This journal, read and written through another `StoreFiles`."""
        other = copy.copy(self)
        other._files = files
        return other

    def _delete(self, names: Iterable[str]) -> None:
        self._store.delete_all([join_url(self._folder, name) for name in names])

    def _read(self, name: str) -> dict[str, Any]:
        return json_object(self._files.read(f"{JOURNAL}/{name}") or b"")

    def _write_claim(self, claim: Claim, *, only_if_absent: bool) -> None:
        content = json.dumps(claim.plain()).encode()
        self._store.put(join_url(self._folder, "plan.json"), content, only_if_absent=only_if_absent)

    def _write_note(self, name: str, content: Mapping[str, Any]) -> None:
        url = join_url(self._folder, name)
        self._store.put(url, json.dumps(content).encode(), before_retry=self.before_retry)


def _reads_of(claim: Claim) -> str:
    """The name of what planning has read. It is one name per merge, so a run that resumes writes over it."""
    return f"reads/{claim.origin}"


def _key_of(note: str) -> tuple[str, str]:
    """The kind of a note, and the file that it is about."""
    return note.partition("/")[0], _file_of(note)


def _file_of(note: str) -> str:
    """The (flat) name of the file that a note is about."""
    kind, name = note.partition("/")[0], note.rpartition("/")[2]
    if kind == "sent":
        return name.rsplit(".", 2)[0]
    match = _DONE_NAME.fullmatch(name) if kind == "done" else _UPLOAD_NAME.fullmatch(name)
    return match["file"] if match is not None else name.removesuffix(".json")


def _run_of(note: str) -> str:
    """The run that has written a note. An older raymoe had no folders per run."""
    parts = note.split("/")
    return parts[1] if len(parts) == 3 else ""


def _id_hash(upload_id: str) -> str:
    """Stands for an upload's id in the name of its note: some stores have long ids with any characters."""
    return hashlib.sha256(upload_id.encode()).hexdigest()[:32]
