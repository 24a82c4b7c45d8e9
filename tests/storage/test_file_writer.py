"""New files: the bytes and their checksum, whatever the filesystem can and can't do."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash

from raymoe.storage import file_writer, linux_io
from raymoe.storage.file_writer import FileWriter
from raymoe.storage.linux_io import allocate, clone_range, start_writeback, wait_for_writeback

CONTENT = np.random.default_rng(5).bytes(6 << 20)
CHECKSUM = f"xxh3-128:{xxhash.xxh3_128(CONTENT).hexdigest()}"
# A folder on a filesystem with shared extents (XFS, Btrfs), where the one of temporary files has none.
SHARING_FOLDER = os.environ.get("RAYMOE_TEST_SHARING")


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder of the disk, and one of a RAM disk: their filesystems are never one."""
    if request.param == "disk":
        yield tmp_path
        return
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no RAM disk here")
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "source").write_bytes(CONTENT)
    descriptor = os.open(tmp_path / "source", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def write(path: Path, size: int | None, source: int | None = None, offset: int = 0) -> str:
    """CONTENT in pieces; with `source`, from `offset` on shared with it where possible."""
    with FileWriter(path, size) as file:
        if source is not None:
            file.share([(source, offset, len(CONTENT), offset)])
        for start in range(0, len(CONTENT), 100_000):
            file.append(CONTENT[start : start + 100_000])
        assert file.size == len(CONTENT)
        return file.finish()


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_content_and_checksum(folder: Path, size: int | None) -> None:
    assert write(folder / "file", size) == CHECKSUM
    assert (folder / "file").read_bytes() == CONTENT


def test_writeback_begins_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole windows as the file grows; bytes that were handed over are not handed over again."""
    windows = []

    def watched(descriptor: int, start: int, size: int) -> bool:
        windows.append((start, size))
        return start_writeback(descriptor, start, size)

    monkeypatch.setattr(file_writer, "start_writeback", watched)
    monkeypatch.setattr(file_writer, "_WRITEBACK_BYTES", 1 << 20)
    assert write(tmp_path / "file", len(CONTENT)) == CHECKSUM
    assert [start for start, _ in windows] == [1_100_000 * n for n in range(len(windows))]
    assert len(windows) == len(CONTENT) // 1_100_000
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_waiting_for_the_disk_is_seen_to_move(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One move per window, all before the one fsync, which stays."""
    events: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        events.append("fsync")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(file_writer, "_WRITEBACK_BYTES", 1 << 20)
    with FileWriter(folder / "file") as file:
        file.append(CONTENT[:-1])
        file.finish(lambda: events.append("moved"))
    assert events == ["moved"] * (6 if sys.platform == "linux" else 0) + ["fsync"]
    with FileWriter(folder / "empty") as file:
        file.finish(lambda: events.append("moved"))
    assert events[-2:] == ["fsync", "fsync"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EPERM])
def test_what_the_disk_refuses_while_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Linux tells a failed write once: what the wait is told, the fsync after it would not be."""
    _refuse_to_wait(monkeypatch, code)
    with FileWriter(tmp_path / "file") as file:
        file.append(CONTENT)
        with pytest.raises(OSError, match=os.strerror(code)):
            file.finish(lambda: None)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL])
def test_waiting_that_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    _refuse_to_wait(monkeypatch, code)
    with FileWriter(tmp_path / "file") as file:
        file.append(CONTENT)
        assert file.finish(lambda: None) == CHECKSUM


def _refuse_to_wait(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Writeback is begun as always; waiting for it fails."""

    def call(descriptor: int, start: object, size: object, flags: ctypes.c_uint) -> int:
        if flags.value == 2:
            return 0
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(linux_io, "_libc", SimpleNamespace(sync_file_range=call))


def test_room_is_set_aside(folder: Path) -> None:
    with FileWriter(folder / "file", 1 << 20):
        status = os.stat(folder / "file")
        assert status.st_size == 1 << 20
        assert status.st_blocks * 512 >= 1 << 20


_LIMITED = """
import resource, sys
from pathlib import Path
from raymoe.storage.file_writer import FileWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    FileWriter(Path(sys.argv[1]), 200_000)
except OSError as error:
    print(error.errno)
"""


