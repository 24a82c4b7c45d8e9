"""Source files of a process: opened once, shared by threads, closed for good."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from raymoe.errors import CheckpointError
from raymoe.sources.facts import SourceFile, TensorEntry
from raymoe.sources.hub import HubOptions
from raymoe.sources.local_folder import stat_file
from raymoe.storage import source_reader as reader_module
from raymoe.storage.open_files import OpenFiles
from raymoe.storage.source_reader import SourceReader
from tests.storage.plans import save


@pytest.fixture
def entry(tmp_path: Path) -> TensorEntry:
    return save(tmp_path, {"w": np.arange(1 << 16, dtype=np.float32)})["w"]


def open_here(path: Path) -> int:
    return sum(file.path == str(path) for file in psutil.Process().open_files())


def test_opened_once_and_closed(entry: TensorEntry, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with SourceReader(HubOptions()) as reader:
        assert open_here(path) == 0, "a file is opened when it is read"
        for _ in range(3):
            reader.read_into(entry.file, entry.start, memoryview(bytearray(16)))
        assert open_here(path) == 1
        views = [reader.view(entry) for _ in range(3)]
        assert open_here(path) == 1
        assert all(view == views[0] for view in views)
    assert open_here(path) == 0
    reader.close()  # again: no harm


def test_a_view_outlives_the_reader(entry: TensorEntry) -> None:
    """A tensor made of these bytes may be in use when its reader is closed."""
    with SourceReader(HubOptions()) as reader:
        view = reader.view(entry)
        reader.release()
    assert np.array_equal(np.frombuffer(view, np.float32), np.arange(1 << 16, dtype=np.float32))


def test_writing_to_a_view_leaves_the_file(entry: TensorEntry, tmp_path: Path) -> None:
    before = (tmp_path / "model.safetensors").read_bytes()
    with SourceReader(HubOptions()) as reader:
        reader.view(entry)[:4] = b"\xff\xff\xff\xff"
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_threads(entry: TensorEntry) -> None:
    """Ranges read side by side do not get mixed up."""
    wrong: list[int] = []
    with SourceReader(HubOptions()) as reader:

        def read(number: int) -> None:
            buffer = bytearray(4096)
            for start in range(number * 4096, entry.nbytes - 4096, 8 * 4096):
                reader.read_into(entry.file, entry.start + start, memoryview(buffer))
                expected = np.arange(start // 4, start // 4 + 1024, dtype=np.float32)
                if not np.array_equal(np.frombuffer(buffer, np.float32), expected):
                    wrong.append(start)

        threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_short_read_says_where_it_ends(entry: TensorEntry) -> None:
    with (
        SourceReader(HubOptions()) as reader,
        pytest.raises(CheckpointError, match=f"ends at byte {entry.end}, expected at least {entry.end + 10}"),
    ):
        reader.read_into(entry.file, entry.end - 10, memoryview(bytearray(20)))


def test_file_that_is_gone(tmp_path: Path) -> None:
    with SourceReader(HubOptions()) as reader, pytest.raises(CheckpointError, match="is not there on this node"):
        reader.path(SourceFile(location=str(tmp_path / "none.safetensors"), size=3))


def test_a_read_that_fails(entry: TensorEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk's error is a problem of the source, by name, and not of the output that it is read for."""

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with SourceReader(HubOptions()) as reader:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(CheckpointError, match=r"model.safetensors: can't be read: Input/output error"):
            reader.read_into(entry.file, entry.start, memoryview(bytearray(4)))


def test_empty_tensor(tmp_path: Path) -> None:
    entry = save(tmp_path, {"w": np.zeros((0, 4), np.float32)})["w"]
    with SourceReader(HubOptions()) as reader:
        assert len(reader.view(entry)) == 0


def stamped(entry: TensorEntry) -> TensorEntry:
    """The tensor with its file as planning finds it."""
    found = stat_file(entry.file.location)
    assert found is not None
    return replace(entry, file=found)


def test_a_file_that_was_replaced_after_planning(entry: TensorEntry, tmp_path: Path) -> None:
    """Of the same size, with the old file's time: its inode tells."""
    entry, path = stamped(entry), tmp_path / "model.safetensors"
    status = path.stat()
    (tmp_path / "new").write_bytes(path.read_bytes()[::-1])
    os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(tmp_path / "new", path)
    with SourceReader(HubOptions()) as reader, pytest.raises(CheckpointError, match="has been written again since"):
        reader.read_into(entry.file, entry.start, memoryview(bytearray(4)))


@pytest.mark.parametrize("is_stamped", [True, False])  # of another node's file only the first opening is known
def test_a_file_that_is_written_while_it_is_read(entry: TensorEntry, tmp_path: Path, is_stamped: bool) -> None:
    """What was read by then may be half old and half new: found at the end at the latest."""
    file, reader = stamped(entry).file if is_stamped else entry.file, SourceReader(HubOptions())
    reader.read_into(file, entry.start, memoryview(bytearray(4)))
    reader.check_unchanged()
    with open(tmp_path / "model.safetensors", "r+b") as writer:
        writer.seek(entry.start)
        writer.write(b"new!")
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"model.safetensors: the file was written while it was read"):
        reader.__exit__(None)
    assert open_here(tmp_path / "model.safetensors") == 0


