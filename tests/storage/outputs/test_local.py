"""A folder as output: files whole or not at all, what may be written where, and what --overwrite removes."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from raymoe.errors import CheckpointError, MergeFailed, Problem
from raymoe.object_store.location import Location
from raymoe.object_store.options import StorageOptions
from raymoe.storage.output_files import FolderFiles
from raymoe.storage.outputs.local import LocalOutput, file_checksum
from raymoe.storage.outputs.open_output import open_output
from raymoe.storage.source_reader import LOCAL_CHUNK_BYTES

INDEX = "model.safetensors.index.json"


@pytest.fixture
def output(tmp_path: Path) -> Iterator[LocalOutput]:
    made = LocalOutput(tmp_path / "out")
    made.root.mkdir()
    made.journal.lock()
    made.journal.begin("plan", {})
    yield made
    made.journal.release()


def visible(output: LocalOutput) -> list[str]:
    return sorted(os.listdir(output.root))


def test_write(output: LocalOutput) -> None:
    record = output.write("a.bin", [b"one ", memoryview(b"two ")[:4], b"", b"three"], expected=13)
    assert (output.root / "a.bin").read_bytes() == b"one two three"
    assert (record.name, record.size) == ("a.bin", 13)
    assert record.checksum == f"xxh3-128:{xxhash.xxh3_128(b'one two three').hexdigest()}"
    assert record.checksum == file_checksum(output.root / "a.bin")
    assert output.finished("a.bin", 13) == record


def test_a_name_is_given_to_what_is_on_the_disk(output: LocalOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order that a crash of the machine can't turn round: file, its name, its note, the note's name."""
    file, note = output.root / "a.bin", output.root / ".raymoe/done/a.bin.json"
    real, synced = os.fsync, dict[int, tuple[bool, bool]]()

    def fsync(descriptor: int) -> None:
        synced[os.fstat(descriptor).st_ino] = file.exists(), note.exists()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    output.write("a.bin", [b"bytes"])
    order = [synced.get(path.stat().st_ino) for path in (file, file.parent, note, note.parent)]
    assert order == [(False, False), (True, False), (True, False), (True, True)]


def test_the_check_of_a_finished_file_reports_moves(output: LocalOutput) -> None:
    """Each chunk counts, so that a large shard on a slow disk is not taken for a process that stands still."""
    record = output.write("a.bin", [bytes(3 * LOCAL_CHUNK_BYTES - 1)])
    moves: list[tuple[int, int]] = []
    assert output.finished("a.bin", record.size, lambda *moved: moves.append(moved)) == record
    assert moves == [(0, 0)] * 3


def test_write_over_an_older_file(output: LocalOutput) -> None:
    (output.root / "a.bin").write_bytes(b"old and longer")
    output.write("a.bin", [b"new"])
    assert (output.root / "a.bin").read_bytes() == b"new"


def test_write_in_a_subfolder(output: LocalOutput) -> None:
    output.write("chat_templates/tool.jinja", [b"text"])
    assert (output.root / "chat_templates/tool.jinja").read_bytes() == b"text"
    assert output.finished("chat_templates/tool.jinja", 4) is not None


@pytest.mark.parametrize("error", [CheckpointError([Problem(where="source", what="gone")]), KeyboardInterrupt()])
def test_source_that_fails_half_way(output: LocalOutput, error: BaseException) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise error

    with pytest.raises(type(error)):
        output.write("a.bin", chunks())
    assert visible(output) == [".raymoe"]
    assert not list((output.root / ".raymoe/parts").rglob("a.bin*"))
    assert output.finished("a.bin", 4) is None


def test_file_of_another_size_than_planned(output: LocalOutput) -> None:
    with pytest.raises(AssertionError, match=r"a.bin: 3 bytes, planned 4"):
        output.write("a.bin", [b"abc"], expected=4)
    assert visible(output) == [".raymoe"]


