"""Small files (a run's result, an evaluation, notes of a journal): written beside their place, moved there whole.

A full disk or a kill leaves the file that was there before. Also locks, and renames that survive a crash.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import uuid
from pathlib import Path


def is_special(path: Path) -> bool:
    """A pipe or a device: bytes are sent there, and nothing can take its place."""
    return path.exists() and not path.is_file()


def resolve_links(path: Path) -> Path:
    """Where the file is, through links: those stay."""
    return Path(os.path.realpath(path))


def check_writable_file(path: Path) -> OSError | None:
    """What the filesystem says to opening the file for writing, and to a new one beside it: permission bits alone know
    nothing of read-only and special mounts."""
    if is_special(path):
        return None  # a pipe would take the first close for the end
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
    """Write the file. Links and permissions of what is replaced stay; without `follow` a link of its name is replaced,
    and what it leads to stays. Raises OSError."""
    if follow and is_special(path):
        path.write_text(text, encoding="utf-8")
        return
    place = resolve_links(path) if follow else path
    mode = stat.S_IMODE(place.stat().st_mode) if place.is_file() and not place.is_symlink() else None
    replace_file(place, _part(place), text.encode(), mode)


def replace_file(path: Path, part: Path, content: bytes, mode: int | None = None) -> None:
    """Write the new file `part`, and give it the name `path` when it is on disk. Raises OSError, and leaves no part."""
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
    """Lock an open file; False where another process holds it. Raises OSError where the filesystem locks no files."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def has_name(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of this name: another run may have moved or removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _part(place: Path) -> Path:
    """The file under its name of the meantime, which nothing else has."""
    return place.with_name(f"{place.name}.{uuid.uuid4().hex[:12]}.part")
