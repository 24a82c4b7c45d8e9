"""The file: whether it can be written, and how it comes to its place only when it is whole.

It is written as `NAME.raymoe-part` beside its place, synced, and moved there in one step. A file that is there by then
is replaced only if that was asked for. The part is there, and locked, from the beginning of a run: another run for the
same file is refused before it computes anything. A part that was left by a run that died is written anew. Anything
else of that name (a link, a folder, a file that is no beginning of a GGUF file) is not raymoe's: the run is refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raymoe.errors import Problem, ProblemReport
from raymoe.object_store.location import Location
from raymoe.storage.atomic_file import has_name, sync_folder, try_lock
from raymoe.storage.file_writer import write_all
from raymoe.storage.linux_io import allocate, start_writeback
from raymoe.storage.locations import is_in_job_package

_WRITEBACK_BYTES = 64 << 20
_PART = ".raymoe-part"  # browsers and download tools use '.part'
_MAGIC = b"GGUF"


def output_path(output: str | Path) -> Path:
    """The absolute path of the file, as a user names it. Raises ProblemReport for what is no local path."""
    try:
        location = Location.parse(output)
    except ValueError as error:
        raise ProblemReport([Problem(where=str(output), what=str(error), remedy="name a local file")]) from None
    if not location.kind.is_local:
        what, remedy = "a GGUF file is written to a local path", "write it to a local file, and copy that"
        raise ProblemReport([Problem(where=location.text, what=what, remedy=remedy)])
    return Path(location.text)


def _path_problems(path: Path) -> list[Problem]:
    """What can be said against the place itself."""
    if is_in_job_package(str(path)):
        what = "it is in the working directory of a Ray job, which Ray deletes when the job has ended"
        return [Problem(where=str(path), what=what, remedy="name a file in a folder that stays, by its whole path")]
    if path.is_dir():
        return [Problem(where=str(path), what="this is a folder", remedy=f"name a file, such as {path / 'model.gguf'}")]
    if path.suffix.lower() != ".gguf":
        remedy = f"call it {path.name}.gguf"
        return [Problem(where=str(path), what="the name does not end in .gguf, as all readers expect", remedy=remedy)]
    if not path.parent.is_dir():
        return [Problem(where=str(path), what="there is no such folder", remedy="make it first")]
    return []


def disk_space_problems(path: Path, size: int) -> list[Problem]:
    """Less free than `size` bytes. What a file holds that is replaced counts as used: both are there for a moment."""
    free = shutil.disk_usage(path.parent).free
    if free >= size:
        return []
    what = f"not enough disk: {size:,} bytes are to be written, {free:,} are free"
    return [Problem(where=str(path), what=what, remedy="make room, or choose a smaller --type or another folder")]


class StagingFile:
    """The file under its name of the meantime, open and locked. `commit` brings it to its place."""

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        self.path, self.part = path, path.with_name(path.name + _PART)
        self._overwrite, self._is_committed = overwrite, False
        self._descriptor = _open_part(path, self.part)
        try:
            if not self._try_lock():
                raise ProblemReport([_locked_problem(path)])
            if not _is_part(self._descriptor):
                raise ProblemReport([_foreign_part_problem(self.part)])
            os.ftruncate(self._descriptor, 0)
        except BaseException:
            os.close(self._descriptor)
            raise
        self.size = self._written_back = 0

    def _try_lock(self) -> bool:
        """Whether the lock is ours, on the file that has the name: another run may have moved it to its place since."""
        with contextlib.suppress(OSError):  # of a filesystem without locks
            if not try_lock(self._descriptor):
                return False
        return has_name(self._descriptor, self.part)

    def continue_after_header(self, size: int) -> None:
        """Go on behind what has been written under the name `part`; the file will have `size` more bytes."""
        self.size = os.fstat(self._descriptor).st_size
        allocate(self._descriptor, self.size + size)

    def append(self, chunk: memoryview | bytes) -> None:
        write_all(self._descriptor, memoryview(chunk), self.size)
        self.size += len(chunk)
        if self.size - self._written_back >= _WRITEBACK_BYTES:
            start_writeback(self._descriptor, self._written_back, self.size - self._written_back)
            self._written_back = self.size

    def commit(self) -> None:
        os.ftruncate(self._descriptor, self.size)
        os.fsync(self._descriptor)
        if self._overwrite:
            os.replace(self.part, self.path)
        else:
            self._move_without_replacing()
        self._is_committed = True
        sync_folder(self.path.parent)

    def _move_without_replacing(self) -> None:
        """A second name is only given where there is no file of that name, which moving does not ask for."""
        try:
            os.link(self.part, self.path)
        except FileExistsError:
            raise ProblemReport([_exists_problem(self.path)]) from None
        except OSError:  # a filesystem where a file has one name
            self.refuse_replacing()
            os.replace(self.part, self.path)
        else:
            self.part.unlink()

    def refuse_replacing(self) -> None:
        if not self._overwrite and os.path.lexists(self.path):
            raise ProblemReport([_exists_problem(self.path)])

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raises ProblemReport for what the filesystem refuses within."""
        try:
            yield
        except OSError as error:
            raise ProblemReport([_write_problem(self.path, error)]) from error

    def close(self) -> None:
        if not self._is_committed and has_name(self._descriptor, self.part):
            self.part.unlink(missing_ok=True)
        os.close(self._descriptor)


@contextmanager
def open_staging_file(path: Path, *, overwrite: bool = False) -> Iterator[StagingFile]:
    """A file that is gone again unless it was committed. Raises ProblemReport where it can't be, or one is there."""
    if problems := _path_problems(path):
        raise ProblemReport(problems)
    try:
        file = StagingFile(path, overwrite=overwrite)
    except OSError as error:
        raise ProblemReport([_write_problem(path, error)]) from None
    try:
        file.refuse_replacing()
        yield file
    finally:
        file.close()


def _open_part(path: Path, part: Path) -> int:
    """The part, new or left by a run that died; never what a link leads to. Raises ProblemReport and OSError."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.lstat(path), os.lstat(part)):
            part.unlink()  # a run died when the whole file had its name, and this one still
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(part, flags | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        pass
    try:
        return os.open(part, flags)
    except FileNotFoundError:  # it was moved to its place just now
        raise ProblemReport([_locked_problem(path)]) from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise ProblemReport([_foreign_part_problem(part)]) from None
        raise


def _is_part(descriptor: int) -> bool:
    """Whether an open file is what a run of raymoe leaves: of one name, and empty or a GGUF file's beginning."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        return False
    return found.st_size == 0 or os.pread(descriptor, len(_MAGIC), 0) in (_MAGIC, bytes(len(_MAGIC)))


def _locked_problem(path: Path) -> Problem:
    remedy = "wait for it, or choose another name"
    return Problem(where=str(path), what="another run is writing this file", remedy=remedy)


def _foreign_part_problem(part: Path) -> Problem:
    what = "the file is written under this name first, and something else has it"
    return Problem(where=str(part), what=what, remedy="move it away, or choose another name for the GGUF file")


def _exists_problem(path: Path) -> Problem:
    return Problem(where=str(path), what="this file is there already", remedy="--overwrite replaces it")


def _write_problem(path: Path, error: OSError) -> Problem:
    what = f"it can't be written: {error.strerror or error}"
    return Problem(where=str(path), what=what, remedy="name a file in a folder that you may write to, with space left")
