"""A checkpoint in a local folder. It may be a snapshot folder of the Hub cache, which consists of symlinks.

A file can be replaced at any time. So it is stamped when it is found, before its header is read (`stat_file`), and
every later opening compares the stamp (`open_file`): the bytes belong to the header that was read, or an error is
raised.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import socket
import stat
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from raymoe.errors import CheckpointError
from raymoe.sources.facts import FileStamp, SourceFile
from raymoe.sources.folder_protocol import unusable_checkpoint

_SAMPLE_BYTES = 4096
_SMALL_BLOCKS, _RECORDED_BLOCKS = 16, 256
_CHUNK_BYTES = 256 << 10


class LocalFolder:
    """Implements `Folder` on the file system. Locations are absolute paths; symlinks are kept as they are."""

    def __init__(self, path: str):
        self._path = os.path.abspath(os.path.expanduser(path))
        self.label = self._path
        self.revision: str | None = None
        self.bin_warning: str | None = None
        try:
            self.names: list[str] = sorted(self._list(""))
        except OSError as error:
            raise unusable_checkpoint(
                self.label, f"the folder can't be read: {error.strerror}", "check its permissions"
            ) from error

    def _list(self, prefix: str) -> list[str]:
        names: list[str] = []
        with os.scandir(os.path.join(self._path, prefix)) as entries:
            for entry in entries:
                if entry.is_file():  # follows symlinks; a broken one counts as missing
                    names.append(prefix + entry.name)
                elif not prefix and entry.name == "chat_templates" and entry.is_dir():
                    names.extend(self._list("chat_templates/"))
        return names

    def find(self, name: str) -> SourceFile | None:
        return stat_file(os.path.join(self._path, name))

    def read(self, file: SourceFile) -> bytes:
        return self.read_range(file, 0, file.size)

    def read_range(self, file: SourceFile, start: int, end: int) -> bytes:
        with open(open_file(file), "rb") as handle:
            try:
                handle.seek(start)
                return handle.read(end - start)
            except OSError as error:
                raise unreadable(file, error) from error

    def local_path(self, file: SourceFile) -> Path:
        return Path(file.location)

    def missing_remedy(self, name: str) -> str:
        if os.path.islink(os.path.join(self._path, name)):
            return f"{name} is a symlink to nothing; download or copy the model again"
        return "complete the folder (download or copy the model again)"


def leads_outside(path: str, folder: str) -> bool:
    """Whether a path in a folder leads, by links, to a file outside of the folder.

    Links of a snapshot in the Hub's cache lead to `blobs` of the same repository, which count as inside.
    """
    target, place = os.path.realpath(path), os.path.realpath(folder)
    repository, kind = os.path.split(os.path.dirname(place))
    places = [place]
    if kind == "snapshots" and os.path.basename(repository).startswith("models--"):
        places.append(os.path.join(repository, "blobs"))
    return not any(target.startswith(f"{each.rstrip(os.sep)}{os.sep}") for each in places)


def stat_file(path: str) -> SourceFile | None:
    """The regular file at an absolute path (a symlink is followed), or None."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return SourceFile(location=path, size=status.st_size, stamp=_stamp(status))


