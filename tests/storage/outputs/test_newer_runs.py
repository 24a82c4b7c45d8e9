"""What an older command does to the journal of a newer run on a store, and what an interrupted run leaves to the next.

No server: the store is in memory; its uploads in parts are no more than their ids.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from raymoe.errors import MergeFailed, Problem
from raymoe.object_store.errors import UploadNotFound
from raymoe.object_store.fsspec_store import FsspecStore
from raymoe.object_store.location import Location
from raymoe.object_store.options import StorageOptions
from raymoe.storage.file_names import INDEX_NAME, RECORD_NAME
from raymoe.storage.locations import Inputs
from raymoe.storage.output_files import OutputFiles
from raymoe.storage.outputs import object_store
from raymoe.storage.outputs.fsspec import StreamOutput
from raymoe.storage.outputs.local import LocalOutput
from raymoe.storage.outputs.open_output import open_output
from raymoe.storage.outputs.output_checks import input_conflict
from raymoe.storage.outputs.protocol import Output
from raymoe.storage.outputs.s3 import S3Output

OPTIONS = StorageOptions(deadline_s=5)


class Uploads(FsspecStore):
    """Uploads in parts by id: whether they are open."""

    def __init__(self) -> None:
        super().__init__("memory", OPTIONS)
        self.uploads: dict[str, bool] = {}
        self.urls: dict[str, str] = {}

    def create_upload(self, url: str, metadata: Any = None) -> str:
        upload_id = f"upload {len(self.uploads)}"
        self.uploads[upload_id], self.urls[upload_id] = True, url
        return upload_id

    def abort_upload(self, url: str, upload_id: str) -> None:
        self.uploads[upload_id] = False

    def list_uploads(self, url: str) -> list[Any]:
        is_below = {each: at == url or at.startswith(f"{url}/") for each, at in self.urls.items()}
        there = [each for each, is_open in self.uploads.items() if is_open and is_below[each]]
        return [SimpleNamespace(url=self.urls[each], upload_id=each) for each in there]

    def list_parts(self, url: str, upload_id: str) -> list[Any]:
        if not self.uploads[upload_id]:
            raise UploadNotFound([Problem(where=url, what="no such upload")])
        return []


@pytest.fixture
def place() -> Iterator[str]:
    url = f"memory://newer-{uuid.uuid4().hex[:8]}/out"
    yield url
    filesystem, path = fsspec.url_to_fs(url)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


@pytest.fixture(params=[StreamOutput, S3Output])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    store = Uploads()
    monkeypatch.setattr(object_store, "open_store", lambda location, storage: store)
    return request.param


def record_of(digest: str) -> bytes:
    return json.dumps({"plan_digest": digest, "files": {INDEX_NAME: {"size": 2, "checksum": "x"}}}).encode()


def nearly_done(output: Any, digest: str) -> None:
    output.begin(digest, {}, fresh=False)
    output.write_index(b"{}")


def names(place: str) -> list[str]:
    filesystem, path = fsspec.url_to_fs(place)
    return sorted(name.removeprefix(path).strip("/") for name in filesystem.find(path))


class Died(BaseException):
    """Nothing catches it."""


def test_a_repeat_of_a_finished_merge_leaves_a_newer_run_alone(place: str, kind: Any) -> None:
    old, newer, repeat = (kind(place, OPTIONS) for _ in range(3))
    nearly_done(old, "plan")
    old.end(record_of("plan"))
    assert repeat.finished_merge().digest == "plan"
    newer.begin("other", {}, fresh=True)
    repeat.clean_up()
    newer.write_small("config.json", b"{}")


def test_a_newer_run_begins_while_the_old_journal_is_removed(place: str, kind: Any, monkeypatch: Any) -> None:
    """The claim that was looked at first is compared again before `plan.json` is removed."""
    old, newer, repeat = (kind(place, OPTIONS) for _ in range(3))
    nearly_done(old, "plan")
    monkeypatch.setattr(type(old.journal), "clear", lambda *_: None)
    old.end(record_of("plan"))
    monkeypatch.undo()
    real = repeat.journal._delete

    def begins(there: Any) -> None:
        real(there)
        if not newer.run:
            newer.begin("other", {}, fresh=True)

    repeat.journal._delete = begins
    with pytest.raises(MergeFailed, match="taken over"):
        repeat.clean_up()
    assert newer.is_reachable()


def test_the_marker_outlives_an_older_run_that_ends(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older run ends between the newer run's marker and its claim; the newer one is killed before it removes."""
    old, newer = StreamOutput(place, OPTIONS), StreamOutput(place, OPTIONS)
    nearly_done(old, "plan")
    real = newer.journal._write_claim

    def ends(claim: Any, **named: Any) -> None:
        old.end(record_of("plan"))
        real(claim, **named)

    def die(*_: Any) -> None:
        raise Died

    monkeypatch.setattr(newer.journal, "_write_claim", ends)
    with monkeypatch.context() as patch:
        patch.setattr(OutputFiles, "remove_checkpoint", die)
        with pytest.raises(Died):
            newer.begin("plan", {}, fresh=True)
    again = StreamOutput(place, OPTIONS)
    assert again.finished_merge() is None
    again.begin("plan", {}, fresh=False)
    assert names(place) == [".raymoe/plan.json"]


