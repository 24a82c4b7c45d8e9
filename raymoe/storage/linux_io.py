"""Calls of Linux that Python has no name for: room for a file, writeback, shared extents.

They make writing faster and change no byte, so that each says whether it worked and none is needed: other systems and
filesystems without them go on as if they had not been asked.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys

# A file that is too large for the disk, the quota or the limit of the process is one however it is written.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range), from linux/fs.h
_SYNC_FILE_RANGE_WRITE = 2
_SYNC_FILE_RANGE_WRITE_AND_WAIT = 1 | 2 | 4  # WAIT_BEFORE, WRITE, WAIT_AFTER
_NO_SUCH_CALL = (errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP)
_PUNCH_HOLE = 0x02 | 0x01  # with the size kept, from linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def allocate(descriptor: int, size: int) -> bool:
    """Have the filesystem set `size` bytes aside, in few large extents. Raises OSError where there is no room for them.

    Not `os.posix_fallocate`: where a filesystem can't do it, the C library writes a byte into every block instead.
    """
    fallocate = getattr(_libc, "fallocate", None)
    if fallocate is None or not size:
        return False
    while fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code in _NO_ROOM:
            raise OSError(code, os.strerror(code))
        if code != errno.EINTR:
            return False
    return True


def start_writeback(descriptor: int, start: int, size: int) -> bool:
    """Have the kernel begin to write these bytes to the disk, and do not wait for it."""
    call = getattr(_libc, "sync_file_range", None)
    if call is None:
        return False
    done = call(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
    return bool(done == 0)


def wait_for_writeback(descriptor: int, start: int, size: int) -> bool:
    """Have the kernel write these bytes to the disk, and wait until it has. Raises OSError if a write fails.

    This does not replace `fsync`: neither metadata nor the disk's own cache is written. Linux reports a failed write
    once per open file, here or by `fsync`, so an error that is dropped here is lost.
    """
    if not start_writeback(descriptor, start, 1):  # not there, or forbidden in this container
        return False
    call = getattr(_libc, "sync_file_range", None)
    assert call is not None
    flags = ctypes.c_uint(_SYNC_FILE_RANGE_WRITE_AND_WAIT)
    if call(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_SUCH_CALL:
        return False
    raise OSError(code, os.strerror(code))


def clone_range(source: int, start: int, size: int, target: int, offset: int) -> bool:
    """Let `target` share `size` bytes of `source`, nothing being copied. All three numbers are whole blocks.

    False where the filesystem can't (ext4), or the two files are not on one.
    """
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack("=qQQQ", source, start, size, offset))
    except OSError:
        return False
    return True


def free_range(descriptor: int, start: int, size: int) -> bool:
    """Give the room of these bytes back to the filesystem; the file keeps its size."""
    fallocate = getattr(_libc, "fallocate", None)
    if fallocate is None:
        return False
    return bool(fallocate(descriptor, _PUNCH_HOLE, ctypes.c_int64(start), ctypes.c_int64(size)) == 0)