def open_file(file: SourceFile, path: str | Path | None = None) -> int:
    """A descriptor of a file of this machine; `path` is where its bytes are, if not at its location.

    Raises CheckpointError if the file is missing, can't be read, or has changed since planning.
    """
    try:
        descriptor = os.open(path or file.location, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        what = f"the file is not there on this node ({socket.gethostname()})"
        remedy = "put the model where every node sees it under this path, or name it by its Hub id"
        raise unusable_checkpoint(file.location, what, remedy) from None
    except OSError as error:
        raise unreadable(file, error) from error
    try:
        check_unchanged(file, descriptor)
    except OSError as error:
        os.close(descriptor)
        raise unreadable(file, error) from error
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_unchanged(file: SourceFile, descriptor: int) -> None:
    """Raises CheckpointError if an open file has changed since planning."""
    if _is_same(file, descriptor):
        return
    size = os.fstat(descriptor).st_size
    what = "the file has been written again since the merge was planned"
    if size != file.size:
        what = f"the file has {size} bytes, but had {file.size} when the merge was planned"
    raise unusable_checkpoint(file.location, what, "run the same command again when the file no longer changes")


def has_changed(file: SourceFile) -> bool:
    """Whether a local file has changed since planning. A missing file has not changed."""
    try:
        descriptor = os.open(file.location, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _is_same(file, descriptor)
    finally:
        os.close(descriptor)


def small_sample(file: SourceFile) -> int:
    """A checksum of some blocks of a file of the planned size, 64 KiB in all. Raises OSError."""
    return _sample_blocks(file.location, file.size, _SMALL_BLOCKS)


def file_fingerprint(times: Iterable[tuple[str, int]], sample: int) -> str:
    """The fingerprint of a local file in a journal: a sample, and its modification times (ns) on nodes, by node name.

    The time alone does not identify a model: in images, archives and package stores all files may have the same time.
    The inode is left out, since a mount may renumber its files.
    """
    by_node: dict[str, list[int]] = {}
    for node, mtime_ns in sorted(set(times)):
        by_node.setdefault(node, []).append(mtime_ns)
    return f"{json.dumps(by_node)}:{sample:016x}"


def fingerprints_differ(before: str, now: str) -> bool:
    """Whether two fingerprints may be of different content: the samples differ, or no common time shows equality.

    A copy on another node has its own time, and the known copies depend on the nodes that are up. So one common time is
    enough, on whatever nodes (a container gets a new name each time), unless the copy on one node has been written
    since.
    """
    (times, sample), (times_now, sample_now) = _parse_fingerprint(before), _parse_fingerprint(now)
    if sample != sample_now or any(times[node].isdisjoint(times_now[node]) for node in times.keys() & times_now):
        return True
    known, known_now = (set().union(*each.values()) for each in (times, times_now))
    return bool(known and known_now) and known.isdisjoint(known_now)


def _parse_fingerprint(stamp: str) -> tuple[dict[str, set[Any]], str]:
    """Times by node, and the sample. An older raymoe did not say on which node a time was read, or kept none."""
    times, _, sample = stamp.rpartition(":")
    try:
        known = json.loads(times)
        return ({"": {known}} if isinstance(known, int) else {node: set(each) for node, each in known.items()}), sample
    except (ValueError, TypeError, AttributeError):
        return {}, sample


def _sample_blocks(path: str, size: int, blocks: int) -> int:
    """A checksum of this many blocks, spread over a file of this size. Raises OSError."""
    hasher = xxhash.xxh3_64()
    with open(path, "rb", buffering=0) as file:
        for number in range(blocks):
            file.seek(max(0, size - _SAMPLE_BYTES) * number // (blocks - 1))
            hasher.update(file.read(_SAMPLE_BYTES))
    return hasher.intdigest() >> 1


def recorded_sample(file: SourceFile) -> str | None:
    """The sample of a local file in a merge's record, to recognize a changed file later. It has no time, since touching
    or copying a file does not change it. None for a file that is not here, or can't be read."""
    if not file.kind.is_local:
        return None
    try:
        size = os.stat(file.location).st_size
        return f"{size}:xxh3-sample:{_sample_blocks(file.location, size, _RECORDED_BLOCKS):016x}"
    except OSError:
        return None


def is_in_view(file: SourceFile) -> bool:
    """Whether the file's stamp was taken on this machine and mount namespace, so that it can be compared here."""
    return file.stamp is not None and file.stamp.view == _mount_view()


def with_content(file: SourceFile, data: bytes) -> SourceFile:
    """A small file with the checksum of `data`, its content."""
    return replace(file, content=f"xxh3-128:{xxhash.xxh3_128_hexdigest(data)}")


def unreadable(file: SourceFile, error: OSError) -> CheckpointError:
    """The error for a file that can't be opened or read."""
    what, remedy = f"can't be read: {error.strerror or error}", "check its permissions and its disk"
    if error.errno == errno.EMFILE:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        what = f"can't be opened: this process has as many files open as it may ({limit})"
        remedy = "allow more before Ray is started (ulimit -n 65536)"
    elif error.errno == errno.ENFILE:
        remedy = "the whole machine has too many files open: raise fs.file-max"
    return unusable_checkpoint(file.location, what, remedy)


def _is_same(file: SourceFile, descriptor: int) -> bool:
    """Whether an open file is the planned one, as far as its stamp, content or else size shows."""
    status = os.fstat(descriptor)
    if status.st_size != file.size:
        return False
    if is_in_view(file) and _stamp(status) == file.stamp:
        return True
    if file.content is not None:
        return _checksum(descriptor) == file.content
    return not is_in_view(file)


def _checksum(descriptor: int) -> str:
    hasher, at = xxhash.xxh3_128(), 0
    while chunk := os.pread(descriptor, _CHUNK_BYTES, at):
        hasher.update(chunk)
        at += len(chunk)
    return f"xxh3-128:{hasher.hexdigest()}"


def _stamp(status: os.stat_result) -> FileStamp:
    inode = status.st_ino if _has_lasting_inodes(status.st_dev) else 0
    return FileStamp(mtime_ns=status.st_mtime_ns, inode=inode, view=_mount_view())


@cache
def _mount_view() -> str:
    """An id of this machine since its start, and of this process's mount namespace: equal ids see the same files."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/mnt')}"
    except OSError:
        return socket.gethostname()


@cache
def _has_lasting_inodes(device: int) -> bool:
    """False for FUSE: its filesystems may renumber a file after the kernel has dropped it from its cache."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return True
    number = re.escape(f"{os.major(device)}:{os.minor(device)}")
    match = re.search(rf"^\d+ \d+ {number} .* - (\S+) ", mounts, re.MULTILINE)
    return match is None or not match[1].startswith("fuse")