@pytest.mark.processes
def test_no_room(tmp_path: Path) -> None:
    """A limit on the size of files is found before a byte is written."""
    run = [sys.executable, "-c", _LIMITED, str(tmp_path / "file")]
    done = subprocess.run(run, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == str(errno.EFBIG)
    assert (tmp_path / "file").stat().st_size == 0


def test_room_that_can_not_be_set_aside() -> None:
    """A pipe is no file: nothing is set aside, written back or shared there, and nothing fails."""
    reading, writing = os.pipe()
    try:
        assert not allocate(writing, 4096)
        assert not start_writeback(writing, 0, 4096)
        assert not wait_for_writeback(writing, 0, 4096)
        assert not clone_range(reading, 0, 4096, writing, 0)
    finally:
        os.close(reading)
        os.close(writing)


def test_system_without_the_calls(tmp_path: Path, source: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux_io, "_libc", None)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert write(tmp_path / "file", len(CONTENT), source) == CHECKSUM
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_sharing_that_is_refused(folder: Path, source: int) -> None:
    """Between two filesystems, or on one without shared extents, bytes are written as if nobody had asked."""
    assert write(folder / "file", len(CONTENT), source) == CHECKSUM
    assert (folder / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("offset", [0, 4096, 5000])
def test_shared_bytes_are_not_written_again(
    tmp_path: Path, source: int, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole blocks of the range are shared; what is before and behind them is written."""
    shared, written = [], []
    pwrite = os.pwrite

    def clone(descriptor: int, start: int, size: int, target: int, at: int) -> bool:
        """What a filesystem with shared extents does, by copying."""
        assert start % 4096 == size % 4096 == at % 4096 == 0
        pwrite(target, os.pread(descriptor, size, start), at)
        shared.append((at, at + size))
        return True

    def watched(descriptor: int, chunk: memoryview, at: int) -> int:
        written.append((at, at + len(chunk)))
        return pwrite(descriptor, chunk, at)

    monkeypatch.setattr(file_writer, "clone_range", clone)
    monkeypatch.setattr(os, "pwrite", watched)
    assert write(tmp_path / "file", len(CONTENT), source, offset) == CHECKSUM
    assert (tmp_path / "file").read_bytes() == CONTENT
    ((first, last),) = shared
    assert first == -(-offset // 4096) * 4096
    assert last == len(CONTENT) // 4096 * 4096
    assert sum(end - start for start, end in written) <= first + (len(CONTENT) - last) + 2 * 100_000


@pytest.mark.parametrize(("start", "end", "offset"), [(0, 6 << 20, 1), (10, 6 << 20, 4096), (0, 4096, 0)])
def test_ranges_that_are_not_worth_it(
    tmp_path: Path, source: int, monkeypatch: pytest.MonkeyPatch, start: int, end: int, offset: int
) -> None:
    """Blocks that do not lie on blocks, and short ranges: the filesystem is not asked."""
    monkeypatch.setattr(file_writer, "clone_range", None)
    with FileWriter(tmp_path / "file") as file:
        file.share([(source, start, end, offset)])


@pytest.mark.skipif(not SHARING_FOLDER, reason="RAYMOE_TEST_SHARING names no folder with shared extents")
def test_extents_are_shared() -> None:
    """The disk keeps one copy of what two files have in common."""
    assert SHARING_FOLDER is not None
    source, target = Path(SHARING_FOLDER) / "source", Path(SHARING_FOLDER) / "target"
    content = CONTENT * 20
    source.write_bytes(content)
    os.sync()
    free = os.statvfs(SHARING_FOLDER).f_bfree
    descriptor = os.open(source, os.O_RDONLY)
    with FileWriter(target, len(content)) as file:
        file.share([(descriptor, 0, len(content), 0)])
        for start in range(0, len(content), 1 << 20):
            file.append(content[start : start + (1 << 20)])
        file.finish()
    os.close(descriptor)
    taken = (free - os.statvfs(SHARING_FOLDER).f_bfree) * os.statvfs(SHARING_FOLDER).f_frsize
    assert target.read_bytes() == content
    target.unlink()
    source.unlink()
    assert taken < len(content) // 4