def test_finished_looks_at_the_file_itself(output: LocalOutput) -> None:
    path, record = output.root / "a.bin", output.write("a.bin", [b"content"])
    assert output.finished("a.bin", 7) == record
    assert output.finished("a.bin", 8) is None, "another plan's file of that name"
    assert output.finished("b.bin", 7) is None
    path.write_bytes(b"cOntent")
    assert output.finished("a.bin", 7) is None
    path.write_bytes(b"conten")
    assert output.finished("a.bin", 7) is None
    path.write_bytes(b"content")
    assert output.finished("a.bin", 7) == record
    (done,) = (output.root / ".raymoe/done").glob("a.bin*")
    done.write_text(done.read_text()[:-5])
    assert output.finished("a.bin", 7) is None


_LIMITED = """
import resource, sys
from pathlib import Path
from raymoe.errors import MergeFailed
from raymoe.storage.outputs.local import LocalOutput

output = LocalOutput(Path(sys.argv[1]))
output.journal.lock()
output.journal.begin("plan", {})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
output.write("small.bin", [bytes(50_000)])
try:
    output.write("large.bin", [bytes(60_000), bytes(60_000)])
except MergeFailed as error:
    print(error)
output.journal.release()
"""


@pytest.mark.processes
def test_write_that_fails_half_way(tmp_path: Path) -> None:
    """A limit on the size of files, which any user can set, stops a write in the middle."""
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, tmp_path], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == f"{tmp_path / 'large.bin'}: could not be written: File too large\n"
    assert sorted(os.listdir(tmp_path)) == [".raymoe", "small.bin"]
    assert not list((tmp_path / ".raymoe").rglob("large.bin*"))
    assert LocalOutput(tmp_path).finished("small.bin", 50_000) is not None