def test_a_copy_of_another_node_has_a_time_of_its_own(entry: TensorEntry, tmp_path: Path) -> None:
    """A stamp is compared where it was taken: elsewhere the same model may lie in a copy."""
    file = stamped(entry).file
    assert file.stamp is not None
    copied = replace(file, stamp=replace(file.stamp, view="another machine", inode=1, mtime_ns=1))
    with SourceReader(HubOptions()) as reader:
        reader.read_into(copied, entry.start, memoryview(bytearray(4)))


def test_a_file_that_is_cut_short_after_it_was_viewed(entry: TensorEntry, tmp_path: Path) -> None:
    """As `open(path, "wb")` does. A mapping would end the process with SIGBUS."""
    reader = SourceReader(HubOptions())
    view = reader.view(entry)
    os.truncate(tmp_path / "model.safetensors", 0)
    assert np.array_equal(np.frombuffer(view, np.float32), np.arange(1 << 16, dtype=np.float32))
    with pytest.raises(CheckpointError, match="was written while it was read"):
        reader.check_unchanged()
    reader.close()


@pytest.fixture
def many(tmp_path: Path) -> list[SourceFile]:
    """Twenty files, each full of its own number."""
    files = []
    for number in range(20):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * 64)
        found = stat_file(str(tmp_path / f"{number}"))
        assert found is not None
        files.append(found)
    return files


def test_few_files_are_open_at_once(many: list[SourceFile]) -> None:
    """The one that was used longest ago is closed for the next; one in use is not."""
    opened: list[str] = []

    def opener(file: SourceFile) -> int:
        opened.append(os.path.basename(file.location))
        return os.open(file.location, os.O_RDONLY)

    files = OpenFiles(opener, max_open=3)
    with files.use(many[0]) as first:
        for file in [*many[1:], *many[1:3]]:
            with files.use(file) as descriptor:
                assert os.pread(descriptor, 1, 0)[0] == int(os.path.basename(file.location))
            assert sum(map(open_here, (Path(f.location) for f in many))) <= 3
        assert os.pread(first, 1, 0) == b"\0"
    assert opened == [str(number) for number in (*range(20), 1, 2)]
    files.close()
    assert sum(map(open_here, (Path(f.location) for f in many))) == 0


def test_threads_that_share_few_descriptors(many: list[SourceFile]) -> None:
    """A descriptor is never closed, and its number given to another file, while a thread reads from it."""
    files, wrong = OpenFiles(lambda file: os.open(file.location, os.O_RDONLY), max_open=2), []

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 20, 400):
            with files.use(many[number]) as descriptor:
                if os.pread(descriptor, 64, 0) != bytes([number]) * 64:
                    wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files.close()
    assert not wrong


def test_a_use_that_outlives_the_reader(many: list[SourceFile]) -> None:
    """Blocks that threads have begun are finished after a failed shard has closed its reader."""
    files = OpenFiles(lambda file: os.open(file.location, os.O_RDONLY))
    with files.use(many[3]) as descriptor:
        files.close()
        assert os.pread(descriptor, 1, 0) == b"\3"
    assert open_here(Path(many[3].location)) == 0


@pytest.mark.processes
def test_too_many_open_files(many: list[SourceFile]) -> None:
    """The message names the limit and what raises it, not the file's permissions."""
    script = """
import os, resource, sys
from raymoe.errors import CheckpointError
from raymoe.sources.local_folder import open_file, stat_file
file = stat_file(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
held = []
try:
    while True:
        held.append(open_file(file))
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script, many[0].location], capture_output=True, text=True, check=True)
    assert "this process has as many files open as it may (16)\n    -> allow more" in done.stdout


def test_a_large_tensor_is_seen_to_move(entry: TensorEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read by several calls, each of which counts."""
    monkeypatch.setattr(reader_module, "_MAX_READ_BYTES", entry.nbytes // 4)
    moves: list[int] = []
    with SourceReader(HubOptions(), heartbeat=lambda: moves.append(1)) as reader:
        view = reader.view(entry)
    assert np.array_equal(np.frombuffer(view, np.float32), np.arange(1 << 16, dtype=np.float32))
    assert len(moves) == 4


def test_a_download_moves_while_its_file_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tick at the start; after that none while nothing grows: a hung download, or a lock that is never released."""
    monkeypatch.setattr(reader_module, "_DOWNLOAD_POLL_S", 0.005)
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    part = blobs / "0a1b.incomplete"
    part.write_bytes(b"of an earlier download")
    moved = threading.Semaphore(0)

    def fetch(*_: object) -> Path:
        assert moved.acquire(blocking=False)
        time.sleep(0.05)
        assert not moved.acquire(blocking=False), "nothing has grown"
        for _ in range(3):
            with part.open("ab") as stream:
                stream.write(bytes(10_000))
            assert moved.acquire(timeout=60)
        part.rename(blobs / "0a1b")
        time.sleep(0.05)
        assert not moved.acquire(blocking=False), "nothing has grown"
        return blobs / "0a1b"

    monkeypatch.setattr(reader_module, "fetch_file", fetch)
    file = SourceFile(location=f"hf://org/name@{'0' * 40}/model.safetensors", size=30_022)
    with SourceReader(HubOptions(cache_dir=str(tmp_path)), heartbeat=moved.release) as reader:
        assert reader.path(file) == blobs / "0a1b"