def test_an_upload_that_two_runs_have_noted_is_taken_up(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older raymoe notes an upload again when it takes it up, and may be killed before it removes the first note."""
    store = Uploads()
    monkeypatch.setattr(object_store, "open_store", lambda location, storage: store)

    def begun() -> S3Output:
        output = S3Output(place, OPTIONS)
        output.begin("plan", {}, fresh=False)
        return output

    first = begun()._open_upload("m.safetensors", goes_on=True)
    begun().journal.record_upload("m.safetensors", first[0])
    third = begun()
    assert third._open_upload("m.safetensors", goes_on=True) == (first[0], [])
    assert store.uploads == {first[0]: True}


def test_a_run_that_is_taken_over_while_it_begins_removes_no_part(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newer run claims the output between the older one's claim and its look at what earlier runs have left."""
    older, newer = StreamOutput(place, OPTIONS), StreamOutput(place, OPTIONS)
    store, real = older._store, older._store.list
    parts = list[str]()

    def begins(url: str, **named: Any) -> Any:
        if older.is_reachable() and not parts:
            newer.begin("other", {}, fresh=True)
            parts.append(newer.journal.new_part("m.safetensors"))
            store.put(parts[0], b"part")
        return real(url, **named)

    monkeypatch.setattr(older._store, "list", begins)
    with pytest.raises(MergeFailed, match="taken over"):
        older.begin("plan", {}, fresh=True)
    assert store.read_all(parts[0]) == b"part"
    assert newer.is_reachable()


def test_an_upload_of_a_newer_run_is_not_taken_for_an_older_ones(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run died between its intention and the upload's id. The run after it is taken over while it looks for it."""
    store = Uploads()
    monkeypatch.setattr(object_store, "open_store", lambda location, storage: store)
    dead, older, newer = (S3Output(place, OPTIONS) for _ in range(3))
    dead.begin("plan", {}, fresh=False)
    dead.journal.announce_upload("m.safetensors", known=[])
    real = store.list_uploads

    def begins(url: str) -> Any:
        monkeypatch.setattr(store, "list_uploads", real)
        newer.begin("other", {}, fresh=True)
        newer._open_upload("m.safetensors", goes_on=False)
        return real(url)

    monkeypatch.setattr(store, "list_uploads", begins)
    with pytest.raises(MergeFailed, match="taken over"):
        older.begin("third", {}, fresh=True)
    assert [*store.uploads.values()][-1]


@pytest.mark.parametrize("is_folder", [False, True])
def test_files_of_a_foreign_record_are_sources(place: str, tmp_path: Path, is_folder: bool) -> None:
    """--overwrite removes what the record names, in subfolders too."""
    out = str(tmp_path / "out") if is_folder else place
    filesystem, path = fsspec.url_to_fs(out)
    filesystem.makedirs(path, exist_ok=True)
    record = {"files": {"experts/x/model.safetensors": {"size": 1}, "base.yaml": {"size": 1}}}
    filesystem.pipe_file(f"{path}/{RECORD_NAME}", json.dumps(record).encode())
    output: Output = open_output(Location.parse(out), OPTIONS)
    assert input_conflict(output, Inputs(folders=(("expert 0", f"{out}/experts/x"),))) is not None
    assert input_conflict(output, Inputs(files=(("the config", f"{out}/base.yaml"),))) is not None
    assert input_conflict(output, Inputs(folders=(("expert 0", f"{out}/experts/y"),))) is None


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_record_that_names_a_folder_and_the_journal(place: str, tmp_path: Path, is_folder: bool) -> None:
    """--overwrite removes neither, and the run goes on."""
    out = str(tmp_path / "out") if is_folder else place
    filesystem, path = fsspec.url_to_fs(out)
    filesystem.makedirs(f"{path}/sub", exist_ok=True)
    record = {"files": {"sub": {"size": 1}, ".raymoe/plan.json": {"size": 1}, "old.txt": {"size": 1}}}
    filesystem.pipe_file(f"{path}/{RECORD_NAME}", json.dumps(record).encode())
    filesystem.pipe_file(f"{path}/old.txt", b"x")
    filesystem.pipe_file(f"{path}/sub/mine.txt", b"x")
    output: Output = open_output(Location.parse(out), OPTIONS)
    output.lock()
    output.begin("plan", {}, fresh=True)
    assert output.is_reachable()
    assert filesystem.exists(f"{path}/sub/mine.txt") and not filesystem.exists(f"{path}/old.txt")
    output.release()


@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("is_recorded", [False, True])
def test_overwrite_removes_a_result_of_raymoe_alone(
    place: str, tmp_path: Path, is_folder: bool, is_recorded: bool
) -> None:
    """A user's own `result.json` stays, whatever the record says."""
    out = str(tmp_path / "out") if is_folder else place
    filesystem, path = fsspec.url_to_fs(out)
    filesystem.makedirs(path, exist_ok=True)
    result = b'{"exit_reason": "done", "raymoe_version": "1"}'
    for content, stays in ((b"mine", True), (result, False)):
        filesystem.pipe_file(f"{path}/result.json", content)
        files = {"result.json": {"size": 1}} if is_recorded else {}
        filesystem.pipe_file(f"{path}/{RECORD_NAME}", json.dumps({"files": files}).encode())
        output: Output = open_output(Location.parse(out), OPTIONS)
        output.lock()
        output.begin("plan", {}, fresh=True)
        output.release()
        assert filesystem.exists(f"{path}/result.json") == stays
        assert not filesystem.exists(f"{path}/{RECORD_NAME}")


def test_clean_up_gives_the_lock_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = LocalOutput(tmp_path)
    output.lock()
    nearly_done(output, "plan")
    output.write(RECORD_NAME, [record_of("plan")])
    output.release()

    def fails() -> None:
        raise OSError("full")

    monkeypatch.setattr(output.journal, "end", fails)
    with pytest.raises(MergeFailed, match="its journal could not be removed"):
        output.clean_up()
    assert not LocalOutput(tmp_path).journal.is_taken