def test_full_disk(output: LocalOutput) -> None:
    """/dev/full is a disk without room for a single byte."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    parts = output.journal.new_part("any").parent
    full = parts / "full"
    full.symlink_to("/dev/full")
    output.journal.new_part = lambda name: full  # type: ignore[method-assign]
    with pytest.raises(MergeFailed, match=r"a.bin: the disk is full \([\d,]+ bytes free\)\. Finished shards are kept"):
        output.write("a.bin", [b"content"])
    assert visible(output) == [".raymoe"]


def test_folder_that_went_away(output: LocalOutput) -> None:
    import shutil

    shutil.rmtree(output.root)
    with pytest.raises(MergeFailed, match="could not be written: No such file or directory"):
        output.write("a.bin", [b"content"])


# --- what may be written where


def problems(root: Path, *, overwrite: bool = False, digest: str | None = "plan", output_bytes: int = 1) -> list[str]:
    found = LocalOutput(root).problems(overwrite=overwrite, digest=digest, output_bytes=output_bytes)
    return [problem.what for problem in found]


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    output = open_output(Location.parse(f"file://{tmp_path}/out"), StorageOptions())
    assert isinstance(output, LocalOutput) and output.root == tmp_path / "out"


def test_new_or_empty_folder(tmp_path: Path) -> None:
    assert problems(tmp_path / "a/b/c") == []
    assert problems(tmp_path) == []
    assert list(tmp_path.iterdir()) == [], "looking has written something"


def test_occupied_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert problems(tmp_path) == ["the output folder is not empty"]
    assert problems(tmp_path, overwrite=True) == []
    (tmp_path / "raymoe.json").touch()
    assert problems(tmp_path) == ["the output folder holds a finished merge"]


def test_room(tmp_path: Path) -> None:
    """Shards that are there need no room; what else is there does not count."""
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    (shortage,) = problems(tmp_path, output_bytes=2 * free)
    assert shortage.startswith("not enough disk: ")
    with open(tmp_path / "model-00001-of-00001.safetensors", "wb") as file:
        file.truncate(min(2 * free, 1 << 43))
    assert problems(tmp_path, output_bytes=min(2 * free, 1 << 43), overwrite=True) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_record_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool) -> None:
    (tmp_path / "raymoe.json").write_text(json.dumps({"plan_digest": "plan", "files": {INDEX: {"size": 1}}}))
    reads: list[str] = []

    def read(files: FolderFiles, name: str) -> bytes:
        reads.append(name)
        return (tmp_path / name).read_bytes()

    monkeypatch.setattr(FolderFiles, "read", read)
    assert bool(problems(tmp_path, overwrite=overwrite)) is not overwrite
    assert reads == ["raymoe.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="no permission stops root")
def test_permissions(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    (found,) = problems(tmp_path / "out")
    assert found == f"no permission to write in {tmp_path}"
    tmp_path.chmod(0o755)


# --- what --overwrite removes


def test_remove_checkpoint(output: LocalOutput) -> None:
    """What a model consists of, and what the record names; nothing else."""
    root = output.root
    model = [
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        INDEX,
        "tokenizer.model",
        "chat_templates/b.jinja",
    ]
    ours = [*model, "recorded.txt", "named/a.txt"]
    theirs = ["notes.txt", "weights.safetensors", "named/b.txt"]
    for name in (*ours, *theirs):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    outside = root.parent / "outside.txt"
    outside.write_text("x")
    named = ["recorded.txt", "named/a.txt", "gone.json", "../outside.txt", str(outside)]
    (root / "raymoe.json").write_text(json.dumps({"files": {name: {"size": 1} for name in named}}))
    FolderFiles(root).remove_checkpoint()
    left = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert left == {*theirs, ".raymoe/lock", ".raymoe/plan.json"}
    assert outside.exists()


@pytest.mark.parametrize("record", [None, "{", "[]", '{"files": 3}', '{"files": [1, null]}'])
def test_remove_checkpoint_of_an_unreadable_record(output: LocalOutput, record: str | None) -> None:
    (output.root / INDEX).write_text("x")
    if record is not None:
        (output.root / "raymoe.json").write_text(record)
    FolderFiles(output.root).remove_checkpoint()
    assert [path for path in visible(output) if path != ".raymoe"] == []


def test_links_are_removed_as_links(output: LocalOutput) -> None:
    """--overwrite touches nothing outside of the folder, wherever links in it lead to."""
    root, elsewhere = output.root, output.root.parent / "elsewhere"
    elsewhere.mkdir()
    for name in ("mine.jinja", "weights.safetensors", "recorded.txt"):
        (elsewhere / name).write_text("mine")
    (root / "chat_templates").symlink_to(elsewhere)
    (root / "model.safetensors").symlink_to(elsewhere / "weights.safetensors")
    (root / "tokenizer.json").symlink_to(root / "nowhere")
    (root / "named").symlink_to(elsewhere)
    record = {"files": {"named/recorded.txt": {"size": 4}, "chat_templates/mine.jinja": {"size": 4}}}
    (root / "raymoe.json").write_text(json.dumps(record))
    FolderFiles(root).remove_checkpoint()
    assert visible(output) == [".raymoe", "named"]
    assert sorted(os.listdir(elsewhere)) == ["mine.jinja", "recorded.txt", "weights.safetensors"]


def test_nothing_is_written_through_a_link(output: LocalOutput) -> None:
    elsewhere = output.root.parent / "elsewhere"
    elsewhere.mkdir()
    (output.root / "chat_templates").symlink_to(elsewhere)
    with pytest.raises(MergeFailed, match=r"chat_templates: this is a link\. Remove it"):
        output.write("chat_templates/a.jinja", [b"text"])
    assert os.listdir(elsewhere) == []


def test_full_disk_at_making_a_folder(output: LocalOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(MergeFailed, match=r"chat_templates/a.jinja: the disk is full \([\d,]+ bytes free\)"):
        output.write("chat_templates/a.jinja", [b"text"])


def test_limits_are_as_they_were() -> None:
    """The tests above lower limits in processes of their own only."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
