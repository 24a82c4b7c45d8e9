"""The file: whether it can be written, and how it comes to its place only when it is whole.

It is written as `NAME.part` beside its place, synced, and moved there in one step. A file that is there by then is
replaced only if that was asked for. The part is there, and locked, from the beginning of a run: another run for the
same file is refused before it computes anything. A part that was left by a run that died is written anew.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raymoe.errors import Problem, ProblemReport
from raymoe.objects.urls import is_url
from raymoe.storage.linux import allocate, start_writeback

__all__ = ["PartFile", "new_file", "output_without_room"]

_WRITEBACK_BYTES = 64 << 20


def _place_problems(output: str | Path, path: Path) -> list[Problem]:
    """What can be said against the place itself."""
    if is_url(str(output)):
        remedy = "write it to a local file, and copy that"
        return [Problem(where=str(output), what="a GGUF file is written to a local path", remedy=remedy)]
    if path.is_dir():
        return [Problem(where=str(path), what="this is a folder", remedy=f"name a file, such as {path / 'model.gguf'}")]
    if path.suffix.lower() != ".gguf":
        remedy = f"call it {path.name}.gguf"
        return [Problem(where=str(path), what="the name does not end in .gguf, as all readers expect", remedy=remedy)]
    if not path.parent.is_dir():
        return [Problem(where=str(path), what="there is no such folder", remedy="make it first")]
    return []


def output_without_room(path: Path, size: int) -> list[Problem]:
    """Less free than `size` bytes. What a file holds that is replaced counts as used: both are there for a moment."""
    free = shutil.disk_usage(path.parent).free
    if free >= size:
        return []
    what = f"not enough disk: {size:,} bytes are to be written, {free:,} are free"
    return [Problem(where=str(path), what=what, remedy="make room, or choose a smaller --type or another folder")]


class PartFile:
    """The file under its name of the meantime, open and locked. `commit` brings it to its place."""

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        self.path, self.part = path, path.with_name(path.name + ".part")
        self._overwrite, self._is_committed = overwrite, False
        self._descriptor = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if not self._locked():
            os.close(self._descriptor)
            remedy = "wait for it, or choose another name"
            raise ProblemReport([Problem(where=str(path), what="another run is writing this file", remedy=remedy)])
        os.ftruncate(self._descriptor, 0)
        self.size = self._written_back = 0

    def _locked(self) -> bool:
        """Whether the lock is ours, on the file that has the name: another run may have moved it to its place since."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # a filesystem without locks
        return self.part.exists() and os.path.samestat(os.fstat(self._descriptor), self.part.stat())

    def continue_after_header(self, size: int) -> None:
        """Go on behind what has been written under the name `part`; the file will have `size` more bytes."""
        self.size = os.fstat(self._descriptor).st_size
        allocate(self._descriptor, self.size + size)

    def append(self, chunk: memoryview | bytes) -> None:
        left = memoryview(chunk)
        while left:
            count = os.pwrite(self._descriptor, left, self.size)
            left, self.size = left[count:], self.size + count
        if self.size - self._written_back >= _WRITEBACK_BYTES:
            start_writeback(self._descriptor, self._written_back, self.size - self._written_back)
            self._written_back = self.size

    def commit(self) -> None:
        os.ftruncate(self._descriptor, self.size)
        os.fsync(self._descriptor)
        if self._overwrite:
            os.replace(self.part, self.path)
        else:
            self._move_to_free_place()
        self._is_committed = True
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _move_to_free_place(self) -> None:
        """A second name is only given where there is no file of that name, which moving does not ask for."""
        try:
            os.link(self.part, self.path)
        except FileExistsError:
            raise ProblemReport([_there_already(self.path)]) from None
        except OSError:  # a filesystem where a file has one name
            self.refuse_replacing()
            os.replace(self.part, self.path)
        else:
            self.part.unlink()

    def refuse_replacing(self) -> None:
        if not self._overwrite and os.path.lexists(self.path):
            raise ProblemReport([_there_already(self.path)])

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raises ProblemReport for what the filesystem refuses within."""
        try:
            yield
        except OSError as error:
            raise ProblemReport([_not_written(self.path, error)]) from error

    def close(self) -> None:
        if not self._is_committed:
            self.part.unlink(missing_ok=True)
        os.close(self._descriptor)


@contextmanager
def new_file(output: str | Path, *, overwrite: bool = False) -> Iterator[PartFile]:
    """A file that is gone again unless it was committed. Raises ProblemReport where it can't be, or one is there."""
    path = Path(output).expanduser().absolute()
    if problems := _place_problems(output, path):
        raise ProblemReport(problems)
    try:
        file = PartFile(path, overwrite=overwrite)
    except OSError as error:
        raise ProblemReport([_not_written(path, error)]) from None
    try:
        file.refuse_replacing()
        yield file
    finally:
        file.close()


def _there_already(path: Path) -> Problem:
    return Problem(where=str(path), what="this file is there already", remedy="--overwrite replaces it")


def _not_written(path: Path, error: OSError) -> Problem:
    what = f"it can't be written: {error.strerror or error}"
    return Problem(where=str(path), what=what, remedy="name a file in a folder that you may write to, with space left")
