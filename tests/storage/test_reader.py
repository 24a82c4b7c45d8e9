"""Source files of a process: opened once, shared by threads, closed for good."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

from raymoe.errors import CheckpointError
from raymoe.sources.resolve import HubOptions
from raymoe.sources.types import SourceFile, TensorEntry
from raymoe.storage.reader import SourceReader
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
        assert open_here(path) == 2  # a mapping holds a descriptor of its own
        del views
    assert open_here(path) == 0
    reader.close()  # again: no harm


def test_a_view_outlives_the_reader(entry: TensorEntry) -> None:
    """A tensor made of mapped bytes may be in use when its reader is closed."""
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
