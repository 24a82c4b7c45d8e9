"""The output file: checks that it can be written, and moves it to its path only when it is complete.

It is written as `NAME.raymoe-part` in the same folder, synced, and moved to its path in one step. An existing file is
replaced only with `overwrite`. The part exists and is locked from the beginning of a run, so another run for the same
file is refused before it computes anything. A part that a stopped run has left is rewritten. Anything else of that name
(a link, a folder, a file that is not the beginning of a GGUF file) does not belong to raymoe, and the run is refused.
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
    """The absolute path of the file that the user named. Raises ProblemReport if it is not a local path."""
    try:
        location = Location.parse(output)
    except ValueError as error:
        raise ProblemReport([Problem(where=str(output), what=str(error), remedy="name a local file")]) from None
    if not location.kind.is_local:
        what, remedy = "a GGUF file is written to a local path", "write it to a local file, and copy that"
        raise ProblemReport([Problem(where=location.text, what=what, remedy=remedy)])
    return Path(location.text)


def _path_problems(path: Path) -> list[Problem]:
    """Problems of the path itself."""
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
    """A problem if less than `size` bytes are free. A file that is replaced counts as used, since both exist for a
    moment."""
    free = shutil.disk_usage(path.parent).free
    if free >= size:
        return []
    what = f"not enough disk: {size:,} bytes are needed, {free:,} are free"
    return [Problem(where=str(path), what=what, remedy="make room, or choose a smaller --type or another folder")]


class StagingFile:
    """The file under its temporary name, open and locked. `commit` moves it to its path."""

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
        """Whether this run holds the lock on the file of that name. Another run may have moved the locked file
        since."""
        with contextlib.suppress(OSError):  # of a filesystem without locks
            if not try_lock(self._descriptor):
                return False
        return has_name(self._descriptor, self.part)

    def continue_after_header(self, size: int) -> None:
        """Continue after the bytes already written to `part`; `size` more bytes will follow."""
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
        """Move without replacing a file: linking fails if the name exists, but renaming does not."""
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
        """Raises ProblemReport for errors of the filesystem within the block."""
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
    """A file that is removed unless it was committed. Raises ProblemReport if it can't be made, or the path exists."""
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
    """Open the part, new or left by a stopped run; links are not followed. Raises ProblemReport and OSError."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.lstat(path), os.lstat(part)):
            part.unlink()  # a run stopped when the complete file had both names
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
    """Whether an open file is a part that raymoe has left: it has one name, and is empty or begins as a GGUF file."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        return False
    return found.st_size == 0 or os.pread(descriptor, len(_MAGIC), 0) in (_MAGIC, bytes(len(_MAGIC)))


def _locked_problem(path: Path) -> Problem:
    remedy = "wait for it, or choose another name"
    return Problem(where=str(path), what="another run is writing this file", remedy=remedy)


def _foreign_part_problem(part: Path) -> Problem:
    what = "the file is first written under this name, but something else has it"
    return Problem(where=str(part), what=what, remedy="move it away, or choose another name for the GGUF file")


def _exists_problem(path: Path) -> Problem:
    return Problem(where=str(path), what="this file exists already", remedy="--overwrite replaces it")


def _write_problem(path: Path, error: OSError) -> Problem:
    what = f"it can't be written: {error.strerror or error}"
    return Problem(where=str(path), what=what, remedy="name a file in a folder that you may write to, with space left")
