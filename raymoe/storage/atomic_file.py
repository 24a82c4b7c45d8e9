"""Writes small files atomically (a run's result, an evaluation, notes of a journal): to a temporary file next to it,
which is then renamed.

After a full disk or a kill, the previous file is still there. Also has locks, and renames that survive a crash.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import uuid
from pathlib import Path


def is_special(path: Path) -> bool:
    """Whether the path is a pipe or a device: bytes can be written to it, but no file can replace it."""
    return path.exists() and not path.is_file()


def resolve_links(path: Path) -> Path:
    """The path of the file itself, after links are followed; the links stay."""
    return Path(os.path.realpath(path))


def check_writable_file(path: Path) -> OSError | None:
    """The error of opening the file for writing, or of creating one next to it. Permission bits alone do not show
    read-only and special mounts."""
    if is_special(path):
        return None  # the reader of a pipe would take the first close for the end
    try:
        if path.exists():
            path.open("a").close()
        part = _part(resolve_links(path))
        part.open("x").close()
        part.unlink()
    except OSError as error:
        return error
    return None


def write_atomic(path: Path, text: str, *, follow: bool = True) -> None:
    """Write the file. Links to the replaced file, and its permissions, stay. Without `follow`, a link at `path` is
    replaced, and its target stays. Raises OSError."""
    if follow and is_special(path):
        path.write_text(text, encoding="utf-8")
        return
    place = resolve_links(path) if follow else path
    mode = stat.S_IMODE(place.stat().st_mode) if place.is_file() and not place.is_symlink() else None
    replace_file(place, _part(place), text.encode(), mode)


def replace_file(path: Path, part: Path, content: bytes, mode: int | None = None) -> None:
    """Write the new file `part`, and rename it to `path` when it is on disk. Raises OSError, and leaves no part."""
    try:
        with part.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if mode is not None:
            part.chmod(mode)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file; False if another process holds the lock. Raises OSError if the filesystem has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def has_name(descriptor: int, path: Path) -> bool:
    """Whether the path still leads to this open file: another run may have moved or removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _part(place: Path) -> Path:
    """The path of the temporary file; its name is unique."""
    return place.with_name(f"{place.name}.{uuid.uuid4().hex[:12]}.part")
